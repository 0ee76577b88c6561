"""`optimize`: try accelerations in turn and keep those that pay."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch

from ..attention.cache import environment
from ..attention.timing import alternate, medians
from ..core.errors import UsageError, unknown
from ..core.memory import peak_bytes
from ..models.networks import eager, networks_of
from .accelerations import ACCELERATIONS, BIT_EQUAL, Acceleration, Switch
from .report import KEPT, NOT_APPLICABLE, NOT_KEPT, Cost, OptimizeReport, Trial
from .runs import default_steps, images_of, standard_run

PAYS = 0.02
"""The share of time that an acceleration must save to be kept; and of memory, where that is short."""
MOST = 5
"""Of so many rounds, one may go the other way."""
CHANGE = 4.0
"""Largest mean difference of the images, in levels of 8 bits, that passes for rounding."""


def optimize(
    pipe,
    *,
    run: Callable[[], object] | None = None,
    steps: int | None = None,
    only: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    memory_cap: int | None = None,
    approximate: bool = False,
    rounds: int = 7,
    seconds: float = 60.0,
    measure: bool = True,
    progress: Callable[[str], object] | None = None,
) -> OptimizeReport:
    """Make a pipeline faster without changing what it computes, by trial, until ``undo``.

        report = diffaccel.optimize(pipe)
        print(report)

    Whole runs of the pipeline, from prompt to image, are timed with and without each acceleration in turn, on top of those kept
    before. Kept is what saves 2 % of the time or more, in nearly all rounds, and leaves the images what they are: in every bit, or up to rounding,
    as `ACCELERATIONS` says of each. At the end all of them are measured against none.

    Args:
        pipe: any diffusers pipeline, on its device.
        run: draws images and returns them, such as ``lambda: pipe("a cat", generator=torch.Generator().manual_seed(0),
            num_inference_steps=20).images``, the same at every call; None for one image with the pipeline's own settings.
        steps: sampling steps of the standard run; None for the pipeline's own.
        only: names in `ACCELERATIONS`; None for all.
        skip: names to leave out.
        memory_cap: bytes that a run should take at its peak; what takes less is kept for that, slower or not, while runs take
            more, and what takes more than that is not kept.
        approximate: whether attention with reduced precision may be used.
        rounds, seconds: how often each is timed, at least 3 times, and after how many seconds no more.
        measure: False applies what applies, without measuring (attention uses its measurements of earlier processes).
        progress: told what is being done.

    Raises:
        UsageError: not a pipeline, unknown names, bad numbers, or a pipeline that needs ``run``.
    """
    wanted = _wanted(only, skip)
    _check(rounds, seconds, steps, memory_cap)
    device = _device(pipe)
    steps = None if run else steps or default_steps(pipe)
    run = run or standard_run(pipe, steps)
    tell = progress or (lambda text: None)
    tell("the pipeline as it is")
    runs = _Runs(run, device, rounds, seconds) if measure else None
    options = {"approximate": approximate, "run": run}
    trials: list[Trial] = []
    switches: list[Switch] = []
    with ExitStack() as on_error:
        on_error.callback(lambda: [switch.off() for switch in reversed(switches)])
        for acceleration in wanted:
            tell(acceleration.name)
            trial, switch = _try(acceleration, pipe, runs, options, memory_cap)
            trials.append(trial)
            if trial.outcome == KEPT:
                switches.append(switch)
        first, last, difference = _together(runs, switches, trials, tell) if runs else (None, None, None)
        on_error.pop_all()
    return OptimizeReport(
        type(pipe).__name__, environment(device), steps, tuple(trials), first, last, difference, tuple(switches)
    )


class Comparison(NamedTuple):
    """Runs without and with something: costs per image, the mean difference of the images in levels of 8 bits, how many
    rounds it won, and of how many."""

    without: Cost
    used: Cost
    difference: float
    won: int
    rounds: int


class _Runs:
    """Runs of the pipeline, and what they cost.

    Attributes:
        noise: mean difference between the images of two equal runs, in levels of 8 bits.

    Raises:
        UsageError: runs without images, or with different ones.
    """

    def __init__(self, run: Callable, device: torch.device, rounds: int, seconds: float):
        self.run, self.device, self.rounds, self.seconds = run, device, rounds, seconds
        images = images_of(run())
        self.count, self.noise = len(images), difference_of(images, images_of(run()))
        if not self.noise <= CHANGE:
            raise UsageError(
                "run must draw the same images at every call, of finite values: pass generator=torch.Generator().manual_seed(0) "
                "inside it."
            )

    def compare(self, on: Callable, off: Callable) -> Comparison:
        """Measure what a switch changes; it is off afterwards."""
        try:
            off()
            images, bytes_off = images_of(self.run()), self._peak()
            on()
            difference, bytes_on = difference_of(images, images_of(self.run())), self._peak()
            contenders = {"off": self.run, "on": self.run}
            taken = alternate(contenders, self.device, self.rounds, self.seconds, {"off": off, "on": on})
        finally:
            off()
        typical = medians(taken)
        off_cost, on_cost = Cost(typical["off"] / self.count, bytes_off), Cost(typical["on"] / self.count, bytes_on)
        return Comparison(
            off_cost,
            on_cost,
            difference,
            sum(a < b for a, b in zip(taken["on"], taken["off"], strict=True)),
            len(taken["on"]),
        )

    def alone(self) -> Cost:
        """The cost per image as things are."""
        taken = medians(alternate({"run": self.run}, self.device, self.rounds, self.seconds))
        return Cost(taken["run"] / self.count, self._peak())

    def _peak(self) -> int:
        return peak_bytes(self.run, self.device)


def _try(
    acceleration: Acceleration, pipe, runs: _Runs | None, options: dict, cap: int | None
) -> tuple[Trial, Switch | None]:
    parts = (acceleration.name, acceleration.exact)
    try:
        switch = acceleration.make(pipe, options)
    except UsageError as error:
        return Trial(parts[0], NOT_APPLICABLE, str(error), parts[1]), None
    if runs is None:
        switch.on()
        return Trial(parts[0], KEPT, "applied without measuring", parts[1], detail=switch.detail), switch
    found = runs.compare(switch.on, switch.off)
    kept, reason = verdict(found, runs.noise if acceleration.exact == BIT_EQUAL else CHANGE, cap)
    if kept:
        switch.on()
    outcome = KEPT if kept else NOT_KEPT
    costs = (found.without, found.used, found.difference)
    return Trial(parts[0], outcome, reason, parts[1], *costs, switch.detail), switch


def verdict(found: Comparison, allowed: float, cap: int | None = None) -> tuple[bool, str]:
    """Whether an acceleration is kept, and the reason as a clause.

    Args:
        found: what was measured.
        allowed: largest difference of the images that it may make, in levels of 8 bits.
        cap: bytes that a run should take, or None.
    """
    without, used, difference = found.without, found.used, found.difference
    if not difference <= allowed:
        return False, f"it changes the images by {difference:.2g}/255 on average"
    if cap is not None and without.bytes > cap and used.bytes < (1 - PAYS) * without.bytes:
        return True, f"takes {1 - used.bytes / without.bytes:.0%} less memory"
    if cap is not None and used.bytes > max(cap, without.bytes):
        return False, "takes more memory than there should be"
    ratio = without.seconds / used.seconds
    if ratio <= 1:
        return False, "not faster"
    if used.seconds > (1 - PAYS) * without.seconds:
        return False, f"only {ratio - 1:.1%} faster"
    if found.won < found.rounds - found.rounds // MOST:
        return False, f"faster in {found.won} of {found.rounds} rounds only"
    return True, f"{ratio:.2f}× as fast"


def _together(runs: _Runs, switches: list[Switch], trials: list[Trial], tell: Callable):
    """Costs without and with all that is kept, in one run; all of it is on afterwards."""
    if not switches:
        measured = [trial.without for trial in trials if trial.without is not None]
        return (measured[0] if measured else runs.alone()), None, None
    tell("all together")

    def on():
        for switch in switches:
            switch.on()

    def off():
        for switch in reversed(switches):
            switch.off()

    off()
    found = runs.compare(on, off)
    on()
    return found.without, found.used, found.difference


def difference_of(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Mean absolute difference of two lists of images in [0, 1], in levels of 8 bits."""
    pairs = list(zip(left, right, strict=True))
    return 255 * sum(float((a.double() - b.double()).abs().mean()) for a, b in pairs) / len(pairs)


def _wanted(only, skip) -> list[Acceleration]:
    for names in (only, skip):
        if isinstance(names, str):
            raise UsageError(f"only and skip are lists of names, such as ['attention']; got {names!r}.")
        for name in names or ():
            if name not in ACCELERATIONS:
                raise unknown("acceleration", name, ACCELERATIONS)
    return [one for name, one in ACCELERATIONS.items() if (only is None or name in only) and name not in skip]


def _device(pipe) -> torch.device:
    networks = networks_of(pipe)
    if isinstance(pipe, torch.nn.Module):
        raise UsageError(
            "optimize works on whole pipelines; for a network alone there are optimize_attention and reuse_text."
        )
    return next(iter(map(eager, networks.values()))).device


def _check(rounds, seconds, steps, memory_cap) -> None:
    for name, value, least in (("rounds", rounds, 3), ("steps", steps, 1), ("memory_cap", memory_cap, 1)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise UsageError(f"{name} is a whole number from {least}; got {value!r}.")
    if not isinstance(seconds, (int, float)) or not seconds > 0:
        raise UsageError(f"seconds is a positive number; got {seconds!r}.")
