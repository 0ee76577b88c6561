"""Solver schedules: one decision per step, and the plan that follows from them.

The unified sampling framework of Liu et al. 2024 (arXiv 2312.07243), in which every exponential solver is a choice, step
by step, of a Taylor order, of what is integrated, of how derivatives are estimated and of what is corrected. Here it is
written for any variable z that the integrated quantity f may be smooth in, not for λ = −log ρ alone: a step from node s is

    x' = A·x_s + W·u,     u = f_s + Σ_q R_q·M_q·d_q,     M_q the mean of (z − z_s)^q/q! over the step,  q = 1 … order − 1

with A, W and the mean those of the core (`multistep.Core`), d_q the q-th derivative of f estimated by differences, and
R_1 the relaxation (R_q = 1 for q > 1). In z = λ this is the paper's update.
"""

import functools
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..core.config import build, to_dict
from ..core.errors import DataError, UsageError, unknown
from ..core.grids import Grid
from ..core.prediction import coefficients
from ..core.schedule import Flow, NoiseSchedule
from .forms import Form, weighted
from .multistep import FAR, QUANTITIES, VARIABLES, Core
from .plan import Plan, Row

TAYLOR_VARIABLES = (*VARIABLES, "step")  # "step": the number of the node, as if all steps were equal
RELAXATIONS = ("none", "bh1", "bh2", "exp+", "exp-", "linear", "scale")
CORRECTORS = ("none", "pseudo", "implicit")
MAX_ORDER = 4
_IN_LAMBDA = ("bh1", "exp+", "exp-", "linear")  # relaxations that are functions of the step in λ
_STORED = "flow_prediction"  # well-conditioned at every level, whatever a later step makes of it


@dataclass(frozen=True)
class Decision:
    """What one step does.

    Attributes:
        order: Taylor order n, 1 … 4; 1 is DDIM. Steps take as many derivatives as there are evaluations.
        core: what is integrated, "noise", "data" or "velocity".
        variable: z of the derivatives, one of `TAYLOR_VARIABLES`.
        start: how many nodes back the step starts, 1 (multistep, from the newest node) or more (singlestep).
        points: for every derivative, how many other nodes estimate it; q or more for the q-th. () for as many as there
            are derivatives, which makes the rule exact for polynomials in z. Nodes after the start count first, the newest
            of them foremost, then those before it.
        relaxation: R_1 of the step. In λ with h its step (data: −h): "bh1" and "bh2" of UniPC (bh2 is also the ½ of
            DPM-Solver-2, and in other variables half the step in z), "exp+" and "exp-" 1 ± ½(e^h − 1), "linear"
            1 + strength·h; in every variable "scale", strength itself.
        strength: of the relaxations "linear" and "scale".
        carry: share of the mean slope of the step before that is kept, in [0, 1): heavy-ball momentum with
            β = 1 − carry (Wizadwongsa et al. 2024). Not for singlestep.
        corrector: what happens when the end of the step has been evaluated: "none"; "pseudo", the step is redone at order
            n + 1 with the new evaluation, which is kept; "implicit", and the network is called again there. A corrector
            with one derivative takes the relaxation of its step, others have none.

    Raises:
        UsageError: a name or number that does not exist.
    """

    order: int = 1
    core: str = "noise"
    variable: str = "log-rho"
    start: int = 1
    points: tuple[int, ...] = ()
    relaxation: str = "none"
    strength: float = 1.0
    carry: float = 0.0
    corrector: str = "none"

    def __post_init__(self):
        for key, names in (
            ("core", QUANTITIES),
            ("variable", TAYLOR_VARIABLES),
            ("relaxation", RELAXATIONS),
            ("corrector", CORRECTORS),
        ):
            if getattr(self, key) not in names:
                raise unknown(key, str(getattr(self, key)), names)
        if not _whole(self.order, 1) or self.order > MAX_ORDER:
            raise UsageError(f"The order of a step must be 1, 2, 3 or 4; got {self.order!r}.")
        if not _whole(self.start, 1):
            raise UsageError(f"The start of a step must be 1 (the newest node) or more nodes back; got {self.start!r}.")
        if self.points and not (
            len(self.points) == self.order - 1 and all(_whole(n, q) for q, n in enumerate(self.points, 1))
        ):
            raise UsageError(
                f"The points of a step of order {self.order} are {self.order - 1} whole numbers, the q-th at least q; got "
                f"{list(self.points)!r}."
            )
        if not (_real(self.carry) and 0.0 <= self.carry < 1.0):
            raise UsageError(f"The carry of a step must lie in [0, 1); got {self.carry!r}.")
        if not _real(self.strength):
            raise UsageError(f"The strength of a relaxation must be a finite number; got {self.strength!r}.")
        if self.carry and self.start > 1:
            raise UsageError("A step that starts further back has no momentum: set carry to 0 or start to 1.")
        if self.relaxation in _IN_LAMBDA and (self.variable != "log-rho" or self.core == "velocity"):
            raise UsageError(
                f"The relaxation {self.relaxation!r} is for the variable log-rho and the cores noise and data; got "
                f"{self.variable!r} and {self.core!r}."
            )


