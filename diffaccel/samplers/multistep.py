"""Exponential multistep integrators: what is integrated, in which variable, and the plan that follows.

The probability-flow ODE has three exact forms (ρ = σ/α):

    noise       d(x/α)     = ε dρ
    data        d(x/σ)     = x0 d(1/ρ)
    velocity    d(x/(α+σ)) = (ε − x0) ds,     s = σ/(α+σ)

the last being dx = v dσ on flows, where α + σ = 1, and equally true elsewhere. So each step is x' = A·x + W·u, with A and W
known exactly and u a mean of the integrated quantity over the step. A multistep rule is a choice of u; with momentum u also
carries over a part of the mean of the step before.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..core.errors import UsageError, unknown
from ..core.grids import Grid
from ..core.prediction import coefficients
from ..core.schedule import Flow
from .forms import Form, weighted
from .plan import Plan, Row

QUANTITIES = {"noise": "epsilon", "data": "sample", "velocity": "flow_prediction"}
VARIABLES = ("t", "rho", "log-rho", "angle")
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
FAR = 200.0  # ρ beyond which what is linear in ρ overshoots: zero terminal SNR, σ_max = 700
_TINY_ALPHA = 1e-3  # below it ε hardly determines x0, so the row stores x0 and ε is recovered from state and x0


@dataclass(frozen=True)
class Core:
    """What a solver integrates: the left-hand side that is exact.

    With ``eta`` it is the reverse SDE whose marginals are those of the ODE (0: the ODE itself, 1: the time reversal of
    the forward process). In y = x/α:

        noise   dy = (1+η²)·ε dρ + η·sqrt(2ρ|dρ|)·z             (Zhang & Chen 2023, appendix on stochastic sampling)
        data    dy = (1+η²)·(y − x0)/ρ dρ + η·sqrt(2ρ|dρ|)·z     (exact for constant x0, for every step size)

    Args:
        name: "noise", "data" or "velocity"; the last for eta = 0 only.
        grid: the grid to step on.
        eta: how stochastic, ≥ 0.

    Raises:
        UsageError: an unknown name, velocity with noise, a negative eta.
    """

    name: str
    grid: Grid
    eta: float = 0.0

    def __post_init__(self):
        if self.name not in QUANTITIES:
            raise unknown("core", str(self.name), QUANTITIES)
        check_stochastic(self.eta)
        if self.name == "velocity" and self.eta:
            raise UsageError("The velocity core is for eta = 0; use the core noise or data.")

    @property
    def power(self) -> float:
        """Exponent p of the exact homogeneous solution: the data core integrates d(ρ^−p)."""
        return 1.0 + self.eta**2

    def span(self, start: int, stop: int | None = None) -> tuple[float, float, float]:
        """(A, W, noise) of x' = A·x + W·u + noise·z between two nodes, by default to the next one.

        A and W are infinite in the noise core where α = 0.
        """
        stop = start + 1 if stop is None else stop
        alpha, sigma = self.grid.alpha[start], self.grid.sigma[start]
        next_alpha, next_sigma = self.grid.alpha[stop], self.grid.sigma[stop]
        if self.name == "velocity":
            scale, next_scale = alpha + sigma, next_alpha + next_sigma
            return next_scale / scale, next_sigma - next_scale / scale * sigma, 0.0
        rho, next_rho = self.grid.rho[start], self.grid.rho[stop]
        if self.name == "noise":
            if alpha == 0.0:
                return math.inf, -math.inf, 0.0
            stochastic = self.eta if next_rho > 0.0 else 0.0  # the noise would stay in the clean image
            width = (1.0 + stochastic**2) * next_alpha * (next_rho - rho)
            return next_alpha / alpha, width, next_alpha * stochastic * math.sqrt(rho**2 - next_rho**2)
        decay = (next_rho / rho) ** (self.power - 1.0)
        ratio = next_sigma / sigma * decay
        return ratio, next_alpha - ratio * alpha, next_sigma * math.sqrt(1.0 - decay**2)

    def stored(self, node: int) -> str:
        """The quantity that the network's output of this node is kept as."""
        return stored_as(self.name, self.grid.alpha[node])

    def quantity(self, node: int) -> Form:
        """The integrated quantity at a node, in terms of its network input and stored output."""
        return quantity(self.name, self.grid.alpha[node], self.grid.sigma[node], node)

    def lagrange(self, step: int, nodes: Sequence[int], variable: str) -> tuple[float, ...]:
        """Weights of the integrated quantity at ``nodes`` in u, exact for polynomials in ``variable``; they sum to 1.

        Nodes at which the variable is infinite get weight 0; where it is infinite at the end of the step, all but the
        first do.
        """
        if variable not in VARIABLES:
            raise unknown("variable", str(variable), VARIABLES)
        rho = self.grid.rho
        places = [self.coordinate(node, variable) for node in nodes]
        finite = [place for place in places if math.isfinite(place)]
        if variable == "log-rho" and rho[step + 1] == 0.0:
            finite = finite[:1]
        if len(finite) <= 1:
            return (1.0, *(0.0 for _ in nodes[1:]))
        points, measure = self._quadrature(rho[step], rho[step + 1], variable)
        z, total = _variable_of_rho(self.grid, points, variable), float(measure.sum())
        basis = iter(
            float(measure @ np.prod([(z - other) / (own - other) for m, other in enumerate(finite) if m != j], axis=0))
            / total
            for j, own in enumerate(finite)
        )
        return tuple(next(basis) if place in finite else 0.0 for place in places)

    def moments(self, start: int, stop: int, variable: str, count: int) -> list[float]:
        """Means of (z − z_start)^q/q! over the way between two nodes in the core's own measure, q = 1 … count.

        The variable must be finite at both nodes.
        """
        points, measure = self._quadrature(self.grid.rho[start], self.grid.rho[stop], variable)
        z = _variable_of_rho(self.grid, points, variable) - self.coordinate(start, variable)
        total = float(measure.sum())
        return [float(measure @ z**q) / total / math.factorial(q) for q in range(1, count + 1)]

    def coordinate(self, node: int, variable: str) -> float:
        """The variable at a node, which may be infinite."""
        rho = self.grid.rho[node]
        if variable == "t":
            return self.grid.times[node]
        if variable == "angle":
            return math.atan(rho)
        return rho if variable == "rho" else math.log(rho) if rho > 0.0 else -math.inf

    def _quadrature(self, start: float, stop: float, variable: str) -> tuple[np.ndarray, np.ndarray]:
        """Points ρ and signed weights of the integral over one step in the core's own measure."""
        if self.name == "velocity":  # the integrand is smooth in s = ρ/(1+ρ), ends included
            s, measure = _gauss(*(rho / (1.0 + rho) if math.isfinite(rho) else 1.0 for rho in (start, stop)))
            return s / (1.0 - s), measure
        if self.name == "data":
            if stop == 0.0:  # all of the measure ρ^−p lies at the end
                return np.array([0.0]), np.array([1.0])
            if math.isinf(start):
                points, measure = _gauss(0.0, stop**-self.power)
                return points ** (-1.0 / self.power), measure
            points, measure = _gauss(math.log(start), math.log(stop))
            points = np.exp(points)
            return points, measure * (points / stop) ** -self.power
        if math.isinf(start):  # all of the measure lies at pure noise
            return np.array([start]), np.array([1.0])
        if variable == "rho":  # a polynomial in ρ: exact
            return _gauss(start, stop)
        schedule = self.grid.schedule
        floor = min(max(stop, float(schedule.rho(schedule.t_min))), start)
        points, measure = _gauss(math.log(start), math.log(floor))
        points, measure = np.exp(points), measure * np.exp(points)
        if floor == stop:
            return points, measure
        below, below_measure = _gauss(floor, stop)  # below t_min log ρ runs to −∞; t stands still or is smooth in ρ
        return np.concatenate([points, below]), np.concatenate([measure, below_measure])


