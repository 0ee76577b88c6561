"""Inception-v3 of 2015-12-05, the network that published FIDs are measured with; not torchvision's.

Szegedy et al. 2016 with the quirks of the TensorFlow graph (Heusel et al. 2017): 1008 classes, average pools that leave
padding out of the mean, and a maximum in the last block where the paper has an average. Parameter names are those of
the published PyTorch conversions.
"""

import torch
from torch import nn
from torch.nn import functional as F

INPUT_SIZE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008

# name: width, kernel, stride, padding; or a pool
_STEM = {
    "Conv2d_1a_3x3": (32, 3, 2, 0),
    "Conv2d_2a_3x3": (32, 3, 1, 0),
    "Conv2d_2b_3x3": (64, 3, 1, 1),
    "MaxPool_1": "shrink",
    "Conv2d_3b_1x1": (80, 1, 1, 0),
    "Conv2d_4a_3x3": (192, 3, 1, 0),
    "MaxPool_2": "shrink",
}

# Branches run side by side on the input and are concatenated. "96:3" is a convolution to 96 channels with kernel 3×3,
# "96:3/2" the same with stride 2, "384:1x3+3x1" two convolutions of one input, concatenated; a word is a pool.
_A = "branch1x1 64:1 | branch5x5 48:1 64:5 | branch3x3dbl 64:1 96:3 96:3 | branch_pool mean {}:1"
_B = "branch3x3 384:3/2 | branch3x3dbl 64:1 96:3 96:3/2 | branch_pool shrink"
_C = (
    "branch1x1 192:1 | branch7x7 {0}:1 {0}:1x7 192:7x1 | branch7x7dbl {0}:1 {0}:7x1 {0}:1x7 {0}:7x1 192:1x7"
    " | branch_pool mean 192:1"
)
_D = "branch3x3 192:1 320:3/2 | branch7x7x3 192:1 192:1x7 192:7x1 192:3/2 | branch_pool shrink"
_E = "branch1x1 320:1 | branch3x3 384:1 384:1x3+3x1 | branch3x3dbl 448:1 384:3 384:1x3+3x1 | branch_pool {} 192:1"
_BLOCKS = {
    "Mixed_5b": _A.format(32),
    "Mixed_5c": _A.format(64),
    "Mixed_5d": _A.format(64),
    "Mixed_6a": _B,
    "Mixed_6b": _C.format(128),
    "Mixed_6c": _C.format(160),
    "Mixed_6d": _C.format(160),
    "Mixed_6e": _C.format(192),
    "Mixed_7a": _D,
    "Mixed_7b": _E.format("mean"),
    "Mixed_7c": _E.format("max"),
}


def _pool(kind: str) -> nn.Module:
    if kind == "mean":
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return nn.MaxPool2d(3, stride=1, padding=1) if kind == "max" else nn.MaxPool2d(3, stride=2)


class _Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels: int, width: int, kernel, stride: int, padding):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Block(nn.Module):
    """The branches that a line of the table describes.

    Attributes:
        width: channels of the output.
        plan: per branch its steps, per step the names of the layers that read the same input.
    """

    def __init__(self, channels: int, table: str):
        super().__init__()
        self.width, self.plan = 0, []
        for line in table.split("|"):
            name, *steps = line.split()
            width, plan = channels, []
            chain = sum(":" in step for step in steps) > 1
            for index, step in enumerate(steps, 1):
                if ":" in step:
                    width, layers = self._convolutions(f"{name}_{index}" if chain else name, width, step)
                else:
                    layers = ["pool"]
                    self.pool = _pool(step)
                plan.append(layers)
            self.plan.append(plan)
            self.width += width

    def _convolutions(self, name: str, channels: int, step: str) -> tuple[int, list[str]]:
        width, kernels = step.split(":")
        kernels, _, stride = kernels.partition("/")
        kernels = [tuple(map(int, kernel.split("x"))) * (1 if "x" in kernel else 2) for kernel in kernels.split("+")]
        names = [name] if len(kernels) == 1 else [f"{name}{letter}" for letter in "ab"]
        for layer, kernel in zip(names, kernels, strict=True):
            padding = 0 if stride else tuple(side // 2 for side in kernel)
            self.add_module(layer, _Conv(channels, int(width), kernel, int(stride or 1), padding))
        return int(width) * len(kernels), names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for steps in self.plan:
            y = x
            for layers in steps:
                y = [getattr(self, layer)(y) for layer in layers]
                y = y[0] if len(y) == 1 else torch.cat(y, 1)
            outputs.append(y)
        return torch.cat(outputs, 1)


class InceptionNet(nn.Module):
    """Normalised images (N, 3, 299, 299), about −1 to 1, → activations (N, 2048) of the last pool.

    `fc` (1008 × 2048 and a bias) is there for the Inception Score; `forward` does not use it.
    """

    def __init__(self):
        super().__init__()
        channels = 3
        for name, layer in _STEM.items():
            if isinstance(layer, str):
                self.add_module(name, _pool(layer))
            else:
                self.add_module(name, _Conv(channels, *layer))
                channels = layer[0]
        for name, table in _BLOCKS.items():
            block = _Block(channels, table)
            self.add_module(name, block)
            channels = block.width
        self.fc = nn.Linear(channels, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in (*_STEM, *_BLOCKS):
            x = getattr(self, name)(x)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)
