"""`optimize`: try accelerations in turn and keep those that pay."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch

from ..attention.cache import environment
from ..attention.timing import alternate, medians
from ..core.errors import UsageError, unknown
from ..core.memory import peak_bytes
from ..models.networks import device_of, networks_of
from .accelerations import ACCELERATIONS, BIT_EQUAL, Acceleration, Switch
from .report import FAILED, KEPT, NOT_APPLICABLE, NOT_KEPT, Cost, OptimizeReport, Trial
from .runs import default_steps, difference_of, images_of, standard_run

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
    before. Kept is what saves 2 % of the time or more, in nearly all rounds, and leaves the images what they are: in every
    bit, or up to rounding, as `ACCELERATIONS` says of each. What fails is listed with its message. At the end all that is kept
    is measured against nothing.

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
        measure: False applies what applies, without measuring whole runs; attention uses its measurements of earlier processes.
        progress: told what is being done.

    Raises:
        UsageError: not a pipeline, unknown names, bad numbers, or a pipeline that needs ``run``.
    """
    wanted = wanted_of(only, skip)
    _check(rounds, seconds, steps, memory_cap)
    networks = networks_of(pipe)
    if isinstance(pipe, torch.nn.Module):
        raise UsageError(
            "optimize works on whole pipelines; for a network alone there are optimize_attention and reuse_text."
        )
    device, tell = device_of(next(iter(networks.values()))), progress or (lambda text: None)
    steps = None if run else steps or default_steps(pipe)
    # A step for each network shows attention what it shows in many, and is all that applying without measuring takes.
    shown = run or (lambda: standard_run(pipe, len(networks))())
    options = {"approximate": approximate, "run": shown, "confirm": measure}
    trials: list[Trial] = []
    with ExitStack() as switches:  # turned off, the last one first, on any error
        runs = None
        if measure:
            tell("the pipeline as it is")
            runs = _Runs(run or standard_run(pipe, steps), device, rounds, seconds)
        for acceleration in wanted:
            tell(acceleration.name)
            trials.append(_try(acceleration, pipe, runs, options, memory_cap, switches))
        first, last, difference = _together(runs, trials, switches, tell) if runs else (None, None, None)
        settings = {"approximate": True} if approximate else {}
        parts = (type(pipe).__name__, environment(device), steps, tuple(trials), first, last, difference)
        return OptimizeReport(*parts, settings, switches.pop_all())


class Comparison(NamedTuple):
    """Runs without and with something.

    Attributes:
        without, used: costs per image.
        difference: mean difference of the images, in levels of 8 bits.
        won, rounds: in how many rounds it was faster, and how many there were.
        first: seconds of the first run with it.
    """

    without: Cost
    used: Cost
    difference: float
    won: int
    rounds: int
    first: float = 0.0


class _Runs:
    """Runs of the pipeline, and what they cost.

    Attributes:
        noise: mean difference between the images of two equal runs, in levels of 8 bits.

    Raises:
        UsageError: runs without images, or with different ones.
    """

    def __init__(self, run: Callable, device: torch.device, rounds: int, seconds: float):
        self.run, self.device, self.rounds, self.seconds = run, device, rounds, seconds
        try:
            images = images_of(run())
        except torch.OutOfMemoryError as error:
            raise UsageError(
                "The pipeline does not fit into memory as it is, so nothing can be compared with it: try smaller images, half "
                "precision, pipe.enable_model_cpu_offload() or diffaccel.sequential_cfg(pipe)."
            ) from error
        self.count, self.noise = len(images), difference_of(images, images_of(run()))
        if not self.noise <= CHANGE:
            raise UsageError(
                "run must draw the same images at every call, of finite values: pass generator=torch.Generator().manual_seed(0) "
                "inside it."
            )
        if all(float(image.max() - image.min()) == 0 for image in images):
            raise UsageError(
                "The images are of one colour (a safety checker?), so changes could not be seen; pass run=."
            )

    def compare(self, on: Callable, off: Callable, graphs: bool = False) -> Comparison:
        """Measure what a switch changes; it is off afterwards."""
        try:
            off()
            images, bytes_off = images_of(self.run()), self._peak()
            on()
            start = time.perf_counter()
            drawn = images_of(self.run())
            first, difference = time.perf_counter() - start, difference_of(images, drawn)
            bytes_on = None if graphs and self.device.type != "cuda" else self._peak()
            contenders = {"off": self.run, "on": self.run}
            taken = alternate(contenders, self.device, self.rounds, self.seconds, {"off": off, "on": on})
        finally:
            off()
        typical = {name: seconds / self.count for name, seconds in medians(taken).items()}
        won = sum(new < old for new, old in zip(taken["on"], taken["off"], strict=True))
        costs = Cost(typical["off"], bytes_off), Cost(typical["on"], bytes_on)
        return Comparison(*costs, difference, won, len(taken["on"]), first)

    def alone(self) -> Cost:
        """The cost per image as things are."""
        taken = medians(alternate({"run": self.run}, self.device, self.rounds, self.seconds))
        return Cost(taken["run"] / self.count, self._peak())

    def _peak(self) -> int:
        return peak_bytes(self.run, self.device)


