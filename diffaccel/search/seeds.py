"""Where searches start: every sampler of this package on every grid, as it would be set by hand."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ..core.errors import UsageError
from ..core.schedule import Flow
from ..core.spacings import GRIDS
from ..samplers.plan import Plan
from ..samplers.registry import get_sampler
from ..samplers.sample import sample
from ..samplers.searched import PlanFile
from ..samplers.shell import PlanScheduler
from ..samplers.usf import Decision, SolverSchedule
from .subjects import Subject


@dataclass(frozen=True)
class HandSet:
    """A sampler with its settings, and the decisions that it makes at every step.

    Attributes:
        sampler: name in the registry.
        options: of its scheduler.
        order: Taylor order of its steps; 0 for rules that are no solver schedule.
        core: what it integrates; "" for velocity on flows and noise elsewhere.
        variable, carry: see `Decision`; a negative carry stands for that of `FlowAdamsScheduler`.
        relaxed: relaxation of steps with one derivative, where they have one.
        corrected: whether steps are redone.
        falling: whether the order falls to 1 towards the end.
    """

    sampler: str
    options: Mapping = field(default_factory=dict)
    order: int = 0
    core: str = ""
    variable: str = "log-rho"
    carry: float = 0.0
    relaxed: str = "none"
    corrected: bool = False
    falling: bool = False

    @property
    def label(self) -> str:
        """The name and what is set besides."""
        return " ".join([self.sampler, *(f"{key}={value}" for key, value in self.options.items())])

    def decide(self, times: tuple[float, ...], flow: bool) -> SolverSchedule:
        """Its solver schedule at these times."""
        steps, count = [], len(times)
        for i in range(count):
            order = min(self.order, i + 1, count - i if self.falling else self.order)
            corrected = self.corrected and i + 1 < count
            relaxed = self.relaxed if order == 2 or (order == 1 and corrected) else "none"
            steps.append(
                Decision(
                    order=order,
                    core=self.core or ("velocity" if flow else "noise"),
                    variable=self.variable,
                    carry=0.0 if i == 0 else self.carry if self.carry >= 0.0 else 0.5 / count,
                    relaxation=relaxed,
                    corrector="pseudo" if corrected else "none",
                )
            )
        return SolverSchedule(times, tuple(steps))


_ANGLE = {"variable": "angle", "core": "velocity"}
RULES = (
    HandSet("flow-adams", {}, 2, carry=-1.0, corrected=True, **_ANGLE),
    HandSet("flow-adams", {"momentum": None}, 2, corrected=True, **_ANGLE),
    HandSet("flow-adams", {"solver_order": 3}, 3, carry=-1.0, corrected=True, **_ANGLE),
    HandSet("flow-adams", {"corrector": False, "momentum": None}, 2, **_ANGLE),
    HandSet("ddim", {}, 1),
    HandSet("deis", {}, 3, variable="t"),
    HandSet("deis", {"solver_order": 2}, 2, variable="t"),
    HandSet("deis", {"variable": "angle"}, 3, variable="angle"),
    HandSet("deis", {"variable": "angle", "core": "data", "solver_order": 2, "corrector": True}, 2, "data", "angle", corrected=True),
    HandSet("deis-rho", {}, 3, variable="rho"),
    HandSet("deis-log-rho", {}, 3),
    HandSet("ipndm", {}, 3, variable="step"),
    HandSet("ipndm", {"solver_order": 2}, 2, variable="step"),
    HandSet("ipndm", {"solver_order": 4}, 4, variable="step"),
    HandSet("heavy-ball", {}, 3, variable="step", carry=0.2),
    HandSet("ghvb", {}),
    HandSet("ghvb", {"ghvb_order": 2.5}),
    HandSet("dpm-solver", {}, 2, "data", relaxed="bh2", falling=True),
    HandSet("dpm-solver-3m", {}, 3, "data", relaxed="bh2", falling=True),
    HandSet("unipc", {}, 2, "data", relaxed="bh2", corrected=True, falling=True),
    HandSet("unipc", {"solver_order": 3}, 3, "data", relaxed="bh2", corrected=True, falling=True),
    HandSet("rho-heun", {}),
    HandSet("rho-kutta", {}),
    HandSet("rho-rk4", {}),
)  # fmt: skip
PLANNED = (RULES[0], RULES[3], RULES[11])  # that times found otherwise are tried with
_POWERS = (
    {"grid": "fast", "grid_power": 1.5},
    {"grid": "fast", "grid_power": 2.0},
    {"grid": "quadratic", "grid_power": 1.5},
)
_STARTS = 7  # of the network by which plans are compared


def hand_set(subject: Subject, nfe: int) -> Iterator[tuple[str, PlanFile]]:
    """(label, plan) of all deterministic samplers on all grids that spend exactly so many network calls.

    Grids and rules that the model or the number of calls does not allow are left out, and so are plans that take every
    network where one before them does, such as most rules with a single call.
    """
    ends = torch.full((1, _STARTS), torch.inf, dtype=torch.float64)
    for rule in RULES:
        for grid in [*({"grid": name} for name in GRIDS), *_POWERS]:
            scheduler = _prepared(rule, grid, subject, nfe)
            if scheduler is None:
                continue
            end = _end(scheduler.current_plan)
            if not _equal(ends, end).any():
                ends = torch.cat([ends, end[None]])
                where = " ".join(f"{key}={value}" for key, value in grid.items())
                yield f"{rule.label} {where}", _file(rule, scheduler.current_plan, end, subject)


def _prepared(rule: HandSet, grid: Mapping, subject: Subject, nfe: int) -> PlanScheduler | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = get_sampler(rule.sampler).build(subject.config, **{**rule.options, **grid})
            scheduler.set_timesteps(scheduler.steps_for(nfe))
    except UsageError:
        return None
    return scheduler if scheduler.current_plan.nfe == nfe else None


def _file(rule: HandSet, plan: Plan, end: torch.Tensor, subject: Subject) -> PlanFile:
    """The plan with the decisions that it follows from, if there are any."""
    if rule.order:
        decisions = rule.decide(tuple(row.t for row in plan.rows), isinstance(subject.schedule, Flow))
        compiled = decisions.compile(subject.schedule, plan.name)
        if _equal(end, _end(compiled)):
            return subject.file(compiled, decisions)
    return subject.file(plan)


def _end(plan: Plan) -> torch.Tensor:
    """(_STARTS,) where a plan takes a nonlinear network: equal plans may store its outputs in different ways."""

    def network(state, t, condition):
        return torch.sin(3.0 * state + t[:, None] * 1e-2)

    return sample(network, torch.linspace(-2.0, 2.0, _STARTS, dtype=torch.float64)[:, None], plan).flatten()


def _equal(ends: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    return (ends - end).abs().amax(-1) < 1e-6