@dataclass(frozen=True)
class SolverSchedule:
    """Where a run calls the network, and what it does after every call.

    Attributes:
        times: (N,) native times of the nodes, strictly decreasing.
        steps: (N,) decisions, the i-th for the step from node i to node i + 1; the last goes to the end.
        end: ρ = σ/α of the result, 0 for the clean image.
        skip_first: the network is not called at the first node; its output there is taken to be ε = x/σ, x0 = 0 ("AFS").

    Raises:
        UsageError: numbers that do not fit together, a corrector on the last step.
    """

    times: tuple[float, ...]
    steps: tuple[Decision, ...]
    end: float = 0.0
    skip_first: bool = False

    def __post_init__(self):
        if not self.times or len(self.times) != len(self.steps):
            raise UsageError(
                f"A solver schedule needs as many steps as times, one at least; got {len(self.times)} times and "
                f"{len(self.steps)} steps."
            )
        if not all(_real(time) for time in self.times):
            raise UsageError(f"The times of a solver schedule must be finite numbers; got {list(self.times)!r}.")
        if not all(later < earlier for earlier, later in itertools.pairwise(self.times)):
            raise UsageError(f"The times of a solver schedule must decrease; got {list(self.times)!r}.")
        if not _real(self.end) or self.end < 0.0:
            raise UsageError(f"A solver schedule ends at a noise level σ/α of at least 0; got {self.end!r}.")
        if not isinstance(self.skip_first, bool) or (self.skip_first and len(self.times) == 1):
            raise UsageError(f"skip_first is true or false, and false with a single step; got {self.skip_first!r}.")
        if self.steps[-1].corrector != "none":
            raise UsageError("The last step has no corrector: its end is not evaluated.")
        for index, step in enumerate(self.steps):
            if step.start > index + 1:
                raise UsageError(f"Step {index} cannot start {step.start} nodes back: there are {index + 1}.")

    @property
    def nfe(self) -> int:
        """Network calls, without guidance."""
        return len(self._calls)

    def compile(self, schedule: NoiseSchedule, name: str = "searched") -> Plan:
        """The plan of these decisions on a noise schedule.

        Raises:
            UsageError: times off the schedule or too close together, an end above the last call, a first step skipped
                on a flow, a strength that leaves the range of floats.
        """
        try:
            return _Compiler(self, schedule).plan(name)
        except (ArithmeticError, np.linalg.LinAlgError) as error:
            raise UsageError("Two times of this solver schedule are too close together to be told apart.") from error

    def grid(self, schedule: NoiseSchedule) -> Grid:
        """The nodes and the end of a run.

        Raises:
            UsageError: times off the schedule, an end above the last call.
        """
        alpha, sigma = levels_at(self.times, schedule)
        end_alpha, end_sigma = schedule.end_from_rho(self.end)
        end_time = schedule.t_end
        if self.end and float(schedule.t_from_rho(self.end)) < self.times[-1]:
            end_time = float(schedule.t_from_rho(self.end))  # else below the cleanest time, where a table says no more
        return Grid(
            schedule,
            (*self.times, end_time),
            (*alpha.tolist(), float(end_alpha)),
            (*sigma.tolist(), float(end_sigma)),
        )

    def tail(self, node: int) -> "SolverSchedule":
        """What remains from a node on, for runs that begin there with nothing evaluated before."""
        steps = [
            replace(step, start=1) if step.start > known else step for known, step in enumerate(self.steps[node:], 1)
        ]
        return SolverSchedule(self.times[node:], tuple(steps), self.end)

    def node_of_call(self, call: int) -> tuple[int, bool]:
        """(node at which a network call happens, whether it is that node's second); calls count from 0."""
        return self._calls[call]

    @property
    def _calls(self) -> list[tuple[int, bool]]:
        twice = {node for node, step in enumerate(self.steps, 1) if step.corrector == "implicit"}
        nodes = range(self.skip_first, len(self.times))
        return [(node, again) for node in nodes for again in ((False, True) if node in twice else (False,))]

    def to_dict(self) -> dict:
        """The schedule as JSON types; what is at its default is left out of the steps."""
        defaults, always = to_dict(Decision()), ("order", "core", "variable")
        content = to_dict(self)
        content["steps"] = [
            {key: value for key, value in step.items() if key in always or value != defaults[key]}
            for step in content["steps"]
        ]
        return content

    @classmethod
    def from_dict(cls, content: Mapping) -> "SolverSchedule":
        """Read `to_dict`.

        Raises:
            DataError: saying which key, number or decision makes no sense.
        """
        try:
            if not isinstance(content, Mapping):
                raise UsageError(f"it must be a JSON object, got {content!r}.")
            return build(cls, content)
        except (UsageError, OverflowError) as error:
            raise DataError(f"This solver schedule makes no sense: {error}") from error


