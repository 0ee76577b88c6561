"""A sampling plan that was made for one model, as a file and as a scheduler."""

import inspect
import json
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ..core.config import build, to_dict
from ..core.errors import DataError, UsageError, unknown
from ..core.files import write_atomic
from ..core.grids import Grid
from ..core.prediction import convert
from ..core.schedule import Flow, NoiseSchedule, from_diffusers
from .config import COMMON, MODEL_KEYS, SPACING_KEYS, common, configured, translated, validate
from .ddim import ddim_row
from .plan import Plan, Row, Run
from .shell import PlanScheduler
from .usf import SolverSchedule, levels_at

FORMAT, VERSION = "diffaccel solver schedule", 1
_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(common).parameters.items()}


@dataclass(frozen=True)
class PlanFile:
    """What a plan file says.

    Attributes:
        plan: the coefficients that are executed.
        decisions: what they follow from; None for rules that no `SolverSchedule` expresses.
        scheduler: configuration of the scheduler of the model that it was made for, what differs from the defaults.
        record: how it was found: objective, cost, seeds, scores, versions.
        layers: what is left out of the network, call by call; see `search.layers`. {} for nothing.
    """

    plan: Plan
    decisions: SolverSchedule | None = None
    scheduler: Mapping = field(default_factory=dict)
    record: Mapping = field(default_factory=dict)
    layers: Mapping = field(default_factory=dict)

    def to_dict(self) -> dict:
        """The file as JSON types."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "nfe": self.plan.nfe,
            "decisions": self.decisions and self.decisions.to_dict(),
            "scheduler": dict(self.scheduler),
            "layers": dict(self.layers),
            "record": dict(self.record),
            "plan": to_dict(self.plan),
        }

    @classmethod
    def from_dict(cls, content: Mapping) -> "PlanFile":
        """Read `to_dict`.

        Raises:
            DataError: not a plan, a later version, decisions or coefficients that make no sense or contradict each other.
        """
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            raise DataError(f'This is not a plan of `diffaccel search`: it does not say "format": "{FORMAT}".')
        if content.get("version") != VERSION:
            raise DataError(f"This plan has version {content.get('version')!r}; this diffaccel reads {VERSION}.")
        try:
            parts = json.loads(_text(content))  # a copy of its own
            nfe = parts.pop("nfe", None)
            file = build(cls, {key: value for key, value in parts.items() if key not in ("format", "version")})
            _check_consistent(file)
            if nfe != file.plan.nfe:
                raise UsageError(f"It says it has {nfe!r} network calls, but its table has {file.plan.nfe} rows.")
        except (UsageError, TypeError, ArithmeticError, RecursionError) as error:
            raise DataError(f"This plan makes no sense: {textwrap.shorten(str(error), 400)}") from error
        return file

    def save(self, path) -> None:
        """Write the file; it is complete or absent.

        Raises:
            UsageError: a record that JSON cannot hold, such as an infinite score; see also `core.files.write_atomic`.
        """
        write_atomic(path, _text(self.to_dict()) + "\n")

    @classmethod
    def load(cls, path) -> "PlanFile":
        """Read `save`.

        Raises:
            DataError: no such file, not JSON, or see `from_dict`.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"Cannot read the plan {path}: {reason}.") from None
        try:
            return cls.from_dict(content)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def grid(self, schedule: NoiseSchedule) -> Grid:
        """The last call and the end of a run, after all other nodes where there are decisions.

        Raises:
            UsageError: times off the schedule, an end above the last call.
        """
        if self.decisions is not None:
            return self.decisions.grid(schedule)
        last, (alpha, sigma) = self.plan.rows[-1], map(float, schedule.end_from_rho(0.0))
        return Grid(schedule, (last.t, schedule.t_end), (last.alpha, alpha), (last.sigma, sigma))


