"""How many training steps a time allows: the pace of a method, from a few of its steps that are thrown away."""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch

from ..core.config import merge
from ..core.errors import UsageError
from ..training.launch import launch
from ..training.recipes import RunConfig
from .run import build_method, check_method

_UNTIMED, _TIMED = 2, 5  # steps of a probe


@dataclass(frozen=True)
class Pace:
    """Seconds of processor time, or of time where a GPU computes.

    Attributes:
        preparation: before the first step, such as drawing the teacher's pairs.
        rests: (number, seconds each) of the steps at the start in which the student does not learn, by their setting.
        step: every other step.
        students: that are trained one after the other.
    """

    preparation: float
    rests: dict[str, tuple[int, float]]
    step: float
    students: int = 1

    def steps_within(self, seconds: float) -> int:
        """The training steps that fit into a time, pictures and validation not counted.

        Raises:
            UsageError: not one in which the student learns.
        """
        resting = sum(count for count, _ in self.rests.values())
        before = self.preparation + sum(count * each for count, each in self.rests.values())
        left = int((seconds / self.students - before) / self.step)
        if left < 1:
            least = self.students * (before + self.step)
            raise UsageError(
                f"The student has not learnt anything after {seconds:g} s; a budget of at least {least:.1f} s is needed"
                + (f", or lower method.{', method.'.join(self.rests)}." if self.rests else ".")
            )
        return resting + left

    def to_dict(self) -> dict:
        """JSON-able content."""
        return asdict(self)


def measure_pace(config: RunConfig) -> Pace:
    """The pace of a run, without one step of it that stays.

    Raises:
        UsageError, DataError, MissingWeightsError, NumericalError, InterruptedRun: see `run.build_method` and `launch`.
    """
    probed = deepcopy(config)
    _, settings = check_method(probed)
    rests = {name: getattr(settings, name) for name in settings.resting if getattr(settings, name)}
    students = 1
    if getattr(settings, "student", 0) is None:  # one of several students stands for all
        probed.method["student"], students = 0, settings.students
    preparation, step = _probe(probed, dict.fromkeys(rests, 0))
    paces = {name: (count, _probe(probed, dict.fromkeys(rests, 0) | {name: count})[1]) for name, count in rests.items()}
    return Pace(preparation, paces, step, students)


class _Enough(Exception):
    """A probe has seen what it is for."""


def _probe(config: RunConfig, changes: dict) -> tuple[float, float]:
    """Seconds before the first step, and of a step, of a run with changed settings of its method."""
    changed = deepcopy(config)
    changed.method = merge(config.method, changes)
    clock = _clock(config)
    method = build_method(changed)
    begin, end_step = method.begin, method.end_step
    begun, ends = [], []

    def timed_begin(folder: Path) -> None:
        started = clock()
        begin(folder)
        begun.append(clock() - started)

    def timed_end(step: int) -> None:
        end_step(step)
        ends.append(clock())
        if len(ends) > _UNTIMED + _TIMED:
            raise _Enough

    method.begin, method.end_step = timed_begin, timed_end
    with tempfile.TemporaryDirectory(prefix="diffaccel-") as folder, suppress(_Enough):
        launch(method, changed, Path(folder) / "run", progress=False)
    ends = ends[_UNTIMED:] if len(ends) > _UNTIMED + 1 else ends
    steps = [after - before for before, after in pairwise(ends)]
    return begun[0], statistics.median(steps) if steps else 0.0


def _clock(config: RunConfig) -> Callable[[], float]:
    gpu = config.trainer.device != "cpu" and torch.cuda.is_available()
    return time.perf_counter if gpu else time.process_time
