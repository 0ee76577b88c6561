"""The interface of feature extractors; they also work as ``feature=`` of torchmetrics' FrechetInceptionDistance."""

import hashlib
from abc import abstractmethod

import torch
from torch import nn

from ...core.errors import DataError, UsageError


class FeatureExtractor(nn.Module):
    """uint8 images (N, C, H, W) → float32 features (N, d), without gradients and always in evaluation mode.

    torchmetrics neither switches a custom extractor to evaluation mode nor checks its input, so both happen here.

    Attributes:
        name: registered name.
        num_features: d.
        channels: C that the extractor expects.
        image_size: (H, W) that it is limited to, or None.
        preprocessing: recipe from uint8 pixels to network input, part of the identity.
    """

    name: str
    num_features: int
    channels: int
    image_size: tuple[int, int] | None = None
    preprocessing: str

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stay in evaluation mode: features that depend on the batch or on dropout would not define a metric."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Check the images, extract, check the features.

        Raises:
            UsageError: not uint8 (floats would be read on an unknown scale).
            DataError: another number of channels or another size.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise UsageError(
                f"{self.name} needs uint8 (N, C, H, W), got {images.dtype} of shape {tuple(images.shape)}."
            )
        if images.shape[1] != self.channels or self.image_size not in (None, tuple(images.shape[2:])):
            size = "×".join(map(str, self.image_size)) if self.image_size else "H×W"
            got = "×".join(map(str, images.shape[1:]))
            raise DataError(f"{self.name} reads {self.channels}×{size} images (channels×height×width), got {got}.")
        if len(images) == 0:
            return torch.zeros(0, self.num_features, device=images.device)
        return self.extract(images).float()

    @abstractmethod
    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, d) of images that were checked."""

    def weights_sha256(self) -> str:
        """SHA-256 over names, shapes, types and bytes of all weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def identity(self) -> dict:
        """What must agree before two sets of features may be compared; JSON-able."""
        return {
            "name": self.name,
            "dim": self.num_features,
            "sha256": self.weights_sha256(),
            "preprocessing": self.preprocessing,
        }
