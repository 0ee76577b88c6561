"""Fréchet distance between normal distributions (Dowson & Landau 1982; FID: Heusel et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ...core.errors import DataError, NumericalError, UsageError
from ...core.rng import KeyedRandom
from ..groups import assign_groups, stratified_order
from ..jackknife import Estimate, combine, enough, ratios
from .checks import checked

if TYPE_CHECKING:
    from ..moments import GroupedMoments

NEGATIVE_TOLERANCE = 1e-6  # eigenvalues below −tolerance·trace are not rounding
_LOST = 1e-13  # share of the trace that rounding may take
_BLOCK = 256


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean (d,) and covariance (d, d), float64, and a bound on the covariance's rank (N−1 for N samples) if known."""

    mu: torch.Tensor
    sigma: torch.Tensor
    rank: int | None = None

    @cached_property
    def cholesky(self) -> tuple[torch.Tensor | None, int]:
        """Cholesky factor of the covariance, or None if it is singular; and a guess of its rank."""
        d = len(self.mu)
        if self.rank is not None and self.rank < d:
            return None, self.rank
        factor, failed = torch.linalg.cholesky_ex(self.sigma)
        return (None, int(failed) - 1) if int(failed) else (factor, d)

    @cached_property
    def factor(self) -> torch.Tensor:
        """F (d, r) with F·Fᵀ = Σ; computed once, it serves every distance to this distribution.

        The lower triangular Cholesky factor, or for a singular Σ its scaled eigenvectors to eigenvalues that are not
        rounding; r ≤ d is then the numerical rank.

        Raises:
            NumericalError: an eigenvalue below −1e-6·trace.
        """
        factor, rank = self.cholesky
        if factor is not None:
            return factor
        # Σ·Ω with random Ω (d, r) spans the range of a Σ of rank r: an eigenproblem of size r remains.
        d, trace = len(self.mu), self.sigma.trace()
        probe = KeyedRandom(0).normal("range of a covariance", 0, 0, d, (rank,)).to(self.sigma)
        basis = torch.linalg.qr(self.sigma @ probe).Q
        values, vectors = torch.linalg.eigh(basis.T @ self.sigma @ basis)
        if bool((values.sum() - trace).abs() > _LOST * trace.abs()):  # the guess was too low
            basis, (values, vectors) = None, torch.linalg.eigh(self.sigma)
        roots = _clamped_sqrt(values, "covariance")
        kept = _above_rounding(values)
        scaled = vectors[:, kept] * roots[kept]
        return scaled if basis is None else basis @ scaled


def distance(fixed: Gaussian, other: Gaussian) -> float:
    """‖μ₁−μ₂‖² + Tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½), symmetric in its arguments; the factor of ``fixed`` is reused.

    Tr (Σ₁Σ₂)^½ is the sum of the square roots of the eigenvalues of the symmetric Fᵀ·Σ₂·F with Σ₁ = F·Fᵀ: no complex
    numbers and no ε on the diagonal. Of N ≤ d samples the N−1 largest count: the others are 0 but for rounding.

    Raises:
        NumericalError: a covariance with an eigenvalue below −1e-6·trace.
    """
    values = torch.linalg.eigvalsh(_congruence(fixed.factor, other.sigma))
    roots = _clamped_sqrt(values, "covariance product")
    suspicious = other.rank is None and not bool(_above_rounding(values).all())
    if suspicious and fixed.cholesky[0] is not None and other.cholesky[0] is None:
        return distance(other, fixed)  # whose narrower factor spares square roots of rounding errors
    cross = roots if other.rank is None else roots[max(len(roots) - other.rank, 0) :]
    mean_term = (fixed.mu - other.mu).square().sum()
    return max(float(mean_term + fixed.sigma.trace() + other.sigma.trace() - 2.0 * cross.sum()), 0.0)


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


def frechet_estimate(
    fake: GroupedMoments | Gaussian, real: GroupedMoments | Gaussian, interval: bool = True
) -> Estimate:
    """Distance between two sides with its uncertainty; a `Gaussian` side (statistics file) counts as exact.

    No interval and no correction is given when both sides are exact, or a sampled side has too few samples: no more
    than features, where the bias is no longer a series in 1/N and the jackknife fails, or see `jackknife.enough`.

    Args:
        interval: compute the distances with one group deleted, 10 more per sampled side.

    Raises:
        DataError: a side with fewer than 2 samples, or sides with features of different lengths.
        NumericalError: see `distance`.
    """
    whole_fake, whole_real = (side if isinstance(side, Gaussian) else side.total().gaussian() for side in (fake, real))
    if len(whole_fake.mu) != len(whole_real.mu):
        raise DataError(
            f"The fake features have length {len(whole_fake.mu)}, the real ones {len(whole_real.mu)}; use one extractor."
        )
    value = distance(whole_real, whole_fake)
    sampled = [(s, o) for s, o in ((fake, whole_real), (real, whole_fake)) if not isinstance(s, Gaussian)]
    usable = all(side.count > side.num_features and enough(_sizes(side)) for side, _ in sampled)
    if not interval or not usable:
        return Estimate(value)
    return combine(value, [(_deleted(side, other), ratios(_sizes(side))) for side, other in sampled])


