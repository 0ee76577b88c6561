"""Selections that look at the loss of sets: searched, and one removal after the other with new scores in between.

Scores of single operators say nothing of what two removals do together. Both ways here start from them and compute
the loss of sets, each of which costs what scoring one operator does.
"""

import math
from collections.abc import Callable, Mapping

from ..core.errors import NumericalError, UsageError
from ..search.engine import Search
from ..search.evolution import evolution
from .additivity import nested
from .selection import SOLVERS, Selection, Task, select
from .subset_space import SubsetSpace
from .survey import Survey

Told = Callable[[int, int, float], object]  # (losses computed, of how many, the best so far)
_BATCH = 8  # children of a generation


def search_selection(
    survey: Survey,
    scores: Mapping[str, float],
    criterion,
    ratio: float,
    cost: str = "parameters",
    evaluations: int = 200,
    seed: int = 0,
    progress: Told | None = None,
) -> Selection:
    """Search the set whose joint loss is lowest, by evolution from what all solvers choose by single scores.

    Args:
        survey, scores, ratio, cost: see `selection.select`.
        criterion: whose loss is minimised; `scores.Remembered` to continue after an interruption.
        evaluations: sets to compute the loss of, those of the solvers included.
        seed: of the search.
        progress: told after every generation.

    Returns:
        The best set; never worse than that of any solver, by this criterion.

    Raises:
        UsageError: see `selection.select`; no evaluations.
        NumericalError: no set has a finite loss.
    """
    if evaluations < 1:
        raise UsageError(f"A search needs at least one evaluation; got {evaluations}.")
    task = Task.of(survey, scores, ratio, cost)
    if not ratio:
        return task.selection([], 0.0)

    def tell(search: Search) -> None:
        if progress:
            progress(len(search.archive), evaluations, search.best()[0].score)

    search = Search(
        SubsetSpace(task), lambda sets: [criterion.loss(one) for one in sets], evaluations, seed=seed, tell=tell
    )
    begun = {select(survey, scores, ratio, cost, solver).names for solver in SOLVERS}
    search.evaluate(sorted(begun), "solvers")
    evolution(search, search.remaining, batch=_BATCH)
    best = search.best()[0]
    if not math.isfinite(best.score):
        raise NumericalError(
            f"None of {len(search.archive)} sets of operators that save {ratio:g} gives finite outputs; lower the ratio."
        )
    return task.selection(best.candidate, best.score)


def select_iteratively(
    survey: Survey,
    scores: Mapping[str, float],
    criterion,
    ratio: float,
    cost: str = "parameters",
    every: int = 1,
    progress: Told | None = None,
) -> Selection:
    """Remove one operator after the other, each time the one that adds least loss for what it saves.

    The first is the one that the solver "greedy" takes. An operator takes the place of those inside it that went before.

    Args:
        survey, scores, ratio, cost: see `selection.select`; scores decide the first round.
        criterion: whose loss counts; `scores.Remembered` to continue after an interruption.
        every: removals between two rounds of scores.
        progress: told (losses computed, the same, loss without what has gone) after every round.

    Raises:
        UsageError: see `selection.select`; ``every`` below 1.
        NumericalError: nothing more can go without outputs that are not finite, and the target is not met.
    """
    if every < 1:
        raise UsageError(f"Scores are computed again after at least one removal; got every={every}.")
    task = Task.of(survey, scores, ratio, cost)
    saves = {item.name: saved for item, saved in zip(task.items, task.costs, strict=True)}
    chosen: tuple[str, ...] = ()
    loss, done = 0.0, 0
    while ratio and not task.met(sum(saves[name] for name in chosen)):
        found = []
        for name, saved in saves.items():
            rest = tuple(other for other in chosen if not nested(name, other))
            gain = saved - sum(saves[other] for other in chosen if other not in rest)
            if name in chosen or gain <= 0.0:
                continue
            joint = criterion.loss((*rest, name)) if chosen else scores[name]
            done += bool(chosen)
            if math.isfinite(joint):
                found.append(((joint - loss) / gain, name, joint))
        if not found:
            raise NumericalError(
                f"Without {len(chosen)} operators nothing more can go: outputs are not finite, or nothing would be saved. "
                f"Lower the ratio, {ratio:g}, or choose another solver."
            )
        for _, name, joint in sorted(found)[:every]:
            if any(nested(name, other) and saves[other] >= saves[name] for other in chosen):
                continue  # a removal of this round contains it
            chosen = (*(other for other in chosen if not nested(name, other)), name)
            loss = joint
            if task.met(sum(saves[one] for one in chosen)):
                break
        if every > 1:
            loss = criterion.loss(chosen)
        if progress:
            progress(done, done, loss)
    for name in sorted(chosen, key=scores.__getitem__, reverse=True):  # the last ones may have made some unnecessary
        rest = tuple(other for other in chosen if other != name)
        if task.met(sum(saves[other] for other in rest)):
            chosen, loss = rest, criterion.loss(rest)
    return task.selection(chosen, loss)
