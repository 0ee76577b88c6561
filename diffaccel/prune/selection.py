"""Which operators are removed, given what each is worth and how much is to be saved."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ..core.errors import UsageError, unknown
from .additivity import nested
from .survey import COSTS, Candidate, Survey

_BINS = 10_000  # into which the knapsack divides what is to be saved
_NOUNS = {"parameters": "parameters", "macs": "multiply–accumulates", "seconds": "measured time"}


@dataclass(frozen=True)
class Selection:
    """What is to be removed.

    Attributes:
        names: of operators, none inside another, in network order.
        cost: what is counted, one of `survey.COSTS`.
        ratio: share of it that is saved.
        score: sum of their scores; of those chosen by joint losses, see `joint`, the loss without all of them.
    """

    names: tuple[str, ...]
    cost: str
    ratio: float
    score: float


def select(
    survey: Survey, scores: Mapping[str, float], ratio: float, cost: str = "parameters", solver: str = "knapsack"
) -> Selection:
    """Choose operators that together save at least a share of the network's cost, at little loss.

    Args:
        survey: of the network.
        scores: losses by name, lower is better; operators without one, or with one that is not finite, stay.
        ratio: share to be saved, in [0, 1); 0 removes nothing.
        cost: "parameters", "macs", or "seconds" where the survey measured time.
        solver: one of `SOLVERS`.

    Raises:
        UsageError: a ratio out of range or beyond what can be reached, which is named; unknown names.
    """
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    task = Task.of(survey, scores, ratio, cost)
    values = [scores[one.name] for one in task.items]
    chosen = SOLVERS[solver](task.items, task.costs, values, task.target) if ratio else []
    return task.selection([task.items[i].name for i in chosen], sum(values[i] for i in chosen))


@dataclass(frozen=True)
class Task:
    """What is to be saved, and by which operators.

    Attributes:
        survey, cost: of `select`.
        items: candidates that may go and save something, outer before inner.
        costs: what each saves.
        target: what is to be saved, in units of ``costs``.
    """

    survey: Survey
    cost: str
    items: list[Candidate]
    costs: list[float]
    target: float

    @classmethod
    def of(cls, survey: Survey, scores: Mapping[str, float], ratio: float, cost: str) -> "Task":
        """The task of a call of `select`, which says what is raised."""
        if not 0.0 <= ratio < 1.0:
            raise UsageError(f"The ratio is the share to be saved, from 0 to below 1, such as 0.35; got {ratio:g}.")
        if cost not in COSTS:
            raise unknown("cost", cost, COSTS)
        whole = getattr(survey, cost)
        if not whole:
            raise UsageError(
                "Time was not measured: survey_network(network, run, repeats=10), or count parameters or macs."
            )
        for name in scores:
            survey[name]
        items = [
            one for one in survey.candidates if math.isfinite(scores.get(one.name, math.inf)) and getattr(one, cost) > 0
        ]
        most = reachable(survey, [item.name for item in items], cost)
        if ratio > most + 1e-12:
            raise UsageError(
                f"At most {_share(most)} of the {_NOUNS[cost]} of this {survey.network} can be removed with these scores; got a "
                f"ratio of {ratio:g}. Downsamplers, upsamplers, embeddings, shortcuts and the first and last layers always stay."
            )
        return cls(survey, cost, items, [float(getattr(one, cost)) for one in items], min(ratio, most) * whole)

    def met(self, saved: float) -> bool:
        """Whether so much is enough, up to rounding."""
        return saved >= self.target * (1 - 1e-12)

    def selection(self, names: Iterable[str], score: float) -> Selection:
        """These operators in network order, with what they save."""
        chosen = set(names)
        saved = sum(cost for item, cost in zip(self.items, self.costs, strict=True) if item.name in chosen)
        ordered = tuple(item.name for item in self.items if item.name in chosen)
        return Selection(ordered, self.cost, saved / getattr(self.survey, self.cost), score)


def reachable(survey: Survey, names: Iterable[str] | None = None, cost: str = "parameters") -> float:
    """The largest share of a network's cost that can be saved.

    Args:
        survey: of the network.
        names: of operators that may go; None for all.
        cost: one of `survey.COSTS`.
    """
    allowed = set(survey.names if names is None else names)
    items = [one for one in survey.candidates if one.name in allowed]
    costs = [getattr(one, cost) for one in items]
    return sum(costs[i] for i in _largest(items, costs)) / getattr(survey, cost)


def _largest(items: list[Candidate], costs: list[float]) -> list[int]:
    """The set that saves most: an operator or what is inside it, whichever is more (measured times may be odd)."""
    best: list[tuple[float, list[int]]] = [(0.0, [])] * (len(items) + 1)
    after = _ends(items)
    for i in reversed(range(len(items))):
        take, leave = best[after[i]], best[i + 1]
        value = costs[i] + take[0]
        best[i] = (value, [i, *take[1]]) if value >= leave[0] else leave
    return best[0][1]


def _ends(items: list[Candidate]) -> list[int]:
    """For each item the index behind the items inside it, which follow it directly."""
    ends = []
    for i, item in enumerate(items):
        inside = (j for j in range(i + 1, len(items)) if not items[j].name.startswith(f"{item.name}."))
        ends.append(next(inside, len(items)))
    return ends


def _ascending(items: list[Candidate], costs: list[float], values: list[float], target: float) -> list[int]:
    return _one_by_one(items, costs, target, values)


def _greedy(items: list[Candidate], costs: list[float], values: list[float], target: float) -> list[int]:
    return _one_by_one(items, costs, target, [value / cost for value, cost in zip(values, costs, strict=True)])


def _one_by_one(items: list[Candidate], costs: list[float], target: float, keys: list[float]) -> list[int]:
    """Take the lowest keys until the target is met, then put back what is not needed, the highest keys first.

    An operator takes the place of those inside it that were taken.
    """
    chosen: list[int] = []
    for i in sorted(range(len(items)), key=keys.__getitem__):
        if sum(costs[j] for j in chosen) >= target * (1 - 1e-12):
            break
        related = [j for j in chosen if nested(items[i].name, items[j].name)]
        if sum(costs[j] for j in related) < costs[i]:
            chosen = [j for j in chosen if j not in related] + [i]
    if sum(costs[j] for j in chosen) < target * (1 - 1e-12):
        return _largest(items, costs)
    for i in sorted(chosen, key=keys.__getitem__, reverse=True):
        if sum(costs[j] for j in chosen if j != i) >= target * (1 - 1e-12):
            chosen.remove(i)
    return chosen


def _knapsack(items: list[Candidate], costs: list[float], values: list[float], target: float) -> list[int]:
    """The lowest sum of values that meets the target, by dynamic programming over items in network order.

    Taking an item skips those inside it. Costs are rounded down to whole bins, so that the target is met for certain;
    exact where costs are whole numbers and the target is no more than the number of bins.
    """
    unit = 1.0 if target <= _BINS and all(cost.is_integer() for cost in costs) else target / _BINS
    need = math.ceil(target / unit - 1e-9)
    widths = [min(need, int(cost / unit + 1e-9)) for cost in costs]
    after = _ends(items)
    least = np.full((len(items) + 1, need + 1), np.inf)  # value that meets what is still needed with items i, i + 1, …
    least[-1, 0] = 0.0
    for i in reversed(range(len(items))):
        rest = np.maximum(np.arange(need + 1) - widths[i], 0)
        least[i] = np.minimum(least[i + 1], values[i] + least[after[i]][rest])
    if not math.isfinite(least[0, need]):  # reachable, but for what rounding lost
        return _largest(items, costs)
    chosen, i = [], 0
    while need and i < len(items):
        if least[i, need] == least[i + 1, need]:
            i += 1
        else:
            chosen.append(i)
            need, i = max(0, need - widths[i]), after[i]
    return chosen


def _share(value: float) -> str:
    return f"{math.floor(value * 1e4) / 1e4:g}"


SOLVERS: dict[str, Callable[[list[Candidate], list[float], list[float], float], list[int]]] = {
    "ascending": _ascending,
    "greedy": _greedy,
    "knapsack": _knapsack,
}
