"""Features of DINOv2, which follow people's judgement of realism better than Inception's (Stein et al. 2023)."""

import torch
from torch.nn import functional as F

from ...core.errors import DataError
from .pretrained import Architecture, PretrainedFeatures
from .resize import resize

DINOV2 = Architecture("Dinov2Model", "dinov2", "facebook/dinov2-large", "--weights FOLDER")
_SIZE = 224
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_OFFSET = 0.1
_SLICE = 64  # images at once; the hidden layers of ViT-L take 4 MB for each


class DinoV2Features(PretrainedFeatures):
    """Class token of DINOv2 after the last layer norm, 1024 numbers for the default ViT-L/14 (Oquab et al. 2023).

    Images are squeezed to 224×224 in the way of EDM2 (Karras et al. 2024), whose FD-DINOv2 this reproduces; Stein et
    al. round to bytes after the same filter.

    Args:
        weights: a folder with config.json and model.safetensors, or a hub repository; None for facebook/dinov2-large.
        download: allow weights that are not on this machine to be fetched from the hub.

    Raises:
        MissingWeightsError: the weights are not on this machine.
        DataError: a damaged folder, pickled weights only, another architecture.
    """

    name = "dinov2"
    architecture, mean, deviation = DINOV2, _MEAN, _DEVIATION
    input_size = _SIZE
    preprocessing = (
        f"uint8 RGB, bicubic-antialias to {_SIZE}×{_SIZE}, /255, ImageNet mean and deviation, "
        f"positions resampled with offset {_OFFSET}"
    )

    def __init__(self, weights=None, download: bool = False):
        super().__init__()
        folder = self._open(weights, download)
        self.num_features = self.model.config.hidden_size
        if self.model.config.num_channels != self.channels:
            raise DataError(f"{folder} reads {self.model.config.num_channels}-channel images; expected 3 (RGB).")
        self._fix_positions()

    @torch.no_grad()
    def _fix_positions(self) -> None:
        """Resample the position embeddings once, as the authors' code does, on which published numbers rest.

        That code gives the interpolation a scale with 0.1 patches added, transformers an output size: the sampling
        points differ, and with them the features.
        """
        embeddings = self.model.embeddings
        positions = embeddings.position_embeddings
        stored = round((positions.shape[1] - 1) ** 0.5)
        wanted = _SIZE // embeddings.patch_embeddings.projection.kernel_size[0]
        if stored == wanted:
            return
        grid = positions[:, 1:].unflatten(1, (stored, stored)).permute(0, 3, 1, 2)
        scale = (wanted + _OFFSET) / stored
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        resampled = torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
        embeddings.position_embeddings = torch.nn.Parameter(resampled, requires_grad=False)

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.model(self._input(part)).last_hidden_state[:, 0] for part in images.split(_SLICE)])

    def _input(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, enabled=False):  # pixels keep their 8 bits under bfloat16
            return self._normalised(resize(images, _SIZE, "bicubic-antialias"))
