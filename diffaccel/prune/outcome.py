"""What a pruning run found."""

from dataclasses import dataclass
from pathlib import Path

from .plan import Point
from .settings import PruningConfig
from .survey import Survey


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        final: the folder of the pruned pipeline.
        config: settings.
        survey, scores: what could be removed, and what each was worth.
        plan: see `prune.plan.plan_of`.
        points: the trade-off curve by rising ratio, the whole model first.
        recovered: the point of the plan after recovery; None without one.
        distance: name of the Fréchet distance, "" where none was measured.
    """

    final: Path
    config: PruningConfig
    survey: Survey
    scores: dict[str, float]
    plan: dict
    points: list[Point]
    recovered: Point | None
    distance: str

    @property
    def whole(self) -> Point:
        """The model before."""
        return self.points[0]

    @property
    def pruned(self) -> Point:
        """What the plan leaves, before recovery."""
        return next(one for one in self.points if one.ratio == self.config.ratio)
