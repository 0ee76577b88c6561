"""Whether losses of single removals add up to those of joint ones, which a knapsack takes for granted (as LAPTOP-Diff does)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..core.errors import UsageError
from ..core.rng import KeyedRandom


@dataclass(frozen=True)
class Additivity:
    """Random sets of operators.

    Attributes:
        subsets: names.
        sums: of the losses of each alone.
        joints: losses of all removed at once.
    """

    subsets: tuple[tuple[str, ...], ...]
    sums: tuple[float, ...]
    joints: tuple[float, ...]

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation of sums with joint losses, in [−1, 1]; not a number where one of them is constant."""
        return rank_correlation(self.sums, self.joints)


def check_additivity(
    criterion,
    scores: Mapping[str, float],
    count: int = 40,
    largest: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Additivity:
    """Compare summed losses with joint ones on random sets of operators.

    Args:
        criterion: a `criteria.Criterion`.
        scores: of single operators, by the same; those that are not finite are left out.
        count: sets.
        largest: most operators of a set; None for a third of all. Sizes are uniform in 2 … largest.
        seed: of the sets.
        progress: told (number done, count).

    Raises:
        UsageError: less than two operators to combine, or a number of sets below 2.
    """
    names = [name for name, value in scores.items() if math.isfinite(value)]
    largest = max(2, len(names) // 3) if largest is None else largest
    if len(names) < 2 or count < 2 or largest < 2:
        raise UsageError(
            f"Additivity is checked on 2 sets or more of 2 operators or more; got {len(names)} operators, {count} sets "
            f"and at most {largest} in one."
        )
    subsets, joints = [], []
    for index in range(count):
        subsets.append(_draw(names, largest, KeyedRandom(seed), index))
        joints.append(criterion.loss(subsets[-1]))
        if progress:
            progress(index + 1, count)
    sums = tuple(sum(scores[name] for name in subset) for subset in subsets)
    return Additivity(tuple(subsets), sums, tuple(joints))


def rank_correlation(left, right) -> float:
    """Spearman's rank correlation; equal values share their mean rank. Not a number where one side is constant."""
    ranks = [_ranks(np.asarray(values, dtype=float)) for values in (left, right)]
    ranks = [one - one.mean() for one in ranks]
    norm = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float(ranks[0] @ ranks[1]) / norm if norm else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    return ((ends - sizes + ends - 1) / 2.0)[group]


def _draw(names: list[str], largest: int, random: KeyedRandom, index: int) -> tuple[str, ...]:
    """Names none of which lies inside another."""
    size = 2 + int(random.integers("additivity/size", index, 0, 1, largest - 1))
    chosen: list[str] = []
    for place in random.permutation("additivity", index, len(names)).tolist():
        name = names[place]
        if len(chosen) < size and not any(nested(name, other) for other in chosen):
            chosen.append(name)
    return tuple(chosen)


def nested(one: str, other: str) -> bool:
    """Whether one of two modules is or contains the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")
