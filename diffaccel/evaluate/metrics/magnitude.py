"""The magnitude score: how much of a set of latents has diverged.

Wizadwongsa et al. 2024, Diffusion Sampling with Momentum for Mitigating Divergence Artifacts (arXiv 2307.11118),
section 5.1: solvers that leave their region of stability under strong guidance leave spots of extreme latent values.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional

from ...core.errors import DataError, UsageError

# Statistics of Stable Diffusion 1.x latents of COCO images, per channel, as in the authors' code.
LATENT_MEAN = (0.1455953, -0.10772908, 0.023680864, 0.045954444)
LATENT_STD = (0.9220753, 1.0913924, 0.73026365, 0.72270846)


def magnitude_score(
    latents: torch.Tensor,
    mean: Sequence[float] = LATENT_MEAN,
    std: Sequence[float] = LATENT_STD,
    threshold: float = 3.0,
    cell: int = 4,
) -> torch.Tensor:
    """Mean over cells of the largest normalised magnitude, counting those at or above the threshold only.

    Channels are normalised, the magnitude of a pixel is that of its largest channel, cells of ``cell``² pixels keep
    their maximum, and what is below the threshold becomes 0. 0 means no outliers; lower is better.

    Args:
        latents: (B, C, H, W), H and W at least ``cell``; pixels too, with their own statistics.
        mean, std: C values each, std positive; default: Stable Diffusion 1.x.
        threshold: in standard deviations.
        cell: pixels along the side of a cell.

    Returns:
        (B,) float32 scores, ≥ 0; infinite or NaN where the latents are.

    Raises:
        DataError: latents of another shape or number of channels.
        UsageError: a std that is not positive, or a cell below 1.
    """
    if cell < 1 or min(std) <= 0:
        raise UsageError(f"cell must be at least 1 and std positive; got cell={cell}, std={tuple(std)}.")
    if latents.ndim != 4 or latents.shape[1] != len(mean) or min(latents.shape[2:]) < cell:
        raise DataError(
            f"Latents must be (B, {len(mean)}, H, W) with H and W of at least {cell}; got {tuple(latents.shape)}. "
            "Pass the mean and std of your own model's channels if it has others."
        )
    shape = (1, -1, 1, 1)
    centre, scale = (torch.tensor(values, device=latents.device).reshape(shape) for values in (mean, std))
    magnitude = ((latents.float() - centre) / scale).abs().amax(dim=1, keepdim=True)
    pooled = functional.max_pool2d(magnitude, cell)
    return torch.where(pooled < threshold, 0.0, pooled).mean(dim=(1, 2, 3))
