"""DEIS: exponential Adams–Bashforth samplers in the noise prediction.

Zhang & Chen 2023, Fast Sampling of Diffusion Models with Exponential Integrator (arXiv 2204.13902).
"""

import math

import numpy as np
import torch

from ..core.errors import UsageError, unknown
from ..core.grids import Grid
from .plan import Plan, Row

VARIABLES = ("t", "rho", "log-rho")
MAX_ORDER = 3
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_TINY_ALPHA = 1e-3  # below it ε hardly determines x0, so the row stores x0 and ε is recovered from state and x0


def deis_plan(levels: Grid, order: int = 2, variable: str = "t", lower_order_final: bool = False) -> Plan:
    """The plan of tAB-DEIS, ρAB-DEIS or its log ρ variant (Zhang & Chen 2023, eq. 14 and 15).

    In y = x/α the probability-flow ODE is dy/dρ = ε. ε is replaced by the polynomial in the chosen variable z through
    the last k+1 evaluations, with Lagrange basis L_j:

        x' = (α'/α)·x + α'·Σ_j w_j·ε_j,     w_j = ∫_ρ^ρ' L_j(z(ρ)) dρ.

    The first k steps use the orders that their history allows. Nodes at ρ = ∞ (start of a flow) take no part where z is
    infinite too. In log ρ a step to σ = 0 is first order, since z has no end there.

    Args:
        levels: the grid to step on.
        order: degree k of the polynomial, 0 … 3; 0 is DDIM.
        variable: what ε is a polynomial of: "t" (the schedule's time), "rho" or "log-rho" (as in diffusers).
        lower_order_final: let the degree fall to 0 towards the last step.

    Raises:
        UsageError: an order or a variable that does not exist.
    """
    if order not in range(MAX_ORDER + 1):
        raise UsageError(f"The order of DEIS must be 0, 1, 2 or 3; got {order!r}.")
    if variable not in VARIABLES:
        raise unknown("DEIS variable", str(variable), VARIABLES)
    stored = ["sample" if alpha < _TINY_ALPHA else "epsilon" for alpha in levels.alpha]
    rows = []
    for i in range(levels.steps):
        degree = min(order, i, levels.steps - 1 - i) if lower_order_final else min(order, i)
        states, outputs = _coefficients(levels, i, degree, variable, stored)
        rows.append(Row(levels.times[i], levels.alpha[i], levels.sigma[i], stored[i], states, outputs))
    return Plan(tuple(rows), name=f"deis({variable}, order={order})")


def adams_bashforth_weights(levels: Grid, step: int, degree: int, variable: str) -> list[float]:
    """w_j = ∫ L_j(z(ρ)) dρ over one step, newest first, by 16-node Gauss–Legendre quadrature in float64.

    The list is shorter than ``degree + 1`` where nodes have no finite z; the step must start at a finite ρ.
    """
    rho = levels.rho
    if variable == "log-rho" and rho[step + 1] == 0.0:
        degree = 0
    nodes = [_coordinate(levels, j, variable) for j in range(step, step - degree - 1, -1)]
    nodes = [z for z in nodes if math.isfinite(z)]
    if len(nodes) == 1:
        return [rho[step + 1] - rho[step]]
    points, measure = _quadrature(levels, rho[step], rho[step + 1], variable)
    z = _variable_of_rho(levels, points, variable)
    weights = []
    for j, own in enumerate(nodes):
        basis = np.prod([(z - other) / (own - other) for m, other in enumerate(nodes) if m != j], axis=0)
        weights.append(float(measure @ basis))
    return weights


def _coefficients(levels: Grid, i: int, degree: int, variable: str, stored: list[str]):
    alpha, sigma = levels.alpha[i], levels.sigma[i]
    next_alpha, next_sigma = levels.alpha[i + 1], levels.sigma[i + 1]
    if alpha == 0.0:  # x/α does not exist; first order written in x and x0
        return (next_sigma / sigma,), (next_alpha,)
    weights = adams_bashforth_weights(levels, i, degree, variable)
    states, outputs = [0.0] * len(weights), [0.0] * len(weights)
    states[0] = next_alpha / alpha
    for lag, weight in enumerate(weights):
        node = i - lag
        if stored[node] == "epsilon":
            outputs[lag] = next_alpha * weight
        else:  # ε = (x − α·x0)/σ
            states[lag] += next_alpha * weight / levels.sigma[node]
            outputs[lag] = -next_alpha * weight * levels.alpha[node] / levels.sigma[node]
    while len(states) > 1 and states[-1] == 0.0:
        states.pop()
    return tuple(states), tuple(outputs)


def _coordinate(levels: Grid, node: int, variable: str) -> float:
    if variable == "t":
        return levels.times[node]
    return levels.rho[node] if variable == "rho" else math.log(levels.rho[node])


def _variable_of_rho(levels: Grid, rho: np.ndarray, variable: str) -> np.ndarray:
    if variable == "t":
        return levels.schedule.t_from_rho(torch.from_numpy(rho)).numpy()
    return rho if variable == "rho" else np.log(rho)


def _quadrature(levels: Grid, start: float, stop: float, variable: str) -> tuple[np.ndarray, np.ndarray]:
    """Points ρ and signed weights of ∫_start^stop … dρ."""
    if variable == "rho":  # the integrand is a polynomial in ρ: exact
        return _gauss(start, stop)
    schedule = levels.schedule
    floor = min(max(stop, float(schedule.rho(schedule.t_min))), start)
    points, measure = _gauss(math.log(start), math.log(floor))
    points, measure = np.exp(points), measure * np.exp(points)
    if floor == stop:
        return points, measure
    below, below_measure = _gauss(floor, stop)  # below t_min log ρ runs to −∞, while t stands still or is smooth in ρ
    return np.concatenate([points, below]), np.concatenate([measure, below_measure])


def _gauss(start: float, stop: float) -> tuple[np.ndarray, np.ndarray]:
    half = 0.5 * (stop - start)
    return start + half * (1.0 + _NODES), half * _WEIGHTS
