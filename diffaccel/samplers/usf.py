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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch

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
        return len(self.times) - self.skip_first + sum(step.corrector == "implicit" for step in self.steps)

    def compile(self, schedule: NoiseSchedule, name: str = "searched") -> Plan:
        """The plan of these decisions on a noise schedule.

        Raises:
            UsageError: times off the schedule, an end above the last call, a first step skipped on a flow.
        """
        return _Compiler(self, schedule).plan(name)

    def grid(self, schedule: NoiseSchedule) -> Grid:
        """The nodes and the end of a run.

        Raises:
            UsageError: times off the schedule, an end above the last call.
        """
        times = torch.tensor(self.times, dtype=torch.float64)
        low = min(schedule.t_clean, schedule.t_min)
        if times[0] > schedule.t_max or times[-1] < low:
            raise UsageError(
                f"The times of a solver schedule must lie between {low:g} and {schedule.t_max:g} on this noise schedule; "
                f"got {self.times[0]:g} … {self.times[-1]:g}."
            )
        alpha, sigma = schedule.level(times)
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
        steps = [_shortened(step, index + 1) for index, step in enumerate(self.steps[node:])]
        return SolverSchedule(self.times[node:], tuple(steps), self.end)

    def node_of_call(self, call: int) -> tuple[int, bool]:
        """(node at which a network call happens, whether it is that node's second)."""
        calls = [(node, again) for node in range(len(self.times)) for again in self._calls_at(node)]
        return calls[call]

    def _calls_at(self, node: int) -> Sequence[bool]:
        if node == 0:
            return [] if self.skip_first else [False]
        return [False, True] if self.steps[node - 1].corrector == "implicit" else [False]

    def to_dict(self) -> dict:
        """The schedule as JSON types; what is at its default is left out of the steps."""
        defaults = asdict(Decision())
        steps = [
            {"order": step.order, "core": step.core, "variable": step.variable}
            | {key: _plain(value) for key, value in asdict(step).items() if value != defaults[key]}
            for step in self.steps
        ]
        return {"times": list(self.times), "end": self.end, "skip_first": self.skip_first, "steps": steps}

    @classmethod
    def from_dict(cls, content: Mapping) -> "SolverSchedule":
        """Read `to_dict`.

        Raises:
            DataError: saying which key, number or decision makes no sense.
        """
        try:
            _check_keys(content, [field.name for field in fields(cls)], "a solver schedule")
            if not isinstance(content.get("steps"), list) or not isinstance(content.get("times"), list):
                raise UsageError("A solver schedule needs lists of times and of steps.")
            steps = []
            for index, step in enumerate(content["steps"]):
                _check_keys(step, [field.name for field in fields(Decision)], f"step {index}")
                steps.append(Decision(**{**step, "points": tuple(step.get("points", ()))}))
            return cls(tuple(content["times"]), tuple(steps), content.get("end", 0.0), content.get("skip_first", False))
        except (UsageError, TypeError) as error:
            raise DataError(f"This solver schedule makes no sense: {error}") from error


