"""Features of the FID network, with the resize filter and normalisation of the tool whose numbers are wanted."""

import torch
from torch.nn import functional as F

from .base import FeatureExtractor
from .inception_net import INPUT_SIZE, NUM_CLASSES, NUM_FEATURES, InceptionNet
from .resize import get_filter
from .weights import load_inception_weights

_SLICE = 64  # images at once; resized in float32 they take 69 MB


class InceptionFeatures(FeatureExtractor):
    """The last pool (2048) of the Inception-v3 behind published FIDs (Heusel et al. 2017).

    Args:
        weights: a published ``.pth`` file, a ``.safetensors`` file with the same names, or a folder that holds a
            published file; None looks where `weights.find_inception_weights` says.
        resize: a filter of `resize.FILTERS`; it also decides the normalisation.
        verify: refuse files other than the published one. Features of others are not comparable with published
            numbers; `weights_sha256` tells them apart.

    Raises:
        UsageError: unknown filter.
        MissingWeightsError: no weights on this machine.
        DataError: a file other than the published one, or one that does not hold this network.
    """

    name = "inception"
    num_features = NUM_FEATURES
    channels = 3
    resizes = True
    input_size = INPUT_SIZE
    num_classes = NUM_CLASSES

    def __init__(self, weights=None, resize: str = "tf1-bilinear", verify: bool = True):
        super().__init__()
        self._filter = get_filter(resize)
        grey = self._filter.inception_grey
        self.preprocessing = f"uint8 RGB, {resize} to {INPUT_SIZE}×{INPUT_SIZE}, (x - {grey:g}) / {grey:g}"
        with torch.device("meta"):  # the loaded tensors become the parameters: no second copy, no initialisation
            self.net = InceptionNet()
        self.net.load_state_dict(load_inception_weights(self.net.state_dict(), weights, verify), assign=True)
        self.net.to(memory_format=torch.channels_last)
        self.requires_grad_(False)
        self.eval()

    def prepare(self, device="cpu", dtype: str = "float32", compile: bool = False) -> "InceptionFeatures":
        """As of every extractor; only the network is compiled, so that images of other sizes need no new compilation."""
        if compile:
            self.net.compile()
        return super().prepare(device, dtype)

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, 2048) of images (N, 3, H, W), a few at a time, since each becomes 1 MB."""
        return torch.cat([self.net(self._input(part)) for part in images.split(_SLICE)])

    def _input(self, images: torch.Tensor) -> torch.Tensor:
        grey = self._filter.inception_grey
        with torch.autocast(images.device.type, enabled=False):  # pixels keep their 8 bits under bfloat16
            pixels = (self._filter.apply(images, INPUT_SIZE) - grey) / grey
            return pixels.contiguous(memory_format=torch.channels_last)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Class scores (N, 1008) without the bias of the last layer.

        The Inception Score has been computed without it since its first code; torch-fidelity, torchmetrics and
        StyleGAN follow.
        """
        return F.linear(features.to(self.device), self.net.fc.weight)
