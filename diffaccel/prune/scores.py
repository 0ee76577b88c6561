"""The pruning methods by name, and scores of operators one by one, which can be continued after an interruption."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import unknown
from ..core.lazy import load_object
from ..search.journal import Journal


@dataclass(frozen=True)
class CriterionInfo:
    """Attributes:
    name: as typed on the command line.
    summary: one line.
    paper: where it comes from, "" for a baseline.
    cost: what scoring one operator takes.
    solver: how its paper chooses operators by their scores, see `selection.SOLVERS`.
    target: "module:class".
    """

    name: str
    summary: str
    paper: str
    cost: str
    solver: str
    target: str

    def load(self) -> type:
        """Import and return the class."""
        return load_object(self.target)


CRITERIA = {
    info.name: info
    for info in (
        CriterionInfo(
            "ld-pruner",
            "how far mean and deviation of final latents move; needs no data",
            "Castells et al. 2024, LD-Pruner: Efficient Pruning of Latent Diffusion Models (arXiv 2404.11936)",
            "a sampler run for every calibration sample",
            "ascending",
            "diffaccel.prune.criteria:LDPruner",
        ),
        CriterionInfo(
            "laptop",
            "how far the network's output moves; losses add up, so a knapsack chooses",
            "Zhang et al. 2024, LAPTOP-Diff: Layer Pruning and Normalized Distillation (arXiv 2404.11098)",
            "one network evaluation for every calibration state",
            "knapsack",
            "diffaccel.prune.criteria:Laptop",
        ),
        CriterionInfo(
            "magnitude",
            "baseline: mean absolute weight",
            "",
            "nothing",
            "ascending",
            "diffaccel.prune.criteria:Magnitude",
        ),
        CriterionInfo(
            "random", "baseline: drawn at random", "", "nothing", "ascending", "diffaccel.prune.criteria:Random"
        ),
    )
}


def get_criterion(name: str) -> CriterionInfo:
    """Look a method up.

    Raises:
        UsageError: unknown name.
    """
    if name not in CRITERIA:
        raise unknown("pruning method", name, CRITERIA)
    return CRITERIA[name]


class Remembered:
    """A criterion that computes the loss of a set of operators once, also over several runs.

    Args:
        criterion: a `criteria.Criterion`.
        path: of a file to which each loss is added as soon as it is known, one JSON object per line; where it exists already,
            with the same settings and weights, its losses are taken from there. None for memory alone.

    Attributes:
        journal: the losses by key, which is the sorted names with a plus sign between.

    Raises:
        UsageError: a file with losses of other settings or weights.
        DataError: a file that holds none.
    """

    def __init__(self, criterion, path: Path | None = None):
        self.criterion, path = criterion, None if path is None else Path(path)
        settings = criterion.settings() if path else {}
        self.journal = Journal(path, settings, bool(path and path.exists()), "scoring")

    def loss(self, names: Iterable[str]) -> float:
        """As the criterion's; infinite where that is not finite."""
        names = list(names)
        key = "+".join(sorted(names))
        if key not in self.journal.scores:
            self.journal.add(key, self.criterion.loss(names))
        return self.journal.scores[key]


def score(
    criterion,
    names: Iterable[str],
    path: Path | None = None,
    progress: Callable[[str, float, int, int], object] | None = None,
) -> dict[str, float]:
    """The loss of removing each operator alone, one pass each.

    Args:
        criterion: a `criteria.Criterion`, or one that is `Remembered` already.
        names: such as ``survey.names``.
        path: see `Remembered`.
        progress: told (name, score, number done, number of all) after each, those in the file included.

    Returns:
        By name, lower is better; infinite where the network then gives values that are not finite.

    Raises:
        UsageError: names that cannot be removed; a file with scores of other settings or weights.
        DataError: a file that holds no scores.
    """
    names = list(names)
    losses = criterion if isinstance(criterion, Remembered) else Remembered(criterion, path)
    found = {}
    for done, name in enumerate(names, 1):
        found[name] = losses.loss([name])
        if progress:
            progress(name, found[name], done, len(names))
    return found