@dataclass(frozen=True)
class Slope:
    """u of one step: ``carry``·(u of the step before) + Σ_j weights[j]·(quantity at node newest − j).

    carry + Σ weights = 1. The newest node is the start of the step, or its end where a corrector redoes the step.
    """

    weights: tuple[float, ...]
    carry: float = 0.0


def multistep_plan(
    core: Core,
    predict: Callable[[int], Slope],
    correct: Callable[[int], Slope | None] | None = None,
    name: str = "",
) -> Plan:
    """The plan of a multistep rule.

    Args:
        core: what is integrated.
        predict: step index → u of that step.
        correct: node index i ≥ 1 → u of step i − 1 now that node i is evaluated, or None to leave it. The corrected
            state takes part in all later steps; no call is spent on it. In the noise core steps from ρ > 200 are left.
        name: of the plan.
    """
    grid, rows = core.grid, []
    quantities = [core.quantity(node) for node in range(grid.steps)]
    spans = [core.span(step) for step in range(grid.steps)]

    def combined(weights: Sequence[float], newest: int) -> Form:
        return weighted(weights, [quantities[newest - lag] for lag in range(len(weights))])

    before = slope = None  # the corrected state and the slope of the step before
    for i in range(grid.steps):
        here = Form.state(i)
        if i:
            ratio, width, _ = spans[i - 1]
            if not math.isfinite(ratio):  # α = 0: u is ε, which is the initial noise itself
                mean = quantities[0]
            else:
                mean = (here - ratio * before) / width
            far = core.name == "noise" and grid.rho[i - 1] > FAR
            redone = correct(i) if correct and not far else None
            if redone:
                change = combined(redone.weights, i) - combined(slope.weights, i - 1)
                here, mean = here + width * change, mean + change
        slope = predict(i)
        ratio, width, noise = spans[i]
        if not math.isfinite(ratio):  # x' = σ'·ε + α'·x0 with ε = x/σ
            state = grid.sigma[i + 1] / grid.sigma[i] * here + grid.alpha[i + 1] * Form.output(i)
        else:
            state = ratio * here + width * combined(slope.weights, i)
            if slope.carry:
                state = state + width * slope.carry * mean
        states, outputs = state.coefficients(i)
        rows.append(Row(grid.times[i], grid.alpha[i], grid.sigma[i], core.stored(i), states, outputs, noise))
        before = here
    return Plan(tuple(rows), name=name)


