"""A sampling plan that was made for one model, as a file and as a scheduler."""

import inspect
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..core.errors import DataError, UsageError
from ..core.files import write_atomic
from ..core.grids import Grid
from ..core.schedule import Flow, NoiseSchedule, from_diffusers
from .config import MODEL_KEYS, SPACING_KEYS, common, configured, translated
from .ddim import ddim_row
from .plan import Plan, Row
from .shell import PlanScheduler
from .usf import SolverSchedule

FORMAT, VERSION = "diffaccel solver schedule", 1


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
        plan = asdict(self.plan)
        return {
            "format": FORMAT,
            "version": VERSION,
            "nfe": self.plan.nfe,
            "decisions": self.decisions and self.decisions.to_dict(),
            "scheduler": dict(self.scheduler),
            "layers": dict(self.layers),
            "record": dict(self.record),
            "plan": {**plan, "rows": [{**row, "states": [*row["states"]], "outputs": [*row["outputs"]]} for row in plan["rows"]]},
        }  # fmt: skip

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
        for key in ("scheduler", "record", "layers"):
            if not isinstance(content.get(key, {}), Mapping):
                raise DataError(f"The plan's {key!r} must be a JSON object; got {content[key]!r}.")
        told = content.get("decisions")
        decisions = None if told is None else SolverSchedule.from_dict(told)
        try:
            config = dict(content.get("scheduler", {}))
            schedule = from_diffusers({"num_train_timesteps": 1000, **config})
            plan = Plan.from_json(json.dumps(content.get("plan")))
            _check_consistent(plan, decisions, schedule)
        except (UsageError, TypeError, ValueError, ArithmeticError) as error:
            raise error if isinstance(error, DataError) else DataError(f"This plan makes no sense: {error}") from error
        if content.get("nfe", plan.nfe) != plan.nfe:
            raise DataError(f"This plan says it has {content['nfe']} network calls, but its table has {plan.nfe} rows.")
        return cls(plan, decisions, config, dict(content.get("record", {})), dict(content.get("layers", {})))

    def save(self, path) -> None:
        """Write the file; it is complete or absent.

        Raises:
            UsageError, DiffaccelError: see `core.files.write_atomic`.
        """
        write_atomic(path, json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path) -> "PlanFile":
        """Read `save`.

        Raises:
            DataError: no such file, not JSON, or see `from_dict`.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise DataError(f"Cannot read the plan {path}: {reason}.") from None
        try:
            return cls.from_dict(content)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error


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
        if isinstance(self.noise_schedule, Flow) and self.file.plan.initial != 1.0:
            raise UsageError("This plan scales the initial noise, which pipelines for flows do not do.")
        self.init_noise_sigma = self.file.plan.initial

    @classmethod
    def from_file(cls, path, config: Mapping | None = None, **overrides) -> "SearchedScheduler":
        """Open a plan file.

        Args:
            path: of the file.
            config: ``pipe.scheduler.config`` of the pipeline it goes into; None for the one it was searched for.
            **overrides: values on top of that configuration.

        Raises:
            DataError: a file that cannot be read or makes no sense.
            UsageError: a plan for another noise schedule.
        """
        file = PlanFile.load(path)
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
        if any(n != plan.nfe for n in asked):
            raise UsageError(
                f"This plan was searched for {plan.nfe} network calls: pass num_inference_steps={plan.nfe} "
                f"instead of {next(n for n in asked if n != plan.nfe)}, or search one for that many."
            )
        decisions, schedule, last = self.file.decisions, self.noise_schedule, plan.rows[-1]
        if decisions is None:
            end = [float(value) for value in schedule.end_from_rho(0.0)]
            grid = Grid(schedule, (last.t, schedule.t_end), (last.alpha, end[0]), (last.sigma, end[1]))
        else:
            grid = decisions.grid(schedule)
        self._prepare(grid, plan, plan.nfe, device)

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
        idle = [Row(row.t, row.alpha, row.sigma, row.quantity, (1.0,), ()) for row in rows[: len(rows) - len(rest)]]
        return [*idle, *rest]


def model_config(config: Mapping) -> dict:
    """What a plan file keeps of the configuration of a model's scheduler: noise, predictions, clipping; no spacing."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(common).parameters.items()}
    config = {key: value for key, value in translated(config).items() if key in defaults and key not in SPACING_KEYS}
    return {key: value for key, value in config.items() if key in MODEL_KEYS or value != defaults[key]}


