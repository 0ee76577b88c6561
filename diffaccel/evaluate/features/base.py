"""The interface of feature extractors; they also work as ``feature=`` of torchmetrics' FID, KID and Inception Score."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from ...core.errors import DataError, NumericalError, UsageError

_CACHED_PIXELS = 2**15  # per call on a CPU: beyond, activations leave its caches and every layer waits for memory
_MOST_PIXELS = 2**24  # per call anywhere: a gigabyte of first activations
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class FeatureExtractor(nn.Module):
    """uint8 images (N, C, H, W) → float32 features (N, d), without gradients and always in evaluation mode.

    torchmetrics neither switches a custom extractor to evaluation mode nor checks its input, so both happen here.

    Attributes:
        name: registered name.
        num_features: d.
        channels: C that the extractor expects.
        image_size: (H, W) that it is limited to, or None.
        resizes: it brings images of any size to its own input size, so sizes may differ within a set.
        input_size: height and width it brings them to, None where it does not resize.
        num_classes: length of `logits`, None for an extractor without classes.
        preprocessing: recipe from uint8 pixels to network input, part of the identity.
    """

    name: str
    num_features: int
    channels: int
    image_size: tuple[int, int] | None = None
    resizes: bool = False
    input_size: int | None = None
    num_classes: int | None = None
    preprocessing: str
    _dtype, _compiled = "float32", False

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stay in evaluation mode: features that depend on the batch or on dropout would not define a metric."""
        return super().train(False)

    def prepare(self, device="cpu", dtype: str = "float32", compile: bool = False) -> "FeatureExtractor":
        """Choose where and how features are computed; returns self.

        Args:
            device: torch device.
            dtype: "float32", or "bfloat16" for automatic mixed precision; it is part of the identity.
            compile: run `extract` through torch.compile.

        Raises:
            UsageError: another dtype.
        """
        if dtype not in DTYPES:
            raise UsageError(f"Features are computed in {' or '.join(DTYPES)}, not {dtype}.")
        self._dtype = dtype
        if compile and not self._compiled:
            self.extract, self._compiled = torch.compile(self.extract), True
        return self.to(device)

    @torch.no_grad()
    def forward(self, images: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Check the images, extract, check the features.

        Args:
            images: uint8 (N, C, H, W); or, where the extractor `resizes`, a list of N images (C, H, W) of any sizes.

        Raises:
            UsageError: not uint8 (floats would be read on an unknown scale).
            DataError: another number of channels or another size.
            NumericalError: NaN or infinite features.
        """
        if isinstance(images, torch.Tensor):
            return self._extract(images)
        by_size: dict[tuple, list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(tuple(image.shape), []).append(index)
        order = [index for indices in by_size.values() for index in indices]
        parts = [self._extract(torch.stack([images[i] for i in indices])) for indices in by_size.values()]
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def _extract(self, images: torch.Tensor) -> torch.Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise UsageError(
                f"{self.name} needs uint8 (N, C, H, W), got {images.dtype} of shape {tuple(images.shape)}."
            )
        if images.shape[1] != self.channels or self.image_size not in (None, tuple(images.shape[2:])):
            size = "×".join(map(str, self.image_size)) if self.image_size else "H×W"
            got = "×".join(map(str, images.shape[1:]))
            raise DataError(f"{self.name} reads {self.channels}×{size} images (channels×height×width), got {got}.")
        # Pixels together in memory: convolutions of three channels run up to three times as fast on CPUs.
        images = images.to(self.device).contiguous(memory_format=torch.channels_last)
        if len(images) == 0:
            return torch.zeros(0, self.num_features, device=images.device)
        with torch.autocast(images.device.type, DTYPES[self._dtype], enabled=self._dtype != "float32"):
            features = torch.cat([self.extract(part).float() for part in images.split(self._part(images))])
        if not bool(torch.isfinite(features).all()):
            raise NumericalError(f"{self.name} gives NaN or infinite features; check the images and the extractor.")
        return features

    def _part(self, images: torch.Tensor) -> int:
        """Images per call of `extract`; of the size they are resized to, extractors that do so take care themselves."""
        most = _CACHED_PIXELS if images.device.type == "cpu" and not self.resizes else _MOST_PIXELS
        return max(1, most // (images.shape[2] * images.shape[3]))

    def _apply(self, fn, recurse: bool = True):
        # torchmetrics' set_dtype would turn the weights into doubles, and with them into other features.
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), recurse)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((tensor.device for tensor in self.state_dict().values()), torch.device("cpu"))

    @abstractmethod
    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, d) of images that were checked."""

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Class scores (N, num_classes) of features (N, d), as the Inception Score reads them.

        Raises:
            UsageError: the extractor has no classes.
        """
        raise UsageError(
            f"{self.name} has no classes; the Inception Score needs those of a classifier: inception, or digits64."
        )

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
            "dtype": self._dtype,
        }


class Logits(nn.Module):
    """The class scores of an extractor as a module, for ``feature=`` of torchmetrics' InceptionScore.

    Raises:
        UsageError: the extractor has no classes.
    """

    def __init__(self, extractor: FeatureExtractor):
        super().__init__()
        if extractor.num_classes is None:
            extractor.logits(torch.zeros(0, extractor.num_features))
        self.extractor, self.num_features = extractor, extractor.num_classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (N, C, H, W) → (N, num_classes)."""
        return self.extractor.logits(self.extractor(images))