def levels_at(times: Sequence[float], schedule: NoiseSchedule) -> tuple[torch.Tensor, torch.Tensor]:
    """(α, σ), each (N,) float64, at the times of network calls.

    Raises:
        UsageError: a time that is off the schedule by more than rounding on another machine.
    """
    low, high = min(schedule.t_clean, schedule.t_min), schedule.t_max
    if not (low - 1e-6 <= min(times) and max(times) <= high + 1e-6):
        raise UsageError(
            f"The times of a solver schedule must lie between {low:g} and {high:g} on this noise schedule; got "
            f"{max(times):g} … {min(times):g}."
        )
    return schedule.level(torch.tensor(times, dtype=torch.float64))


class _Compiler:
    """Walks over the steps of a schedule, everything a linear form of what the network has seen and said.

    A state that the network has seen is that input, not what led to it: what pipelines change in between counts, and a
    run remembers no more than its rules look back.
    """

    def __init__(self, decisions: SolverSchedule, schedule: NoiseSchedule):
        if decisions.skip_first and isinstance(schedule, Flow):
            raise UsageError(
                "The first step of a flow cannot be skipped: its pipelines do not scale the noise they draw."
            )
        self.decisions, self.grid = decisions, decisions.grid(schedule)
        self.states: list[Form] = []  # by node, as corrected
        self.seen: list[Form] = []  # by node: the network input that its output belongs to
        self.outputs: list[Form] = []  # by node
        self.rows: list[Row] = []

    def plan(self, name: str) -> Plan:
        steps, grid, initial = self.decisions.steps, self.grid, 1.0
        if self.decisions.skip_first:  # x_0 = (σ_0/σ_1)·x_1, and ε − x0 = ε = x_0/σ_0
            initial = grid.sigma[1] / grid.sigma[0]
            x = Form.state(0) / initial
            self._keep(x, x, x / grid.sigma[0])
            following = self._step(0, steps[0])
        else:
            self._keep(*self._evaluated())
            following = self._close(self._step(0, steps[0]))
        for node, (before, step) in enumerate(itertools.pairwise(steps), 1):
            self._keep(*self._evaluated())
            far = before.core == "noise" and grid.rho[node - before.start] > FAR
            if before.corrector != "none" and not far:
                self.states[node] = self.states[node] + (self._step(node - 1, before, correct=True) - following)
            if before.corrector == "implicit":
                self._close(self.states[node])
                self.states[node], self.seen[node], self.outputs[node] = self._evaluated()
            following = self._close(self._step(node, step))
        return Plan(tuple(self.rows), name=name, initial=initial)

    def _keep(self, state: Form, seen: Form, output: Form) -> None:
        self.states.append(state)
        self.seen.append(seen)
        self.outputs.append(output)

    def _evaluated(self) -> tuple[Form, Form, Form]:
        """State, input and output of the node of the call whose row comes next."""
        here = Form.state(len(self.rows))
        return here, here, Form.output(len(self.rows))

    def _close(self, following: Form) -> Form:
        """Write the row of the newest call: what it leads to, which is returned."""
        grid, node = self.grid, len(self.states) - 1
        states, outputs = following.coefficients(len(self.rows))
        self.rows.append(Row(grid.times[node], grid.alpha[node], grid.sigma[node], _STORED, states, outputs))
        return following

    def _step(self, node: int, step: Decision, correct: bool = False) -> Form:
        """The state after the step that leaves from ``node``; corrected, its end is evaluated already."""
        core, start, stop = Core(step.core, self.grid), node + 1 - step.start, node + 1
        x = self.states[start]
        ratio, width, _ = core.span(start, stop)
        if not math.isfinite(ratio):  # α = 0 in the noise core: x' = σ'·ε + α'·x0 with ε = x/σ
            alpha, sigma = self.grid.alpha[stop], self.grid.sigma[stop]
            return sigma / self.grid.sigma[start] * x + alpha * self._quantity("data", start)
        newest = stop if correct else node
        others = [*range(newest, start, -1), *range(start - 1, -1, -1)]
        weights = taylor_weights(core, start, stop, others, step, correct)
        slope = weighted(weights.values(), [self._quantity(core.name, other) for other in weights])
        carry = step.carry if node else 0.0
        if carry:
            before, reach, _ = core.span(node - 1, node)
            if math.isfinite(before):
                mean = (self.states[node] - before * self.states[node - 1]) / reach
            else:
                mean = self._quantity(core.name, node - 1)
            slope = (1.0 - carry) * slope + carry * mean
        return ratio * x + width * slope

    def _quantity(self, core: str, node: int) -> Form:
        of_x, of_output = coefficients(_STORED, QUANTITIES[core], self.grid.alpha[node], self.grid.sigma[node])
        return of_x * self.seen[node] + of_output * self.outputs[node]


