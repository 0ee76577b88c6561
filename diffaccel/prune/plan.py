"""What was removed from a model and what that saves, as readable JSON; and the points of the trade-off curve."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from .costs import measure_seconds
from .selection import Selection
from .surgery import Layers, removed
from .survey import COSTS, Survey

_LEAST, _MOST = 1.0, 100  # seconds and rounds of a measurement of time


@dataclass(frozen=True)
class Point:
    """A model with less.

    Attributes:
        ratio: that was asked for.
        names: of what is removed.
        parameters, macs: of what is left, in all and per network call of one sample, a guidance pair included.
        seconds: of such a call; None where time was not measured.
        fd: Fréchet distance; None where it was not measured, infinite where images were not finite.
    """

    ratio: float
    names: tuple[str, ...]
    parameters: int
    macs: int
    seconds: float | None = None
    fd: float | None = None

    def shares(self, whole: "Point") -> dict[str, float]:
        """What is left of parameters, macs and seconds, as shares of the whole model's."""
        pairs = {cost: (getattr(self, cost), getattr(whole, cost)) for cost in COSTS}
        return {cost: own / all_ for cost, (own, all_) in pairs.items() if own is not None and all_}

    def to_dict(self) -> dict:
        """JSON-able content; a distance that is not finite is null."""
        found = asdict(self) | {"names": list(self.names)}
        return found | {"fd": self.fd if self.fd is not None and self.fd < float("inf") else None}


def point_of(survey: Survey, selection: Selection, ratio: float) -> Point:
    """What is left when the operators of a selection are gone, counted and not yet measured."""
    gone = [survey[name] for name in selection.names]
    parameters, macs = (getattr(survey, cost) - sum(getattr(one, cost) for one in gone) for cost in COSTS[:2])
    return Point(ratio, selection.names, parameters, macs)


def measure_alternately(
    network: nn.Module, run: Callable[[], object], cases: Sequence[Layers], rounds: int
) -> list[float]:
    """Median seconds of a run without each of several sets of operators, all of them measured once per round.

    What else the machine does meets all of them alike.

    Args:
        network: is as it was afterwards.
        run: calls it.
        cases: sets of operators, see `surgery.remove`.
        rounds: at least 1; of fast networks more are measured, for about a second.
    """
    found: list[list[float]] = [[] for _ in cases]
    end = time.monotonic() + _LEAST
    while len(found[0]) < rounds or (time.monotonic() < end and len(found[0]) < _MOST):
        for seconds, layers in zip(found, cases, strict=True):
            with removed(network, layers):
                seconds.append(measure_seconds(network, run, repeats=1)[""])
    return [statistics.median(seconds) for seconds in found]


def plan_of(
    survey: Survey, scores: Mapping[str, float], records: Sequence[Mapping], whole: Point, point: Point, loss: float
) -> dict:
    """The plan: what was removed, what each was worth and saves, and what is left.

    Args:
        survey: of the whole network.
        scores: of single operators.
        records: of what was removed, see `surgery.remove`; `classes.prune` takes the ones of a plan, too.
        whole, point: the network before and after.
        loss: of the selection, see `selection.Selection`.
    """

    def told(record: Mapping) -> dict:
        one = survey[record["name"]]
        return {**record, "score": scores.get(one.name), "parameters": one.parameters, "macs": one.macs}

    facts = ("parameters", "macs", "seconds")
    return {
        "network": survey.network,
        "loss": loss,
        "left": point.shares(whole),
        "before": {fact: getattr(whole, fact) for fact in facts},
        "after": {fact: getattr(point, fact) for fact in facts},
        "removed": [told(record) for record in records],
    }