class _Compiler:
    """Walks over the steps of a schedule with the state as a linear form of what the network has seen and said."""

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
        steps, grid = self.decisions.steps, self.grid
        following = Form.state(0)
        for node, step in enumerate(steps):
            if node == 0 and self.decisions.skip_first:  # x_0 = (σ_0/σ_1)·x_1 and ε = x_0/σ_0
                x = grid.sigma[0] / grid.sigma[1] * Form.state(0)
                epsilon = x / grid.sigma[0]
                self._keep(x, x, epsilon)  # the flow velocity ε − x0 with x0 = 0
                following = Form.state(0)
            else:
                self._call(node, following, steps[node - 1] if node else None)
                following = self._step(node, step)
                self._close(node, following)
        initial = grid.sigma[1] / grid.sigma[0] if self.decisions.skip_first else 1.0
        return Plan(tuple(self.rows), name=name, initial=initial)

    def _call(self, node: int, x: Form, before: Decision | None) -> None:
        """Evaluate a node, and redo the step that led to it where that one says so."""
        self._keep(x, *self._evaluated())
        if before is None or before.corrector == "none":
            return
        corrected = self._step(node - 1, before, correct=True)
        self.states[node] = corrected
        if before.corrector == "implicit":
            self._close(node, corrected)
            self.seen[node], self.outputs[node] = self._evaluated()
            self.states[node] = self.seen[node]

    def _keep(self, state: Form, seen: Form, output: Form) -> None:
        self.states.append(state)
        self.seen.append(seen)
        self.outputs.append(output)

    def _evaluated(self) -> tuple[Form, Form]:
        """Input and output of the call whose row comes next."""
        return Form.state(len(self.rows)), Form.output(len(self.rows))

    def _close(self, node: int, following: Form) -> None:
        """Write the row of the newest call: what it leads to."""
        grid = self.grid
        states, outputs = following.coefficients(len(self.rows))
        self.rows.append(Row(grid.times[node], grid.alpha[node], grid.sigma[node], _STORED, states, outputs))

    def _step(self, node: int, step: Decision, correct: bool = False) -> Form:
        """The state after the step that leaves from ``node``; corrected, its end is evaluated already."""
        core, start, stop = Core(step.core, self.grid), node + 1 - step.start, node + 1
        x = self.states[start]
        ratio, width, _ = core.span(start, stop)
        if not math.isfinite(ratio):  # α = 0 in the noise core: x' = σ'·ε + α'·x0 with ε = x/σ
            alpha, sigma = self.grid.alpha[stop], self.grid.sigma[stop]
            return sigma / self.grid.sigma[start] * x + alpha * self._quantity("data", start)
        if correct and core.name == "noise" and self.grid.rho[start] > FAR:
            return self.states[stop]
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
        moments[0] *= _relaxation(core, start, stop, step, moments[0])
    for q, moment in enumerate(moments, 1):
        points = count if correct or not step.points else step.points[q - 1]
        active = usable[: max(points, q)]
        for node, share in zip(active, _derivative([z(node) - z(start) for node in active], q), strict=True):
            weights[node] = weights.get(node, 0.0) + moment * share
            weights[start] -= moment * share
    return weights


def _derivative(gaps: Sequence[float], q: int) -> np.ndarray:
    """Shares a_k with Σ_k a_k·(f_k − f_s) the q-th derivative at s, exact for polynomials of as many degrees as points."""
    scale = max(map(abs, gaps))
    powers = np.arange(1, len(gaps) + 1)
    system = (np.asarray(gaps) / scale) ** powers[:, None]
    wanted = np.where(powers == q, float(math.factorial(q)), 0.0)
    return np.linalg.solve(system, wanted) / scale**q


def _relaxation(core: Core, start: int, stop: int, step: Decision, moment: float) -> float:
    """R_1; the moment is M_1 of the step."""
    if step.relaxation == "none":
        return 1.0
    if step.relaxation == "scale":
        return step.strength
    if step.relaxation == "bh2":
        end = core.grid.rho[stop]
        gap = (
            _coordinate(core, stop, step.variable)
            if end > 0.0 or step.variable == "step"
            else core.limit(step.variable)
        )
        return 0.5 * (gap - _coordinate(core, start, step.variable)) / moment
    h = math.log(core.grid.rho[start] / core.grid.rho[stop])
    if step.relaxation == "linear":
        return 1.0 + step.strength * h
    signed = -h if core.name == "data" else h
    if step.relaxation == "bh1":
        return 0.5 * signed**2 / (math.expm1(signed) - signed)
    return 1.0 + (0.5 if step.relaxation == "exp+" else -0.5) * math.expm1(signed)


def _coordinate(core: Core, node: int, variable: str) -> float:
    return float(node) if variable == "step" else core.coordinate(node, variable)


def _shortened(step: Decision, nodes: int) -> Decision:
    """A decision with so many nodes up to and including its own."""
    if step.start <= nodes:
        return step
    values = {field.name: getattr(step, field.name) for field in fields(step)}
    return Decision(**{**values, "start": 1})


def _check_keys(content, known: Sequence[str], what: str) -> None:
    if not isinstance(content, Mapping):
        raise UsageError(f"{what} must be a JSON object; got {content!r}.")
    for key in content:
        if key not in known:
            raise unknown(f"key of {what}", str(key), known)


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _whole(value, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _real(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
