"""What a training step evaluates, as plans need it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Update:
    """What one update of a training step evaluates, by role and for each sample of the batch.

    The evaluations of a role are one call, 2 for a guided teacher, or several, one after another: (2, 2).

    Attributes:
        name: of the phase.
        trains: roles that get gradients.
        graph: evaluations that are kept for the backward pass. Those of a role that is not trained carry gradients to its
            input, as the teacher's do in an adversarial loss.
        before, beside: evaluations without gradients, before those of the graph and while it is kept.
        repeats: how many such updates a training step makes.
    """

    name: str
    trains: tuple[str, ...]
    graph: Mapping[str, int | tuple[int, ...]]
    before: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)
    beside: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)
    repeats: int = 1

    @property
    def evaluations(self) -> int:
        """Of networks, for each sample; the pair of guidance counts twice."""
        return self.repeats * sum(count for part in (self.before, self.graph, self.beside) for _, count in calls(part))


def calls(part: Mapping[str, int | tuple[int, ...]]) -> Iterator[tuple[str, int]]:
    """The calls of a part of an update: role and evaluations per sample of each."""
    for name, counts in part.items():
        for count in counts if isinstance(counts, tuple) else (counts,):
            yield name, count
