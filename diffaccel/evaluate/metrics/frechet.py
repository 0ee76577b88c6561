"""Fréchet distance between normal distributions (Dowson & Landau 1982; FID: Heusel et al. 2017)."""

from dataclasses import dataclass
from functools import cached_property

import torch

from ...core.errors import DataError, NumericalError

NEGATIVE_TOLERANCE = 1e-6  # eigenvalues below −tolerance·trace are not rounding


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean (d,) and covariance (d, d), float64."""

    mu: torch.Tensor
    sigma: torch.Tensor

    @cached_property
    def root(self) -> torch.Tensor:
        """Symmetric square root of the covariance; computed once, it serves every distance to this distribution."""
        values, vectors = torch.linalg.eigh(self.sigma)
        return (vectors * _clamped_sqrt(values, "covariance")) @ vectors.T


def distance(fixed: Gaussian, other: Gaussian) -> float:
    """‖μ₁−μ₂‖² + Tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½), symmetric in its arguments; the square root of ``fixed`` is reused.

    Tr (Σ₁Σ₂)^½ is the sum of the square roots of the eigenvalues of the symmetric Σ₁^½·Σ₂·Σ₁^½: no complex numbers, no
    ε on the diagonal, and rank-deficient covariances (N ≤ d) need no special case.

    Raises:
        NumericalError: a covariance with an eigenvalue below −1e-6·trace.
    """
    product = fixed.root @ other.sigma @ fixed.root
    values = torch.linalg.eigvalsh((product + product.T) / 2)
    cross = _clamped_sqrt(values, "covariance product").sum()
    mean_term = (fixed.mu - other.mu).square().sum()
    return max(float(mean_term + fixed.sigma.trace() + other.sigma.trace() - 2.0 * cross), 0.0)


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """Fréchet distance from means (d,) and covariances (d, d), arrays or tensors; computed in float64.

    Raises:
        DataError: shapes that do not belong together.
        NumericalError: non-finite values, or a matrix that is not a covariance.
    """
    mu1, sigma1, mu2, sigma2 = (
        torch.as_tensor(part, dtype=torch.float64, device="cpu") for part in (mu1, sigma1, mu2, sigma2)
    )
    d = mu1.numel()
    if mu1.shape != (d,) or mu2.shape != (d,) or sigma1.shape != (d, d) or sigma2.shape != (d, d):
        shapes = ", ".join(str(tuple(part.shape)) for part in (mu1, sigma1, mu2, sigma2))
        raise DataError(f"frechet_distance needs (d,), (d, d), (d,), (d, d); got {shapes}.")
    if not all(bool(torch.isfinite(part).all()) for part in (mu1, sigma1, mu2, sigma2)):
        raise NumericalError("A mean or covariance contains NaN or infinite values.")
    return distance(Gaussian(mu1, sigma1), Gaussian(mu2, sigma2))


def _clamped_sqrt(values: torch.Tensor, what: str) -> torch.Tensor:
    if float(values.min()) < -NEGATIVE_TOLERANCE * float(values.abs().sum()):
        raise NumericalError(f"The {what} has the eigenvalue {float(values.min()):.3g}: not positive semidefinite.")
    return values.clamp_min(0.0).sqrt()