def _try(
    acceleration: Acceleration, pipe, runs: _Runs | None, options: dict, cap: int | None, switches: ExitStack
) -> Trial:
    """Measure one; if it is kept, it is on and ``switches`` will turn it off."""
    name, exact = acceleration.name, acceleration.exact
    with ExitStack() as undo:
        try:
            switch = acceleration.make(pipe, options)
            undo.callback(switch.off)
            if runs is None:
                switch.on()
                switches.push(undo.pop_all())
                return Trial(name, KEPT, "applied without measuring", exact, detail=switch.detail)
            found = runs.compare(switch.on, switch.off, acceleration.compiles)
            if reason := switch.idle():  # nothing but noise could speak for it
                return Trial(name, NOT_APPLICABLE, reason, exact)
            kept, reason = verdict(found, runs.noise if exact == BIT_EQUAL else CHANGE, cap)
            if kept:
                switch.on()
        except UsageError as error:
            return Trial(name, NOT_APPLICABLE, str(error), exact)
        except Exception as error:
            return Trial(
                name,
                FAILED,
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
                exact,
            )
        if kept:
            switches.push(undo.pop_all())
        if acceleration.compiles:
            reason += f", after {found.first:.0f} s of compiling"
        costs = (found.without, found.used, found.difference)
        return Trial(name, KEPT if kept else NOT_KEPT, reason, exact, *costs, switch.detail, switch if kept else None)


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
    if cap is not None and None not in (without.bytes, used.bytes):
        if without.bytes > cap and used.bytes < (1 - PAYS) * without.bytes:
            return True, f"takes {1 - used.bytes / without.bytes:.0%} less memory"
        if used.bytes > max(cap, without.bytes):
            return False, "takes more memory than there should be"
    ratio = without.seconds / used.seconds
    if ratio <= 1:
        return False, "not faster"
    if used.seconds > (1 - PAYS) * without.seconds:
        return False, f"only {ratio - 1:.1%} faster"
    if found.won < found.rounds - found.rounds // MOST:
        return False, f"faster in {found.won} of {found.rounds} rounds only"
    return True, f"{ratio:.2f}× as fast"


def _together(runs: _Runs, trials: list[Trial], switches: ExitStack, tell: Callable):
    """Costs without and with all that is kept, in one run; all of it is on afterwards."""
    kept: list[Switch] = [trial.switch for trial in trials if trial.switch is not None]
    if not kept:
        measured = [trial.without for trial in trials if trial.without is not None]
        return (measured[0] if measured else runs.alone()), None, None
    tell("all together")

    def on():
        for switch in kept:
            switch.on()

    def off():
        for switch in reversed(kept):
            switch.off()

    graphs = any(ACCELERATIONS[trial.name].compiles for trial in trials if trial.switch and trial.name in ACCELERATIONS)
    found = runs.compare(on, off, graphs)
    on()
    return found.without, found.used, found.difference


def wanted_of(only: Sequence[str] | None, skip: Sequence[str] | None) -> list[Acceleration]:
    """The accelerations to try, in order.

    Raises:
        UsageError: unknown names.
    """
    for names in (only, skip):
        if isinstance(names, str):
            raise UsageError(f"only and skip are lists of names, such as ['attention']; got {names!r}.")
        for name in names or ():
            if name not in ACCELERATIONS:
                raise unknown("acceleration", name, ACCELERATIONS)
    left_out = set(skip or ())
    return [one for name, one in ACCELERATIONS.items() if (only is None or name in only) and name not in left_out]


def _check(rounds, seconds, steps, memory_cap) -> None:
    for name, value, least in (("rounds", rounds, 3), ("steps", steps, 1), ("memory_cap", memory_cap, 1)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise UsageError(f"{name} is a whole number from {least}; got {value!r}.")
    if not isinstance(seconds, (int, float)) or not seconds > 0:
        raise UsageError(f"seconds is a positive number; got {seconds!r}.")
