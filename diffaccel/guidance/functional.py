"""Guidance as arithmetic on predictions.

c and u are the predictions with and without the condition, (B, …), all of one parametrisation and dtype. Norms and inner
products are per sample over all other axes, so a sample does not depend on its batch.
"""

import torch


def _axes(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """⟨a, b⟩ per sample, (B, 1, …), float64 where the device has it."""
    wide = torch.float32 if a.device.type in ("mps", "npu") else torch.float64
    return (a.to(wide) * b.to(wide)).sum(_axes(a), keepdim=True)


def norm(a: torch.Tensor) -> torch.Tensor:
    """Euclidean norm per sample, (B, 1, …), float64 where the device has it."""
    return inner(a, a).sqrt()


def projection(a: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
    """The part of a parallel to ``onto``; 0 where ``onto`` is 0."""
    square = inner(onto, onto)
    share = torch.where(square > 0, inner(a, onto) / square.clamp_min(torch.finfo(square.dtype).tiny), 0.0)
    return (share * onto).to(a.dtype)


def classifier_free(c: torch.Tensor, u: torch.Tensor, scale: float) -> torch.Tensor:
    """u + scale·(c − u) (Ho & Salimans 2022, in the scale of diffusers: 1 is c)."""
    return u + scale * (c - u)


def capped(difference: torch.Tensor, norm_threshold: float | None) -> torch.Tensor:
    """The difference, shortened to the norm threshold where it is longer (Sadat et al. 2025, algorithm 1); None for no cap."""
    if norm_threshold is None:
        return difference
    length = norm(difference).clamp_min(norm_threshold)  # the ratio is 1 where the cap does not act, also for 0
    return (difference * (norm_threshold / length)).to(difference.dtype)


def projected(difference: torch.Tensor, onto: torch.Tensor, eta: float) -> torch.Tensor:
    """The difference with its part parallel to ``onto`` multiplied by eta (Sadat et al. 2025, algorithm 1)."""
    return difference if eta == 1.0 else difference - (1.0 - eta) * projection(difference, onto)


def rescaled(guided: torch.Tensor, c: torch.Tensor, factor: float) -> torch.Tensor:
    """Blend with the guided prediction brought to the standard deviation of c (Lin et al. 2023, section 3.4)."""
    deviation = guided.std(_axes(c), keepdim=True)
    ratio = torch.where(deviation > 0, c.std(_axes(c), keepdim=True) / deviation, 1.0)
    return factor * (guided * ratio) + (1.0 - factor) * guided


def zero_star(c: torch.Tensor, u: torch.Tensor, scale: float) -> torch.Tensor:
    """s·u + scale·(c − s·u) with s·u the projection of c onto u (Fan et al. 2025, CFG-Zero*)."""
    return classifier_free(c, projection(c, u), scale)


def perpendicular_negatives(
    c: torch.Tensor, u: torch.Tensor, negatives: list[torch.Tensor], weights: list[float], scale: float
) -> torch.Tensor:
    """u + scale·(p − Σ wᵢ·nᵢ⊥), p = c − u, nᵢ⊥ the part of negativeᵢ − u perpendicular to p (Armandpour et al. 2023, Perp-Neg).

    u must be the prediction for the empty prompt, not for a negative one.
    """
    positive = c - u
    direction = positive
    for negative, weight in zip(negatives, weights, strict=True):
        direction = direction - weight * projected(negative - u, positive, 0.0)
    return u + scale * direction
