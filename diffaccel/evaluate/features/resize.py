"""Resize filters of extractors, each equal to the one of a published tool.

The filter moves the distance as much as a change of the model does (Parmar, Zhang & Zhu 2022), hence the choice is
part of an extractor's identity.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from ...core.errors import unknown


def _tf1_bilinear(images: torch.Tensor, size: int) -> torch.Tensor:
    """Sample at i·H/S, without the half-pixel shift: `resize_bilinear` of TensorFlow 1, in its order of operations."""

    def neighbours(length: int):
        # TensorFlow multiplies in float32; the rounding decides which pixel is the lower neighbour.
        at = torch.arange(size, dtype=torch.float32, device=images.device) * (length / size)
        low = at.long()
        return low, (low + 1).clamp_max(length - 1), at - low

    def lerp(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return a + (b - a) * weight

    x = images.float()
    left, right, across = neighbours(x.shape[3])
    x = lerp(x[..., left], x[..., right], across)
    top, bottom, down = neighbours(x.shape[2])
    return lerp(x[:, :, top], x[:, :, bottom], down[:, None])


def _torch(mode: str, antialias: bool) -> Callable[[torch.Tensor, int], torch.Tensor]:
    def apply(images: torch.Tensor, size: int) -> torch.Tensor:
        return F.interpolate(images.float(), (size, size), mode=mode, align_corners=False, antialias=antialias)

    return apply


def _pil_bicubic(images: torch.Tensor, size: int) -> torch.Tensor:
    from PIL import Image

    planes = images.flatten(0, 1).cpu().numpy().astype(np.float32)  # two-dimensional float32 is Pillow's mode F
    resized = np.empty((len(planes), size, size), np.float32)
    for plane, target in zip(planes, resized, strict=True):
        target[:] = Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC)
    resized = resized.clip(0, 255)  # bicubic overshoots at edges, and clean-fid cuts that off
    return torch.from_numpy(resized).unflatten(0, images.shape[:2]).to(images.device)


@dataclass(frozen=True)
class Filter:
    """One way to bring images to the input size of an extractor.

    Attributes:
        name: registered name.
        summary: one line.
        used_by: tools whose numbers it reproduces.
        apply: (uint8 (N, C, H, W), S) → float32 (N, C, S, S), levels 0 to 255.
        inception_grey: the level g that Inception-v3 sees as 0 in those tools; its input is (x − g) / g.
    """

    name: str
    summary: str
    used_by: tuple[str, ...]
    apply: Callable[[torch.Tensor, int], torch.Tensor]
    inception_grey: float = 128.0


FILTERS = {
    record.name: record
    for record in (
        Filter(
            "tf1-bilinear",
            "TensorFlow 1 bilinear: no antialias, no half-pixel centres",
            ("torch-fidelity", "EDM", "StyleGAN", "torchmetrics with antialias=False"),
            _tf1_bilinear,
        ),
        Filter(
            "bilinear",
            "torch bilinear: no antialias, half-pixel centres",
            ("pytorch-fid",),
            _torch("bilinear", antialias=False),
            inception_grey=127.5,
        ),
        Filter(
            "bilinear-antialias",
            "torch bilinear with antialias",
            ("torchmetrics",),
            _torch("bilinear", antialias=True),
        ),
        Filter(
            "bicubic-antialias",
            "torch bicubic with antialias, overshoot kept",
            ("EDM2 for DINOv2",),
            _torch("bicubic", antialias=True),
        ),
        Filter(
            "pil-bicubic",
            "Pillow bicubic per channel in float, cut to 0–255, never rounded to bytes; runs on the CPU",
            ("clean-fid",),
            _pil_bicubic,
        ),
    )
}


def get_filter(name: str) -> Filter:
    """Return the filter with a registered name.

    Raises:
        UsageError: the name is not registered.
    """
    if name not in FILTERS:
        raise unknown("resize filter", name, FILTERS)
    return FILTERS[name]


def resize(images: torch.Tensor, size: int, filter: str) -> torch.Tensor:
    """Resize a batch to a square, without rounding to bytes.

    Args:
        images: uint8 (N, C, H, W).
        size: side S of the result.
        filter: a name in `FILTERS`.

    Returns:
        float32 (N, C, S, S), levels 0 to 255; "bicubic-antialias" overshoots slightly.

    Raises:
        UsageError: the filter is not registered.
    """
    return get_filter(filter).apply(images, size)