def taylor_weights(
    core: Core, start: int, stop: int, others: Sequence[int], step: Decision, correct: bool = False
) -> dict[int, float]:
    """Weights of the evaluated nodes in u of one step; they sum to 1.

    Args:
        core: what is integrated, on its grid.
        start, stop: nodes of the step.
        others: evaluated nodes but the start, first choice first.
        step: the decision; a corrector takes one order more, all its points and, of relaxations, only that of a single
            derivative.
    """
    weights, z = {start: 1.0}, functools.partial(_coordinate, core, variable=step.variable)
    usable = [node for node in others if math.isfinite(z(node))]
    count = min(step.order - (0 if correct else 1), len(usable))
    # Where the variable is infinite at an end of the step, there is nothing to expand in.
    if count < 1 or not math.isfinite(z(start)) or (step.variable == "log-rho" and core.grid.rho[stop] == 0.0):
        return weights
    if step.variable == "step":
        moments = [float(stop - start) ** q / math.factorial(q + 1) for q in range(1, count + 1)]
    else:
        moments = core.moments(start, stop, step.variable, count)
    if not correct or count == 1:
        moments[0] = _relaxed(core, start, stop, step, moments[0])
    for q, moment in enumerate(moments, 1):
        points = count if correct or not step.points else step.points[q - 1]
        active = usable[: max(points, q)]
        for node, share in zip(active, _derivative([z(node) - z(start) for node in active], q), strict=True):
            weights[node] = weights.get(node, 0.0) + moment * share
            weights[start] -= moment * share
    return weights


def _derivative(gaps: Sequence[float], q: int) -> list[float]:
    """Shares a_k with Σ_k a_k·(f_k − f_s) the q-th derivative at s, exact for polynomials of as many degrees as points."""
    scale = max(map(abs, gaps))
    powers = np.arange(1, len(gaps) + 1)
    system = np.array([gap / scale for gap in gaps]) ** powers[:, None]
    wanted = np.where(powers == q, float(math.factorial(q)), 0.0)
    return [share / scale**q for share in np.linalg.solve(system, wanted).tolist()]


def _relaxed(core: Core, start: int, stop: int, step: Decision, moment: float) -> float:
    """R_1·M_1 of a step whose M_1 is the moment."""
    if step.relaxation == "none":
        return moment
    if step.relaxation == "scale":
        return step.strength * moment
    half = 0.5 * (_coordinate(core, stop, step.variable) - _coordinate(core, start, step.variable))
    if step.relaxation == "bh2":
        return half
    h = math.log(core.grid.rho[start] / core.grid.rho[stop])
    if step.relaxation == "linear":
        return (1.0 + step.strength * h) * moment
    signed = -h if core.name == "data" else h
    if step.relaxation == "bh1":  # R_1 = ½h²/(e^h − 1 − h) and M_1 = −(e^h − 1 − h)/(e^h − 1): nothing cancels
        return half * signed / math.expm1(signed)
    return (1.0 + (0.5 if step.relaxation == "exp+" else -0.5) * math.expm1(signed)) * moment


def _coordinate(core: Core, node: int, variable: str) -> float:
    if variable == "step":
        return float(node)
    if variable == "t" and node == core.grid.steps:  # what stands there for the clean image is only a mark
        return float(core.grid.schedule.t_from_rho(core.grid.rho[node]))
    return core.coordinate(node, variable)


def _whole(value, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _real(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