def check_stochastic(eta: float, corrector: bool = False) -> None:
    """Refuse a negative or infinite eta, and a corrector of steps that add noise.

    Raises:
        UsageError: saying which.
    """
    if not 0.0 <= eta < math.inf:
        raise UsageError(f"eta must be at least 0 (0 deterministic, 1 ancestral); got {eta!r}.")
    if corrector and eta:
        raise UsageError("The corrector is for eta = 0: a step that added noise cannot be redone.")


def stored_as(core: str, alpha: float) -> str:
    """What a core keeps of the network's output at a level with this α, one of `core.prediction.PREDICTION_TYPES`."""
    return "sample" if core == "noise" and alpha < _TINY_ALPHA else QUANTITIES[core]


def quantity(core: str, alpha: float, sigma: float, call: int) -> Form:
    """The quantity that a core integrates, evaluated by this call at the level (α, σ)."""
    of_x, of_output = coefficients(stored_as(core, alpha), QUANTITIES[core], alpha, sigma)
    return of_x * Form.state(call) + of_output * Form.output(call)


def degrees(steps: int, degree: int, lower_order_final: bool) -> list[int]:
    """The degree each step can afford: as many evaluations as there are, and falling to 0 at the end on request."""
    return [min(degree, i, steps - 1 - i) if lower_order_final else min(degree, i) for i in range(steps)]


def resolve_core(name: str | None, grid: Grid, eta: float = 0.0) -> str:
    """The core's name; None stands for "data" with eta, "velocity" on flows and "noise" elsewhere."""
    return name or ("data" if eta else "velocity" if isinstance(grid.schedule, Flow) else "noise")


def _variable_of_rho(grid: Grid, rho: np.ndarray, variable: str) -> np.ndarray:
    if variable == "t":
        return grid.schedule.t_from_rho(torch.from_numpy(rho)).numpy()
    if variable == "angle":
        return np.arctan(rho)
    return rho if variable == "rho" else np.log(rho)


def _gauss(start: float, stop: float) -> tuple[np.ndarray, np.ndarray]:
    half = 0.5 * (stop - start)
    return start + half * (1.0 + _NODES), half * _WEIGHTS
