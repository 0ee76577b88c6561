"""Uncertainty of a Fréchet distance: the delete-group jackknife on both sampled sides.

The plug-in distance is biased upwards by about a/N + b/M, and a bootstrap with replacement makes that worse. Deleting
one of K groups from one side at a time gives T₍₋ₖ₎, and with hₖ = N/nₖ (Busing, Meijer & van der Leeden 1999; for equal
groups this is the textbook jackknife)

    bias = Σₖ (1 − 1/hₖ)·T₍₋ₖ₎ − (K−1)·T          variance = 1/K · Σₖ (pₖ − p̄)² / (hₖ − 1),  pₖ = hₖ·T − (hₖ−1)·T₍₋ₖ₎

where p̄ = T − bias. Both sides are independent samples, so biases add and variances add:

    corrected = T − bias_fake − bias_real          interval = corrected ± t₀.₉₇₅(ν) · √(variance_fake + variance_real)

with ν from Welch–Satterthwaite. A side given as a statistics file counts as exact: the error of its own sample is
neither corrected nor in the interval. The corrected value may be slightly negative when the truth is near 0.
Groups must be drawn as the sample was: where the classes of a side are known, their mix is kept in every group.
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch

from ..core.rng import KeyedRandom
from .metrics.frechet import Gaussian, distance
from .moments import Moments

GROUPS = 10
_BUFFER_ROWS = 1024


class GroupedMoments:
    """Moments of K groups of a stream of features: all that a delete-group jackknife needs, O(K·d²) memory.

    Of every K consecutive samples of a class each group gets one, in an order drawn from their index. Groups therefore
    have the same mix of classes, are even in size, do not depend on the batch size, and do not line up with a pattern.
    """

    def __init__(self, num_features: int, groups: int = GROUPS):
        self.count = 0
        self.parts = [Moments(num_features) for _ in range(groups)]
        self._seen: Counter[int] = Counter()  # per class
        self._features: list[torch.Tensor] = []
        self._groups: list[torch.Tensor] = []
        self._waiting = 0

    def update(self, features: torch.Tensor, labels: torch.Tensor | None = None) -> "GroupedMoments":
        """Add features (n, d) in sample order; returns self.

        Args:
            labels: (n,) classes of a sample whose class proportions were fixed (labels in turn, a stratified split).
                None means independent draws; a fixed mix without labels has too much bias removed.
        """
        labels = torch.zeros(len(features), dtype=torch.long) if labels is None else labels.cpu()
        self._features.append(features.detach().cpu())
        self._groups.append(self._assign(labels))
        self.count += len(features)
        self._waiting += len(features)
        if self._waiting >= _BUFFER_ROWS:  # rank-k updates of a d×d matrix pay off only for large k
            self._flush()
        return self

    def _assign(self, labels: torch.Tensor) -> torch.Tensor:
        groups, assigned = len(self.parts), torch.empty(len(labels), dtype=torch.long)
        for label in labels.unique().tolist():
            members = (labels == label).nonzero().flatten()
            index = self._seen[label] + torch.arange(len(members))  # of the sample within its class
            self._seen[label] += len(members)
            block, first = index // groups, int(index[0]) // groups
            uniform = KeyedRandom(0).uniform("jackknife group", 0, first, int(block[-1]) - first + 1, (groups,))
            order = uniform.argsort(dim=1, stable=True)
            # Classes start at different places of one order, so that their remainders fill different groups.
            assigned[members] = order[block - first, (index + label) % groups]
        return assigned

    def _flush(self) -> None:
        if self._waiting:
            features, groups = torch.cat(self._features), torch.cat(self._groups)
            for index, part in enumerate(self.parts):
                part.update(features[groups == index])
            self._features, self._groups, self._waiting = [], [], 0

    def total(self) -> Moments:
        """Moments of all samples."""
        self._flush()
        return self.parts[0].merge(*self.parts[1:])

    def without(self, index: int) -> Moments:
        """Moments of all samples but those of one group."""
        self._flush()
        rest = self.parts[:index] + self.parts[index + 1 :]
        return rest[0].merge(*rest[1:])


@dataclass(frozen=True)
class FrechetEstimate:
    """A Fréchet distance: plug-in value, jackknife-corrected value and 95 % interval (None where not available)."""

    value: float
    bias_corrected: float | None = None
    ci95: tuple[float, float] | None = None


def estimate(fake: GroupedMoments | Gaussian, real: GroupedMoments | Gaussian) -> FrechetEstimate:
    """Distance between two sides with its uncertainty; a `Gaussian` side (statistics file) counts as exact.

    No interval is given when both sides are exact, or a sampled side has too few samples (see `enough`).

    Raises:
        DataError: a side with fewer than 2 samples.
        NumericalError: see `frechet.distance`.
    """
    whole_fake, whole_real = (side if isinstance(side, Gaussian) else side.total().gaussian() for side in (fake, real))
    value = distance(whole_real, whole_fake)
    sampled = [(s, o) for s, o in ((fake, whole_real), (real, whole_fake)) if isinstance(s, GroupedMoments)]
    if not sampled or not all(enough(side) for side, _ in sampled):
        return FrechetEstimate(value)
    terms = [_one_side(value, side, other) for side, other in sampled]
    corrected = value - sum(bias for bias, _, _ in terms)
    variance = sum(variance for _, variance, _ in terms)
    spread = sum(variance**2 / freedom for _, variance, freedom in terms)
    freedom = variance**2 / spread if spread > 0 else terms[0][2]
    half = student_t_975(freedom) * math.sqrt(variance)
    return FrechetEstimate(value, corrected, (corrected - half, corrected + half))


def enough(side: GroupedMoments) -> bool:
    """Whether a jackknife is possible: 2 samples per group on average, and no group empty."""
    return side.count >= 2 * len(side.parts) and all(part.count > 0 for part in side.parts)


def _one_side(value: float, side: GroupedMoments, other: Gaussian) -> tuple[float, float, int]:
    """(bias, variance, degrees of freedom) that the sampling of one side contributes."""
    groups = len(side.parts)
    deleted = [distance(other, side.without(index).gaussian()) for index in range(groups)]
    ratios = [side.count / part.count for part in side.parts]
    bias = sum((1 - 1 / h) * t for h, t in zip(ratios, deleted, strict=True)) - (groups - 1) * value
    pseudo = [h * value - (h - 1) * t for h, t in zip(ratios, deleted, strict=True)]
    squares = ((p - (value - bias)) ** 2 / (h - 1) for h, p in zip(ratios, pseudo, strict=True))
    return bias, sum(squares) / groups, groups - 1


def student_t_975(freedom: float) -> float:
    """97.5 % quantile of Student's t by its expansion in 1/ν (Fisher & Cornish 1960); within 3e-4 for ν ≥ 9."""
    z = 1.959963984540054
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
