"""Squared maximum mean discrepancy of features: KID (Bińkowski et al. 2018) and CMMD (Jayasumana et al. 2024)."""

from collections.abc import Callable
from functools import partial

import torch

from ...core.errors import DataError, NumericalError, UsageError
from ...core.rng import KeyedRandom
from ..groups import GROUPS, assign_groups
from ..jackknife import Estimate, combine, enough, ratios
from .checks import checked_pair

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
_CHUNK = 256


def polynomial(x: torch.Tensor, y: torch.Tensor, degree: int = 3, gamma: float | None = None, coef0: float = 1.0):
    """(γ·xᵀy + c)^degree of all pairs of (n, d) and (m, d): (n, m); γ = 1/d by default."""
    gamma = 1.0 / x.shape[1] if gamma is None else gamma
    return (x @ y.T).mul_(gamma).add_(coef0).pow_(degree)


def gaussian(x: torch.Tensor, y: torch.Tensor, sigma: float):
    """exp(−‖x−y‖²/(2σ²)) of all pairs of (n, d) and (m, d): (n, m)."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2.0 * (x @ y.T)
    return squares.clamp_min_(0.0).mul_(-0.5 / sigma**2).exp_()


def mmd2(
    fake: torch.Tensor,
    real: torch.Tensor,
    kernel: Kernel,
    groups_fake: torch.Tensor | None = None,
    groups_real: torch.Tensor | None = None,
    fixed_mix: bool = False,
    chunk: int = _CHUNK,
) -> Estimate:
    """Unbiased MMD² (Gretton et al. 2012, equation 3), with the delete-group jackknife of both sides.

    The values with one group deleted come from sums of the kernel over pairs of groups, so they cost nothing more.
    MMD² of equal distributions is 0, of which this value falls below in half of all samples.

    Args:
        fake, real: features (N, d) and (M, d), N and M at least 2.
        kernel: positive definite, on float64.
        groups_fake, groups_real: (N,) and (M,), see `assign_groups`; None means independent draws.
        fixed_mix: class proportions were fixed and the groups keep them. Then pairs of a class are rarer than among
            independent draws, the value falls too low by about 1/N, and ``bias_corrected`` has the jackknife's correction.
        chunk: rows of the kernel matrix in memory at a time.

    Raises:
        DataError: fewer than 2 images on a side, or shapes that do not fit.
        NumericalError: non-finite features.
    """
    sums = _Sums(*checked_pair(fake, real), kernel, groups_fake, groups_real, chunk)
    return sums.estimate(fixed_mix)


def kid(
    fake: torch.Tensor,
    real: torch.Tensor,
    groups_fake: torch.Tensor | None = None,
    groups_real: torch.Tensor | None = None,
    fixed_mix: bool = False,
    *,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
) -> Estimate:
    """Kernel Inception Distance of all images: `mmd2` with the polynomial kernel; arguments and errors as there."""
    kernel = partial(polynomial, degree=degree, gamma=gamma, coef0=coef0)
    return mmd2(fake, real, kernel, groups_fake, groups_real, fixed_mix)


def kid_subsets(
    fake: torch.Tensor,
    real: torch.Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    replace: bool = False,
) -> tuple[float, float]:
    """The customary KID: mean and standard deviation over random subsets (Bińkowski et al. 2018, section 4).

    The deviation depends on the subset size and shrinks with nothing else: it is no confidence interval.

    Args:
        fake, real: features (N, d) and (M, d).
        subsets, subset_size: how many, and images of each side in one.
        seed: of the subsets; side s of subset i depends on (seed, s, i) and the side's size.
        replace: draw with replacement, which biases the value upwards.

    Raises:
        UsageError: no subsets, or subsets of fewer than 2 images.
        DataError: fewer images than a subset needs, or features that do not fit.
        NumericalError: non-finite features.
    """
    if subsets < 1 or subset_size < 2:
        raise UsageError(f"KID needs at least 1 subset of at least 2 images, got {subsets} of {subset_size}.")
    fake, real = checked_pair(fake, real)
    if subset_size > min(len(fake), len(real)) and not replace:
        raise DataError(f"Subsets of {subset_size} images need as many on both sides; got {len(fake)} and {len(real)}.")
    values = []
    for step in range(subsets):
        parts = [
            side[_subset(seed, name, step, len(side), subset_size, replace).to(side.device)]
            for name, side in (("fake", fake), ("real", real))
        ]
        values.append(_Sums(*parts, polynomial, *[torch.zeros(subset_size, dtype=torch.long)] * 2, _CHUNK).unbiased())
    values = torch.tensor(values, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def cmmd(
    fake: torch.Tensor,
    real: torch.Tensor,
    groups_fake: torch.Tensor | None = None,
    groups_real: torch.Tensor | None = None,
    fixed_mix: bool = False,
) -> Estimate:
    """CLIP-MMD: 1000 · MMD² of embeddings (N, d) scaled to unit length, Gaussian kernel with σ = 10.

    ``value`` follows the published code, whose means include each image paired with itself and are biased upwards;
    ``bias_corrected`` is unbiased and the interval belongs to it. Arguments and errors as `mmd2`.

    Raises:
        NumericalError: an embedding of length 0.
    """
    sides = checked_pair(fake, real)
    lengths = [side.norm(dim=1, keepdim=True) for side in sides]
    if not all(bool((length > 0).all()) for length in lengths):
        raise NumericalError("An embedding is 0 and has no direction; check the images and the extractor.")
    sides = [side / length for side, length in zip(sides, lengths, strict=True)]
    sums = _Sums(*sides, partial(gaussian, sigma=CMMD_SIGMA), groups_fake, groups_real, _CHUNK)
    unbiased = sums.estimate(fixed_mix)
    centre = unbiased.value if unbiased.bias_corrected is None else unbiased.bias_corrected
    interval = unbiased.ci95 and tuple(CMMD_SCALE * end for end in unbiased.ci95)
    return Estimate(CMMD_SCALE * sums.published(), CMMD_SCALE * centre, interval, unbiased.method)


class _Sums:
    """Sums of the kernel over pairs of groups, and over the diagonal, of both sides."""

    def __init__(self, fake, real, kernel: Kernel, groups_fake, groups_real, chunk: int):
        (self.ff, self.f, self.nf, gf), (self.rr, self.r, self.nr, gr) = (
            _within(side, kernel, groups, chunk) for side, groups in ((fake, groups_fake), (real, groups_real))
        )
        self.fr = sum(
            member.T @ (kernel(part, real) @ gr)
            for part, member in zip(fake.split(chunk), gf.split(chunk), strict=True)
        ).cpu()

    def unbiased(self, fake=slice(None), real=slice(None)) -> float:
        """MMD² without pairs of an image with itself, of the groups that are kept."""
        n, m = float(self.nf[fake].sum()), float(self.nr[real].sum())
        ff = (self.ff[fake][:, fake].sum() - self.f[fake].sum()) / (n * (n - 1))
        rr = (self.rr[real][:, real].sum() - self.r[real].sum()) / (m * (m - 1))
        return float(ff + rr - 2 * self.fr[fake][:, real].sum() / (n * m))

    def published(self) -> float:
        """MMD² with those pairs."""
        n, m = float(self.nf.sum()), float(self.nr.sum())
        return float(self.ff.sum() / n**2 + self.rr.sum() / m**2 - 2 * self.fr.sum() / (n * m))

    def estimate(self, fixed_mix: bool) -> Estimate:
        value, counts = self.unbiased(), (self.nf.long().tolist(), self.nr.long().tolist())
        if not all(enough(sizes) for sizes in counts):
            return Estimate(value)
        kept = [[torch.arange(len(sizes)) != index for index in range(len(sizes))] for sizes in counts]
        deleted = [self.unbiased(fake=keep) for keep in kept[0]], [self.unbiased(real=keep) for keep in kept[1]]
        sides = [(d, ratios(sizes)) for d, sizes in zip(deleted, counts, strict=True)]
        return combine(value, sides, unbiased=not fixed_mix)


def _within(side: torch.Tensor, kernel: Kernel, groups: torch.Tensor | None, chunk: int):
    """Block sums (K, K), diagonal sums (K,), sizes (K,) and one-hot membership (N, K) of one side; half the kernel."""
    groups = assign_groups(None, len(side)) if groups is None else groups.cpu()
    if groups.shape != (len(side),):
        raise DataError(f"Got {tuple(groups.shape)} groups for {len(side)} images; every image needs one.")
    member = torch.nn.functional.one_hot(groups, max(GROUPS, int(groups.max()) + 1)).to(side)
    member = member[:, member.any(0)]
    blocks, diagonal = side.new_zeros(member.shape[1], member.shape[1]), side.new_zeros(member.shape[1])
    for start in range(0, len(side), chunk):
        end = start + chunk
        own, later = member[start:end], member[end:]
        rows = kernel(side[start:end], side[start:])
        width = len(own)
        blocks += own.T @ (rows[:, :width] @ own)
        beside = own.T @ (rows[:, width:] @ later)
        blocks += beside + beside.T
        diagonal += rows[:, :width].diagonal() @ own
    return blocks.cpu(), diagonal.cpu(), member.sum(0).cpu(), member


def _subset(seed: int, name: str, step: int, count: int, size: int, replace: bool) -> torch.Tensor:
    random = KeyedRandom(seed)
    if replace:
        return random.integers(f"KID {name} subset", step, 0, size, count)
    return random.permutation(f"KID {name} subset", step, count)[:size]