class SearchedScheduler(PlanScheduler):
    """The plan that `diffaccel search` found, in any diffusers pipeline of the model that it was searched for.

        pipe.scheduler = diffaccel.SearchedScheduler.from_file("plan.json", pipe.scheduler.config)
        pipe(prompt, num_inference_steps=5)

    A plan has its own times and as many network calls as it was searched for. ``sigmas`` that pipelines for flows pass
    without being asked are set aside, and so is their ``mu``.

    Args:
        plan: the content of a plan file.
        **shared: see `config.common`; grids and spacings have no effect.

    Raises:
        UsageError: no plan, or one for another noise schedule.
        DataError: a plan that makes no sense.
    """

    __module__ = "diffaccel"

    @configured
    def __init__(self, plan: dict | None = None, **shared):
        super().__init__()
        if plan is None:
            raise UsageError(
                "SearchedScheduler needs a plan: SearchedScheduler.from_file('plan.json', pipe.scheduler.config)."
            )
        self.file = PlanFile.from_dict(plan)
        check_levels(self.file.plan, self.noise_schedule)
        if self.file.plan.initial != 1.0 and isinstance(self.noise_schedule, Flow):
            raise UsageError("This plan scales the initial noise, which pipelines for flows do not do.")
        self.init_noise_sigma = self.file.plan.initial

    @classmethod
    def from_file(cls, path, config: Mapping | None = None, **overrides) -> "SearchedScheduler":
        """Open a plan file; with a warning if it also leaves layers out, which takes `apply_plan`.

        Args:
            path: of the file.
            config: ``pipe.scheduler.config`` of the pipeline it goes into; None for the one it was searched for.
            **overrides: values on top of that configuration.

        Raises:
            DataError: a file that cannot be read or makes no sense.
            UsageError: a plan for another noise schedule, a configuration that is none.
        """
        if not isinstance(config, (Mapping, type(None))):
            raise UsageError(f"Pass pipe.scheduler.config to from_file, not {type(config).__name__}.")
        file = PlanFile.load(path)
        if file.layers:
            warnings.warn(
                f"{path} leaves layers out, which a scheduler cannot do: the whole network will run. "
                f"Use diffaccel.apply_plan(pipe, {str(path)!r}).",
                stacklevel=2,
            )
        return cls.from_config(dict(file.scheduler) if config is None else config, plan=file.to_dict(), **overrides)

    def plan(self, grid: Grid) -> Plan:
        """The plan of the file, whatever the grid."""
        return self.file.plan

    def calls(self, steps: int) -> int:
        """Network calls of a run, a guidance pair counted once: as many as the plan has."""
        return self.file.plan.nfe

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device=None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        nfe: int | None = None,
    ) -> None:
        """Prepare a run of the plan.

        Args:
            num_inference_steps, nfe: the plan's number of network calls; both say the same.
            device: where `timesteps` goes.
            timesteps: none; the plan has its own.
            sigmas: evenly spaced ones of pipelines for flows, whose number counts and nothing else.
            mu: set aside.

        Raises:
            UsageError: another number of calls, or explicit times.
        """
        plan = self.file.plan
        if timesteps is not None or (sigmas is not None and not _evenly_spaced(sigmas)):
            raise UsageError(
                f"A searched plan has its own times: pass num_inference_steps={plan.nfe} and neither timesteps nor sigmas."
            )
        asked = [n for n in (num_inference_steps, nfe, None if sigmas is None else len(sigmas)) if n is not None]
        if wrong := [n for n in asked if n != plan.nfe]:
            raise UsageError(
                f"This plan was searched for {plan.nfe} network calls: pass num_inference_steps={plan.nfe} "
                f"instead of {wrong[0]}, or search one for that many."
            )
        self._prepare(self.file.grid(self.noise_schedule), plan, plan.nfe, device)

    def steps_for(self, nfe: int) -> int:
        """The plan's number of network calls, if the budget is that.

        Raises:
            UsageError: another budget.
        """
        if nfe != self.file.plan.nfe:
            raise UsageError(f"This plan was searched for {self.file.plan.nfe} network calls; got a budget of {nfe!r}.")
        return nfe

    def _rest(self, index: int) -> Sequence[Row]:
        rows, decisions, end = self._plan.rows[index:], self.file.decisions, self._grid
        if decisions is None:  # from level to level in the first order
            levels = [(row.t, row.alpha, row.sigma) for row in rows] + [(end.times[-1], end.alpha[-1], end.sigma[-1])]
            return [*map(ddim_row, levels, levels[1:])]
        node, _ = decisions.node_of_call(index)
        rest = decisions.tail(node).compile(self.noise_schedule).rows
        # The first of two calls at a node has no correction to make before the second.
        idle = [replace(row, states=(1.0,), outputs=()) for row in rows[: len(rows) - len(rest)]]
        return [*idle, *rest]


