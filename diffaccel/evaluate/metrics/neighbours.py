"""Precision and recall by nearest neighbours (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020)."""

import torch

from ...core.errors import DataError, UsageError
from ..jackknife import Estimate, normal_interval, wilson_interval
from .checks import checked_pair

_CHUNK = 256
_ROUNDING = 1e-13  # of squared distances, relative to squared lengths: about 450 ε


def prdc(fake: torch.Tensor, real: torch.Tensor, k: int = 5, chunk: int = _CHUNK) -> dict[str, Estimate]:
    """How much of each side lies in the balls of the other: {"precision", "recall", "density", "coverage"}.

    The ball of a point reaches up to its k-th neighbour on its own side, not counting itself, without the rim.
    Precision: share of fake points in a real ball. Recall: share of real points in a fake ball. Density: real balls
    that a fake point lies in, divided by k; can exceed 1. Coverage: share of real balls with a fake point in them.

    Distances that differ by no more than rounding (3e-7 of the length of centred features) count as equal, so results
    do not depend on `chunk`. A point is always in the ball of its exact copy, even where k or more duplicates make the
    radius 0; there the ball would otherwise be empty.

    The intervals (Wilson; normal for density) are for the sampling of the points that are averaged over, the balls
    given.

    Args:
        fake, real: features (N, d) and (M, d).
        k: neighbours, below N and M.
        chunk: rows of the distance matrix in memory at a time.

    Raises:
        UsageError: k below 1.
        DataError: k not below the number of images of a side, or features that do not fit.
        NumericalError: non-finite features.
    """
    if k < 1:
        raise UsageError(f"k must be at least 1, got {k}.")
    fake, real = checked_pair(fake, real)
    if k >= min(len(fake), len(real)):
        raise DataError(
            f"k = {k} neighbours need more than {k} images on both sides, got {len(fake)} fake and {len(real)} real."
        )
    centre = real.mean(0)  # small numbers, small rounding errors
    fake, real = fake - centre, real - centre
    fake_limits, real_limits = _limits(fake, k, chunk), _limits(real, k, chunk)
    depth = torch.zeros(len(fake), dtype=torch.float64, device=fake.device)  # real balls that a fake point lies in
    recalled = covered = 0
    for points, limits in zip(real.split(chunk), real_limits.split(chunk), strict=True):
        squares = _squared_distances(points, fake)
        inside = squares < limits[:, None]
        depth += inside.sum(0)
        covered += int(inside.any(1).sum())
        recalled += int((squares < fake_limits).any(1).sum())
    return {
        "precision": wilson_interval(int((depth > 0).sum()), len(fake), ", the real side as given"),
        "recall": wilson_interval(recalled, len(real), ", the fake side as given"),
        "density": normal_interval(depth / k, ", the real side as given"),
        "coverage": wilson_interval(covered, len(real), ", the fake side and the radii as given"),
    }


def _squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.addmm(y.square().sum(1)[None], x, y.T, alpha=-2.0).add_(x.square().sum(1)[:, None])


def _limits(side: torch.Tensor, k: int, chunk: int) -> torch.Tensor:
    """Squared distances (N,) below which a point counts as inside."""
    parts = []
    for points in side.split(chunk):
        squares = _squared_distances(points, side).topk(k + 1, dim=1, largest=False).values[:, -1]
        slack = _ROUNDING * (points.square().sum(1) + squares.clamp_min(0.0))
        parts.append(torch.maximum(squares - slack, slack))
    return torch.cat(parts)