def check_levels(plan: Plan, schedule: NoiseSchedule) -> None:
    """Refuse a plan whose times have other noise levels on this schedule.

    Raises:
        UsageError: naming the first that differs.
    """
    for row in plan.rows:
        alpha, sigma = (float(value) for value in schedule.level(row.t))
        if not math.isclose(alpha, row.alpha, abs_tol=1e-6) or not math.isclose(sigma, row.sigma, abs_tol=1e-6):
            raise UsageError(
                f"This plan was searched for another noise schedule: at t = {row.t:g} it expects sigma = {row.sigma:.4g}, "
                f"this model has {sigma:.4g}."
            )


def _check_consistent(plan: Plan, decisions: SolverSchedule | None, schedule: NoiseSchedule) -> None:
    """Refuse coefficients that do not follow from the decisions, or that would not even follow a straight path.

    Where every output is that of one pair (x0, ε), any solver's states are α·x0 + σ·ε; after a skipped first step the
    x0 in it is 0.

    Raises:
        UsageError: saying where.
    """
    check_levels(plan, schedule)
    if decisions is not None:
        expected = decisions.compile(schedule, plan.name)
        if not _close(plan, expected):
            raise UsageError("Its coefficients do not follow from its decisions; one of them was edited.")
    directions = {"sample": (1.0, 0.0), "epsilon": (0.0, 1.0), "flow_prediction": (-1.0, 1.0)}
    ends = [(row.alpha, row.sigma) for row in plan.rows[1:]]
    if decisions is not None:
        grid = decisions.grid(schedule)
        ends.append((grid.alpha[-1], grid.sigma[-1]))
    else:
        ends.append(tuple(float(value) for value in schedule.end_from_rho(0.0)))
    for index, (row, end) in enumerate(zip(plan.rows, ends, strict=True)):
        known = plan.rows[index::-1]
        for part in (0, 1) if plan.initial == 1.0 else (1,):
            outputs = [directions.get(past.quantity, (-past.sigma, past.alpha))[part] for past in known]
            states = [(past.alpha, past.sigma)[part] for past in known]
            found = sum(c * value for c, value in zip(row.states, states, strict=False))
            found += sum(c * value for c, value in zip(row.outputs, outputs, strict=False))
            size = sum(map(abs, (*row.states, *row.outputs))) + 1.0
            if not math.isclose(found, end[part], abs_tol=1e-6 * size):
                raise UsageError(f"the coefficients of row {index} lead to no noise level; they were edited.")


def _close(plan: Plan, expected: Plan) -> bool:
    def numbers(row: Row) -> list:
        return [row.t, row.alpha, row.sigma, row.noise, len(row.states), *row.states, *row.outputs]

    if len(plan.rows) != len(expected.rows) or not math.isclose(plan.initial, expected.initial, rel_tol=1e-9):
        return False
    for row, other in zip(plan.rows, expected.rows, strict=True):
        mine, theirs = numbers(row), numbers(other)
        if len(mine) != len(theirs) or row.quantity != other.quantity:
            return False
        if not all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6) for a, b in zip(mine, theirs, strict=True)):
            return False
    return True


def _evenly_spaced(sigmas) -> bool:
    values = [float(value) for value in sigmas]
    gaps = [a - b for a, b in itertools.pairwise(values)]
    return all(math.isclose(gap, gaps[0], rel_tol=1e-3, abs_tol=1e-6) for gap in gaps)
