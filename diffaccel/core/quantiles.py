"""Quantiles of the Beta distribution, without scipy."""

import math

import torch

from .errors import UsageError

_TERMS = 64  # the series converges like 2⁻ⁿ


def beta_quantile(p, shape: float) -> torch.Tensor:
    """Inverse distribution function of the symmetric Beta(shape, shape), accurate to about 1e-15.

    For x ≤ 1/2 the incomplete beta function is x^a·Σ (1−a)_n/(n!·(a+n))·xⁿ, a = shape, whose terms are all positive. As
    a function of x^a it is increasing and convex, so Newton's method from the right cannot overshoot. Larger quantiles
    follow from the symmetry.

    Args:
        p: probabilities in [0, 1], any shape.
        shape: in (0, 1]; 1/2 is the arcsine, 1 the uniform distribution.

    Returns:
        float64 quantiles in [0, 1], in the shape of p.

    Raises:
        UsageError: a shape outside (0, 1].
    """
    if not 0.0 < shape <= 1.0:
        raise UsageError(f"The shape of the Beta distribution must lie in (0, 1]; got {shape!r}.")
    p = torch.as_tensor(p, dtype=torch.float64)
    smaller = torch.minimum(p, 1.0 - p)
    coefficients = [1.0 / shape]
    rising = 1.0  # (1−a)_n/n!
    for n in range(1, _TERMS):
        rising *= (n - shape) / n
        coefficients.append(rising / (shape + n))
    weights = torch.tensor(coefficients, dtype=torch.float64)
    degrees = torch.arange(_TERMS, dtype=torch.float64)
    target = smaller * math.exp(2.0 * math.lgamma(shape) - math.lgamma(2.0 * shape))  # incomplete beta at the quantile
    power = target * shape  # x^a by the first term alone: too far right
    for _ in range(10):
        x = power.clamp(max=1.0) ** (1.0 / shape)
        terms = weights * x.unsqueeze(-1) ** degrees
        value = power * terms.sum(-1)
        slope = (terms * (1.0 + degrees / shape)).sum(-1)
        power = power - (value - target) / slope
    x = power ** (1.0 / shape)
    return torch.where(p <= 0.5, x, 1.0 - x)