def model_config(config: Mapping) -> dict:
    """What a plan file keeps of the configuration of a model's scheduler: noise, predictions, clipping; no spacing."""
    config = {key: value for key, value in translated(config).items() if key in COMMON and key not in SPACING_KEYS}
    return {key: value for key, value in config.items() if key in MODEL_KEYS or value != _DEFAULTS[key]}


def check_levels(plan: Plan, schedule: NoiseSchedule) -> None:
    """Refuse a plan whose times have other noise levels on this schedule, or none.

    Raises:
        UsageError: naming the first that differs.
    """
    try:
        alphas, sigmas = (level.tolist() for level in levels_at([row.t for row in plan.rows], schedule))
    except UsageError as error:
        raise UsageError(f"This plan was searched for another noise schedule. {error}") from error
    for row, alpha, sigma in zip(plan.rows, alphas, sigmas, strict=True):
        if not math.isclose(alpha, row.alpha, abs_tol=1e-6) or not math.isclose(sigma, row.sigma, abs_tol=1e-6):
            raise UsageError(
                f"This plan was searched for another noise schedule: at t = {row.t:g} it expects alpha, sigma = "
                f"{row.alpha:.4g}, {row.sigma:.4g}, this model has {alpha:.4g}, {sigma:.4g}."
            )


def _check_consistent(file: PlanFile) -> None:
    """Refuse coefficients that do not follow from the decisions or, without those, would not follow a straight path.

    Raises:
        UsageError: saying where.
    """
    schedule, plan = _schedule(file.scheduler), file.plan
    check_levels(plan, schedule)
    grid = file.grid(schedule)
    if file.decisions is None:
        _check_straight(plan, (grid.alpha[-1], grid.sigma[-1]))
        return
    expected = file.decisions.compile(schedule)
    kinds, numbers = zip(*map(_parts, (plan, expected)), strict=True)
    if kinds[0] != kinds[1] or not np.allclose(*numbers, rtol=1e-6, atol=1e-6):
        raise UsageError("Its coefficients do not follow from its decisions; one of them was edited.")


def _check_straight(plan: Plan, end: tuple[float, float]) -> None:
    """Where every output is that of one pair (x0, ε), states are α·x0 + σ·ε; x0 = 0 after a skipped first step."""
    basis = torch.diag(torch.tensor([float(plan.initial == 1.0), 1.0], dtype=torch.float64))  # x0 and ε
    levels = torch.tensor([*((row.alpha, row.sigma) for row in plan.rows), end], dtype=torch.float64)
    run = Run(plan)
    for index, row in enumerate(plan.rows):
        size = 1.0 + sum(map(abs, (*row.states, *row.outputs)))
        if row.noise or size == 1.0:
            raise UsageError(f"Row {index} adds noise or keeps nothing, which no searched plan does.")
        x, following = levels[index] @ basis, levels[index + 1] @ basis
        result = run.advance(x, convert(basis[0], x, "sample", row.quantity, row.alpha, row.sigma))
        if not torch.allclose(result / size, following / size, rtol=0.0, atol=1e-9):
            raise UsageError(f"The coefficients of row {index} lead to no noise level; they were edited.")


def _parts(plan: Plan) -> tuple[list, list[float]]:
    """What must be equal in equal plans, and what may be rounded, with the zeros that rows leave out."""
    numbers = [plan.initial]
    for index, row in enumerate(plan.rows):
        numbers += [row.t, row.alpha, row.sigma, row.noise]
        for coefficients in (row.states, row.outputs):
            numbers += [*coefficients, *[0.0] * (index + 1 - len(coefficients))]
    return [plan.order, *(row.quantity for row in plan.rows)], numbers


def _schedule(config: Mapping) -> NoiseSchedule:
    """The noise schedule of what `model_config` kept."""
    for key in config:
        if key not in COMMON:
            raise unknown("key of its scheduler", key, COMMON)
    validate({**_DEFAULTS, **config})
    try:
        return from_diffusers({"num_train_timesteps": 1000, **config})
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        raise UsageError(f"Its scheduler has no noise schedule: {error}") from error


def _text(content: Mapping) -> str:
    try:
        return json.dumps(content, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"A plan holds finite numbers and text only: {error}.") from error


def _evenly_spaced(sigmas) -> bool:
    try:
        gaps = np.diff([float(value) for value in sigmas])
    except (TypeError, ValueError):
        return False
    return np.allclose(gaps, gaps[:1], rtol=1e-3, atol=1e-6)