def _sizes(side: GroupedMoments) -> list[int]:
    """Of the groups that have samples."""
    return [count for count in side.counts if count]


def _deleted(side: GroupedMoments, other: Gaussian) -> list[float]:
    return [distance(other, side.without(index).gaussian()) for index, count in enumerate(side.counts) if count]


def fd_infinity(
    fake_features: torch.Tensor,
    real: Gaussian,
    points: int = 15,
    seed: int = 0,
    labels: torch.Tensor | None = None,
    interval: bool = True,
) -> Estimate:
    """Distance extrapolated to infinitely many fake images (Chong & Forsyth 2020, section 3).

    Distances of `points` random subsets without replacement, of sizes evenly spaced from max(N/10, min(5000, N/2)) to
    N, against 1/size: the intercept of the least-squares line. The line holds where the smallest subset is well above
    d. The interval is the delete-group jackknife of the whole fit, the subsets fixed; it leaves out the error of the
    real side's moments and the choice of subsets.

    Args:
        fake_features: (N, d), N ≥ 20.
        real: the other side, which counts as exact; its own bias stays in the value.
        points: subsets, at least 3.
        seed: of the subsets.
        labels: (N,) classes whose proportions were fixed, see `assign_groups`.
        interval: fit 10 more lines, each without one group.

    Raises:
        UsageError: fewer than 3 points.
        DataError: fewer than 20 fake images, or features or labels that do not fit.
        NumericalError: non-finite features.
    """
    from ..moments import GroupedMoments  # which needs Gaussian

    if points < 3:
        raise UsageError(f"A line needs at least 3 points to be judged, got {points}.")
    features = checked(fake_features, least=20, what="fake features")
    count, d = features.shape
    if d != len(real.mu):
        raise DataError(f"The fake features have length {d}, the real ones {len(real.mu)}; use one extractor.")
    groups = assign_groups(labels, count)
    smallest = max(count // 10, min(5000, count // 2))
    sizes: list[list[int]] = []
    values: list[list[float]] = []
    for step, size in enumerate(torch.linspace(smallest, count, points).round().long().tolist()):
        chosen = stratified_order(labels, count, KeyedRandom(seed), "FD infinity", step)[:size]
        part = GroupedMoments(d).update(features[chosen.to(features.device)], groups[chosen])
        sizes.append([size] + [size - left_out for left_out in _sizes(part)])
        values.append([distance(real, part.total().gaussian())] + (_deleted(part, real) if interval else []))
    lines = zip(zip(*sizes, strict=True), zip(*values, strict=True), strict=False)  # of all, then without each group
    value, *deleted = [_intercept(*line) for line in lines]
    if not interval:
        return Estimate(value)
    note = " of the fit; the real side counts as exact"
    return combine(value, [(deleted, ratios(groups.bincount().tolist()))], unbiased=True, note=note)


def _intercept(sizes: tuple[int, ...], values: tuple[float, ...]) -> float:
    x, y = 1.0 / torch.tensor(sizes, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(y.mean() - slope * x.mean())


def _congruence(factor: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Fᵀ·Σ·F; of a square, lower triangular F only the lower half, with 5/12 of the multiplications for large d."""
    d, r = factor.shape
    if r < d or d <= _BLOCK:
        return factor.T @ sigma @ factor
    half, result = torch.empty_like(sigma), torch.zeros_like(sigma)  # Fᵀ·Σ, and the upper half of what is wanted
    for start in range(0, d, _BLOCK):
        block = slice(start, start + _BLOCK)
        torch.mm(factor[start:, block].T, sigma[start:], out=half[block])
    for start in range(0, d, _BLOCK):
        end = min(start + _BLOCK, d)
        torch.mm(half[:end, start:], factor[start:, start:end], out=result[:end, start:end])
    return result.T  # LAPACK's order of elements


def _above_rounding(values: torch.Tensor) -> torch.Tensor:
    """Which of the ascending eigenvalues (n,) are more than rounding errors of a zero."""
    return values > values[-1:] * len(values) * torch.finfo(values.dtype).eps


def _clamped_sqrt(values: torch.Tensor, what: str) -> torch.Tensor:
    if values.numel() and float(values.min()) < -NEGATIVE_TOLERANCE * float(values.abs().sum()):
        raise NumericalError(f"The {what} has the eigenvalue {float(values.min()):.3g}: not positive semidefinite.")
    return values.clamp_min(0.0).sqrt()
