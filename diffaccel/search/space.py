"""The space of solver schedules with a given number of network calls."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from ..core.errors import UsageError, unknown
from ..core.schedule import Flow, NoiseSchedule, VPLinear
from ..samplers.multistep import QUANTITIES
from ..samplers.usf import CORRECTORS, RELAXATIONS, TAYLOR_VARIABLES, Decision, SolverSchedule
from .tokens import tokens

# Decisions by the names that --fix takes, in the order of the published tables.
GENES = (
    "times",
    "order",
    "core",
    "variable",
    "start",
    "points",
    "relaxation",
    "carry",
    "corrector",
    "skip-first",
    "end",
)
_ORDERS = (0.15, 0.4, 0.35, 0.1)  # how often 1 … 4 are drawn
_KNOBS = ("none", "scale")  # relaxations whose strength is a real number to be tuned
_MAX_CARRY, _STRENGTHS = 0.6, (-0.5, 2.5)
_REFERENCE = VPLinear(t_min=0.0, t_max=math.inf)


class Axis:
    """Time in a coordinate in which even spacing is already good: 0 the clean image, larger is noisier.

    On VP, VE and EDM models it is that of the grid "fast", (time of the linear VP schedule)^(1/1.75), on flows time itself.
    """

    def __init__(self, schedule: NoiseSchedule):
        self.schedule, self._flow = schedule, isinstance(schedule, Flow)
        self.top, self.bottom = (float(self.of([time])[0]) for time in (schedule.t_max, schedule.t_min))

    def of(self, times: Sequence[float]) -> np.ndarray:
        """Places of native times."""
        t = torch.tensor(list(times), dtype=torch.float64)
        if self._flow:
            return (t / self.schedule.t_max).numpy()
        return (_REFERENCE.t_from_rho(self.schedule.rho(t)) ** (1 / 1.75)).numpy()

    def times(self, places: np.ndarray) -> tuple[float, ...]:
        """Native times of places, at single precision: what pipelines hand to networks is what was searched."""
        places = torch.from_numpy(np.asarray(places, dtype=np.float64))
        t = places * self.schedule.t_max if self._flow else self.schedule.t_from_rho(_REFERENCE.rho(places**1.75))
        low, high = self.schedule.t_min, self.schedule.t_max
        t = torch.where(t - low < 1e-9 * (high - low), low, t).float()
        t = torch.where(t.double() > high, torch.nextafter(t, t - 1.0), t)  # single precision inside the schedule
        return tuple(torch.where(t.double() < low, torch.nextafter(t, t + 1.0), t).double().tolist())


@dataclass(frozen=True)
class SolverSpace:
    """Solver schedules that spend ``nfe`` network calls.

    Args:
        schedule: noise schedule of the model.
        nfe: network calls of a run, a guidance pair counted once.
        genes: what may differ from the candidates that a search starts from, of `GENES`.
        like: what random candidates are made from where not all genes are open.

    Raises:
        UsageError: no call, an unknown gene, or none that is open to this model.
    """

    schedule: NoiseSchedule
    nfe: int
    genes: tuple[str, ...] = GENES
    like: SolverSchedule | None = None

    def __post_init__(self):
        if self.nfe < 1:
            raise UsageError(f"A search needs at least one network call; got {self.nfe}.")
        for gene in self.genes:
            if gene not in GENES:
                raise unknown("part of a solver schedule", gene, GENES)
        object.__setattr__(self, "axis", Axis(self.schedule))
        closed = {"skip-first", "end"} if isinstance(self.schedule, Flow) else set()
        object.__setattr__(self, "open", frozenset(self.genes) - closed)
        if not self.open:
            raise UsageError("A search needs something to search: leave more of the schedule open.")
        object.__setattr__(self, "_complete", self.open == frozenset(GENES) - closed)

    def key(self, candidate: SolverSchedule) -> str:
        """The schedule as text, all numbers exact."""
        return repr(candidate)

    def draw(self, random: np.random.Generator) -> SolverSchedule:
        """Random times between even and arbitrary, and mostly one rule for all steps; or many mutations of `like`."""
        if not self._complete and self.like is not None:
            candidate = self.like
            for _ in range(10):
                candidate = self.mutate(candidate, random)
            return candidate
        places = np.linspace(1.0, 0.0, self.nfe, endpoint=False)
        places = places + random.uniform(0.0, 1.0) * (np.sort(random.uniform(size=self.nfe))[::-1] - places)
        base, steps = self._decision(random), []
        for _ in range(self.nfe):
            steps.append(replace(base) if random.random() < 0.8 else self._decision(random))
        return self.settled(places * self.axis.top, steps)

    def mutate(self, candidate: SolverSchedule, random: np.random.Generator) -> SolverSchedule:
        """One change or a few; of times in proportion to the gap they move into."""
        key, changed = self.key(candidate), candidate
        for _ in range(8):
            for _ in range(1 + random.poisson(1.0)):
                changed = self._changed(changed, random)
            if self.key(changed) != key:
                break
        return changed

    def cross(self, one: SolverSchedule, other: SolverSchedule, random: np.random.Generator) -> SolverSchedule:
        """Times of both, mixed or between; decisions of both, mixed step by step or all of one."""
        if len(one.times) != len(other.times):
            return self.mutate(one, random)
        places = self.axis.of(one.times)
        if "times" in self.open:
            count = len(places)
            share = random.uniform() if random.random() < 0.5 else (random.random(count) < 0.5).astype(float)
            places = places + share * (self.axis.of(other.times) - places)
        kept = random.random(len(one.steps)) < (0.5 if random.random() < 0.5 else round(random.random()))
        pairs = zip(one.steps, other.steps, kept, strict=True)
        steps = [mine if stays else self._taken(mine, theirs) for mine, theirs, stays in pairs]
        return self.settled(places, steps, one.end, one.skip_first)

    def _taken(self, step: Decision, other: Decision) -> Decision:
        """The other decision in all that is open; unchanged where that would contradict the rest."""
        if self._complete:
            return other
        names = {field.name: "relaxation" if field.name == "strength" else field.name for field in fields(Decision)}
        try:
            return replace(step, **{name: getattr(other, name) for name, gene in names.items() if gene in self.open})
        except UsageError:
            return step

    def vector(self, candidate: SolverSchedule) -> np.ndarray:
        """Places of the times in units of the mean gap, strengths of relaxations, momenta (doubled)."""
        places = self.axis.of(candidate.times) * self.nfe / self.axis.top
        knobs = [read(candidate.steps[index]) for index, read, _ in self._knobs(candidate)]
        return np.array([*places[self._movable(candidate)], *knobs])

    def with_vector(self, candidate: SolverSchedule, vector: np.ndarray) -> SolverSchedule:
        """The candidate with these real numbers, moved to where they are allowed."""
        places, movable = self.axis.of(candidate.times), self._movable(candidate)
        count = len(places[movable])
        places[movable] = np.asarray(vector[:count]) * self.axis.top / self.nfe
        steps = list(candidate.steps)
        for value, (index, _, put) in zip(vector[count:], self._knobs(candidate), strict=True):
            steps[index] = put(steps[index], float(value))
        return self.settled(places, steps, candidate.end, candidate.skip_first)

    def tokens(self, candidate: SolverSchedule) -> np.ndarray:
        """One row per network call, see `tokens.tokens`."""
        return tokens(candidate, self.schedule).numpy()

    def settled(
        self, places: np.ndarray, steps: Sequence[Decision], end: float = 0.0, skip_first: bool = False
    ) -> SolverSchedule:
        """A valid schedule of exactly `nfe` calls near to what is asked, written in one way only.

        Nodes are added in the widest gap or taken from the narrowest, times kept apart, decisions that make no difference
        set to their defaults.
        """
        steps = [replace(step) for step in steps]
        places = list(np.sort(np.asarray(places, dtype=np.float64))[::-1])
        steps[-1] = replace(steps[-1], corrector="none")
        while (spent := _calls(steps, skip_first)) != self.nfe:
            if spent > self.nfe and len(places) == 1 + skip_first:
                skip_first, steps = False, [replace(step, corrector="none") for step in steps]
                continue
            gaps = -np.diff([*places, 0.0])
            if spent > self.nfe:
                gone = 1 + int(np.argmin(gaps[:-1])) if len(places) > 1 else 0
                gone = min(gone, len(places) - 1)
                del places[gone], steps[gone]
                steps[-1] = replace(steps[-1], corrector="none")
            else:
                wide = int(np.argmax(gaps))
                places.insert(wide + 1, places[wide] - 0.5 * gaps[wide])
                steps.insert(wide + 1, replace(steps[wide], corrector="none"))
        times = self.axis.times(self._apart(np.array(places)))
        last = len(steps) - 1
        end = end if end == 0.0 else self._end(end, times[-1])
        steps = [_canonical(step, index, index == last, end == 0.0) for index, step in enumerate(steps)]
        return SolverSchedule(times, tuple(steps), end, skip_first)

    def nearest(self, candidate: SolverSchedule) -> SolverSchedule:
        """The candidate as this space writes it, with the number of calls of this space."""
        return self.settled(self.axis.of(candidate.times), candidate.steps, candidate.end, candidate.skip_first)

    def skipping(self, candidate: SolverSchedule, skip_first: bool) -> SolverSchedule:
        """The candidate without a network call at its first time and one more time, or the other way round."""
        wanted = skip_first and "skip-first" in self.open
        return self.settled(self.axis.of(candidate.times), candidate.steps, candidate.end, wanted)

    def _movable(self, candidate: SolverSchedule) -> slice:
        """Which times are real numbers of a candidate."""
        return slice(self._pinned if "times" in self.open else len(candidate.times), None)

    @property
    def _pinned(self) -> int:
        """How many of the first times stay where they are: flows start from pure noise."""
        return int(isinstance(self.schedule, Flow))

    def _apart(self, places: np.ndarray) -> np.ndarray:
        """Places inside the schedule, with a gap between any two."""
        top, bottom, count = self.axis.top, self.axis.bottom, len(places)
        gap = min(0.004 * top, 0.5 * (top - bottom) / count)
        if self._pinned:
            places[0] = top
        high = top - gap * np.arange(count)
        low = bottom + gap * np.arange(count)[::-1]
        for index in range(count):
            places[index] = min(max(places[index], low[index]), high[index])
            if index and places[index - 1] - places[index] < (1.0 - 1e-4) * gap:  # times are rounded
                places[index] = places[index - 1] - gap
        return places

    def _end(self, end: float, last: float) -> float:
        """An end level below the last call; one at or above it is the clean image."""
        return end if end < 0.7 * float(self.schedule.rho(last)) else 0.0

    def _decision(self, random: np.random.Generator) -> Decision:
        """A random decision of the genes that are open."""
        step = Decision(order=2, core="velocity", variable="angle")
        for gene in ("order", "core", "variable", "relaxation", "carry", "corrector"):
            if gene in self.open and (gene in ("order", "core", "variable") or random.random() < 0.4):
                step = _DRAWS[gene](step, random)
        return step

    def _changed(self, candidate: SolverSchedule, random: np.random.Generator) -> SolverSchedule:
        weights = {gene: _WEIGHTS[gene] for gene in GENES if gene in self.open}
        names, total = list(weights), sum(weights.values())
        gene = names[int(random.choice(len(names), p=[weights[name] / total for name in names]))]
        places, steps = self.axis.of(candidate.times), list(candidate.steps)
        end, skip = candidate.end, candidate.skip_first
        if gene == "times":
            self._shift(places, random)
        elif gene == "skip-first":
            return self.skipping(candidate, not skip)
        elif gene == "end":
            low = float(self.schedule.rho(self.schedule.t_min))
            end = 0.0 if end else low * float(np.exp(random.uniform(-3.0, 0.0)))
        else:
            first = int(random.integers(len(steps)))
            chosen = range(first, len(steps)) if random.random() < 0.25 else [first]
            for index in chosen:
                steps[index] = _DRAWS[gene](steps[index], random)
        return self.settled(places, steps, end, skip)

    def _shift(self, places: np.ndarray, random: np.random.Generator) -> None:
        size = float(np.exp(random.uniform(math.log(0.03), math.log(0.6))))
        if random.random() < 0.3:  # all of them
            gaps = -np.diff([*places, 0.0])
            places += size * 0.5 * gaps * random.standard_normal(len(places))
            return
        index = int(random.integers(self._pinned, len(places))) if len(places) > self._pinned else 0
        move = size * random.standard_normal()
        above = places[index - 1] if index else self.axis.top
        below = places[index + 1] if index + 1 < len(places) else 0.0
        places[index] += abs(move) * (above - places[index]) if move > 0 else -abs(move) * (places[index] - below)

    def _knobs(self, candidate: SolverSchedule) -> list[tuple[int, Callable, Callable]]:
        """(step, how to read, how to write) of the real numbers of decisions."""
        found = []
        for index, step in enumerate(candidate.steps):
            relaxed = step.order > 1 or step.corrector != "none"
            if "relaxation" in self.open and relaxed and step.relaxation in _KNOBS:
                found.append((index, lambda one: one.strength, _with_strength))
            if "carry" in self.open and index and step.start == 1:
                found.append((index, lambda one: 2.0 * one.carry, lambda one, value: _with_carry(one, 0.5 * value)))
        return found


def _calls(steps: Sequence[Decision], skip_first: bool) -> int:
    return len(steps) - skip_first + sum(step.corrector == "implicit" for step in steps)


def _canonical(step: Decision, index: int, last: bool, clean: bool) -> Decision:
    """The decision without what makes no difference at this place."""
    nothing = last and clean and step.variable == "log-rho"  # to expand in: it is infinite at the end
    order = 1 if nothing else min(step.order, index + 1)
    start = step.start if order > 1 and step.start <= index + 1 else 1  # of the first order, it would waste a call
    corrector = "none" if last else step.corrector
    carry = step.carry if index and start == 1 else 0.0
    points = step.points[: order - 1] if step.points else ()
    points = tuple(min(max(q, n), index) for q, n in enumerate(points, 1))
    if points == (order - 1,) * (order - 1):
        points = ()
    variable, relaxation, strength = step.variable, step.relaxation, step.strength
    if order == 1 and corrector == "none":
        variable, relaxation = "log-rho", "none"
        if not carry:
            return Decision()
    if (variable, relaxation) == ("step", "bh2"):
        relaxation = "none"
    if relaxation not in ("scale", "linear") or (relaxation == "scale" and strength == 1.0):
        strength = 1.0
        relaxation = "none" if relaxation == "scale" else relaxation
    return Decision(order, step.core, variable, start, points, relaxation, strength, carry, corrector)


def _with_strength(step: Decision, strength: float) -> Decision:
    return replace(step, relaxation="scale", strength=float(np.clip(strength, *_STRENGTHS)))


def _with_carry(step: Decision, carry: float) -> Decision:
    return replace(step, carry=float(np.clip(carry, 0.0, _MAX_CARRY)))


def _free(step: Decision) -> Decision:
    """Without a relaxation that other cores and variables do not have."""
    return replace(step, relaxation="none") if step.relaxation not in ("none", "scale", "bh2") else step


def _draw_relaxation(step: Decision, random: np.random.Generator) -> Decision:
    if random.random() < 0.6:
        return _with_strength(
            step, (step.strength if step.relaxation == "scale" else 1.0) + 0.25 * random.standard_normal()
        )
    in_lambda = step.variable == "log-rho" and step.core != "velocity"
    names = [name for name in RELAXATIONS if name != "scale" and (in_lambda or name in ("none", "bh2"))]
    name = names[int(random.integers(len(names)))]
    return replace(step, relaxation=name, strength=0.03 * random.standard_normal() if name == "linear" else 1.0)


def _draw_points(step: Decision, random: np.random.Generator) -> Decision:
    if step.order < 2 or step.points:
        return replace(step, points=())
    return replace(step, points=tuple(int(random.integers(q, step.order + 1)) for q in range(1, step.order)))


def _draw_carry(step: Decision, random: np.random.Generator) -> Decision:
    if step.start > 1:
        return step
    return (
        replace(step, carry=0.0)
        if random.random() < 0.3
        else _with_carry(step, step.carry + 0.15 * random.standard_normal())
    )


def _choice(names: Sequence, random: np.random.Generator, weights: Sequence[float] | None = None):
    return names[int(random.choice(len(names), p=weights))]


_DRAWS: dict[str, Callable[[Decision, np.random.Generator], Decision]] = {
    "order": lambda step, random: replace(step, order=1 + int(random.choice(4, p=_ORDERS)), points=()),
    "core": lambda step, random: replace(_free(step), core=_choice(list(QUANTITIES), random)),
    "variable": lambda step, random: replace(_free(step), variable=_choice(TAYLOR_VARIABLES, random)),
    "start": lambda step, random: replace(step, start=1 if step.start > 1 else 2, carry=0.0),
    "points": _draw_points,
    "relaxation": _draw_relaxation,
    "carry": _draw_carry,
    "corrector": lambda step, random: replace(step, corrector=_choice(CORRECTORS, random, (0.45, 0.5, 0.05))),
}
_WEIGHTS = {
    "times": 8.0,
    "order": 1.5,
    "core": 1.5,
    "variable": 1.5,
    "start": 0.3,
    "points": 0.5,
    "relaxation": 3.0,
    "carry": 1.5,
    "corrector": 1.5,
    "skip-first": 0.7,
    "end": 0.3,
}
