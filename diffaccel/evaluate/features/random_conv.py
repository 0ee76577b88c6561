"""Features of an untrained convolutional network: no weights to fetch, any image size."""

import math
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from ...core.images import to_unit_range
from ...core.rng import KeyedRandom
from .base import FeatureExtractor

_SEED = 20180101
_WIDTHS = (3, 16, 32, 32)
_POOLED = 2
_SCALE = 10.0  # brings distances between small image sets to the order of 1


class RandomConvFeatures(FeatureExtractor):
    """Three random 3×3 convolutions with ReLU and halving, pooled to 2×2: 128 features of 3-channel images.

    Monotone in the strength of a corruption, but compared with trained features it weighs brightness too heavily and
    missing modes too lightly; meant for pictures without a trained extractor and as a cross-check (random embeddings:
    Naeem et al. 2020). Weights are uniform numbers from a counter-based generator, hence identical on every machine.
    """

    name = "random-conv"
    num_features = _WIDTHS[-1] * _POOLED**2
    channels = 3
    preprocessing = "uint8 RGB / 127.5 - 1, no resize"

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in pairwise(_WIDTHS))
        for index, layer in enumerate(self.layers):
            bound = math.sqrt(6.0 / (9 * layer.in_channels))  # He's variance 2/fan_in
            layer.weight.data = self._uniform(index, "weight", layer.weight.shape, bound)
            layer.bias.data = self._uniform(index, "bias", layer.bias.shape, 0.1)
        self.requires_grad_(False)
        self.eval()

    @staticmethod
    def _uniform(index: int, kind: str, shape: torch.Size, bound: float) -> torch.Tensor:
        u = KeyedRandom(_SEED).uniform(f"random-conv {kind}", index, 0, 1, tuple(shape))[0]
        return ((2.0 * u - 1.0) * bound).float()

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        x = to_unit_range(images)
        for layer in self.layers:
            x = F.avg_pool2d(F.relu(layer(x), inplace=True), 2, ceil_mode=True)
        return _SCALE * F.adaptive_avg_pool2d(x, _POOLED).flatten(1)
