"""What a search found, and what is told while it runs."""

from dataclasses import dataclass, field

from ..samplers.searched import PlanFile
from .subjects import Subject


@dataclass(frozen=True)
class Scored:
    """A plan with what it is called and its scores by stage: "search", "selection", "validation"."""

    label: str
    file: PlanFile
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        best: the plan to use: the searched one, or the best hand-set one where that was not beaten on held-out noise.
        seed: the best hand-set schedule.
        improved: whether ``best`` was found by the search.
        file: of ``best``, with the record of the search.
        finalists: what was compared on fresh noise, with all its scores.
        history: (origin, score) of every candidate in the order of evaluation.
        subject: the model.
    """

    best: Scored
    seed: Scored
    improved: bool
    file: PlanFile
    finalists: list[Scored]
    history: list[tuple[str, float]]
    subject: Subject


@dataclass(frozen=True)
class Progress:
    """What is told while a search runs: stage, evaluations done and planned, best score so far, facts, seconds left."""

    stage: str
    done: int
    planned: int
    best: float
    facts: dict[str, float]
    left: float | None
