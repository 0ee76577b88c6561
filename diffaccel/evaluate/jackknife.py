"""Uncertainty of a statistic of two sampled sides: the delete-group jackknife.

A plug-in statistic such as the Fréchet distance is biased by about a/N + b/M, and a bootstrap with replacement makes
that worse. Deleting one of K groups from one side at a time gives T₍₋ₖ₎, and with hₖ = N/nₖ (Busing, Meijer & van der
Leeden 1999; for equal groups this is the textbook jackknife)

    bias = Σₖ (1 − 1/hₖ)·T₍₋ₖ₎ − (K−1)·T          variance = 1/K · Σₖ (pₖ − p̄)² / (hₖ − 1),  pₖ = hₖ·T − (hₖ−1)·T₍₋ₖ₎

where p̄ = T − bias. Both sides are independent samples, so biases add and variances add:

    corrected = T − bias_fake − bias_real          interval = corrected ± t₀.₉₇₅(ν) · √(variance_fake + variance_real)

with ν from Welch–Satterthwaite. A side that is not deleted from counts as exact: the error of its own sample is
neither corrected nor in the interval. The corrected value may be slightly negative when the truth is near 0.
Groups must be drawn as the sample was: where the classes of a side are known, their mix is kept in every group.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_975 = 1.959963984540054  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty.

    Attributes:
        value: as publications define it.
        bias_corrected: with the bias of a finite sample removed, where the value has one.
        ci95: 95 % interval; None where not available.
        method: how the interval was made, and what it leaves out.
    """

    value: float
    bias_corrected: float | None = None
    ci95: tuple[float, float] | None = None
    method: str | None = None


def enough(counts: Sequence[int]) -> bool:
    """Whether groups of these sizes allow a jackknife: two or more, none empty, 2 samples per group on average."""
    return len(counts) >= 2 and min(counts) > 0 and sum(counts) >= 2 * len(counts)


def ratios(counts: Sequence[int]) -> list[float]:
    """hₖ = N/nₖ of groups of these sizes, none of them 0."""
    return [sum(counts) / count for count in counts]


def combine(
    value: float, sides: Sequence[tuple[Sequence[float], Sequence[float]]], *, unbiased: bool = False, note: str = ""
) -> Estimate:
    """Interval, and correction of the bias, from the values with one group deleted.

    Args:
        value: T of all samples.
        sides: per sampled side the K values T₍₋ₖ₎ and the K ratios N/nₖ; without sides there is no interval.
        unbiased: T has no bias: centre the interval on it and give no corrected value.
        note: what the interval leaves out, added to the method.
    """
    if not sides:
        return Estimate(value)
    terms = [_one_side(value, deleted, h) for deleted, h in sides]
    centre = value if unbiased else value - sum(bias for bias, _, _ in terms)
    variance = sum(variance for _, variance, _ in terms)
    spread = sum(variance**2 / freedom for _, variance, freedom in terms)
    freedom = variance**2 / spread if spread > 0 else terms[0][2]
    half = student_t_975(freedom) * math.sqrt(variance)
    method = f"delete-{len(sides[0][0])}-group jackknife{note}"
    return Estimate(value, None if unbiased else centre, (centre - half, centre + half), method)


def _one_side(value: float, deleted: Sequence[float], h: Sequence[float]) -> tuple[float, float, int]:
    """(bias, variance, degrees of freedom) that the sampling of one side contributes."""
    groups = len(deleted)
    bias = sum((1 - 1 / hk) * t for hk, t in zip(h, deleted, strict=True)) - (groups - 1) * value
    pseudo = [hk * value - (hk - 1) * t for hk, t in zip(h, deleted, strict=True)]
    squares = ((p - (value - bias)) ** 2 / (hk - 1) for hk, p in zip(h, pseudo, strict=True))
    return bias, sum(squares) / groups, groups - 1


def student_t_975(freedom: float) -> float:
    """97.5 % quantile of Student's t by its expansion in 1/ν (Fisher & Cornish 1960); within 3e-4 for ν ≥ 9."""
    z = Z_975
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def normal_interval(values, note: str = "") -> Estimate:
    """Mean of independent values (N,), float64 tensor, with its normal interval; no interval for N = 1."""
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Estimate(mean)
    half = Z_975 * float(values.std()) / math.sqrt(count)
    return Estimate(mean, None, (mean - half, mean + half), f"normal interval{note}")


def wilson_interval(hits: int, count: int, note: str = "") -> Estimate:
    """Share hits/count of independent trials with its score interval, which stays in [0, 1] (Wilson 1927, count ≥ 1)."""
    share, z2 = hits / count, Z_975**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_975 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    # Rounding must not push the share itself out of its interval at 0 and at 1.
    low, high = min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)
    return Estimate(share, None, (low, high), f"Wilson interval{note}")
