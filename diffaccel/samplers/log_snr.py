"""Exponential multistep rules in the half log-SNR λ = −log ρ: DPM-Solver++ and UniPC.

Lu et al. 2022, DPM-Solver++ (arXiv 2211.01095); Zhao et al. 2023, UniPC (arXiv 2302.04867).
"""

import math

from ..core.errors import UsageError, unknown
from ..core.grids import Grid
from .momentum import with_momentum
from .multistep import Core, Slope, degrees, multistep_plan
from .plan import Plan

SOLVER_TYPES = ("bh1", "bh2")


def dpm_solver_plan(
    grid: Grid,
    order: int = 2,
    lower_order_final: bool = True,
    core: str = "data",
    momentum: str | None = None,
    beta: float = 1.0,
    eta: float = 0.0,
) -> Plan:
    """The plan of multistep DPM-Solver++ (Lu et al. 2022b, algorithm 2), or of DPM-Solver with the noise core.

    Order 2 is the paper's 2M with the midpoint coefficient: u = x0_n + (h_n/2h_{n−1})·(x0_n − x0_{n−1}). Order 3 is exact
    for polynomials of degree 2 in λ; diffusers' third order lacks a factor 2 in its second difference and falls back to
    order 2. The step to σ = 0 is first order.

    Args:
        grid: the grid to step on.
        order: 1, 2 or 3.
        lower_order_final: let the order fall to 1 towards the last step.
        core: "data" (DPM-Solver++) or "noise" (DPM-Solver).
        momentum, beta: see `momentum.with_momentum`.
        eta: 1 with the data core is SDE-DPM-Solver++.

    Raises:
        UsageError: an order that does not exist.
    """
    _check(order, core, "DPM-Solver")
    rule = Core(core, grid, eta)
    degree = degrees(grid.steps, order - 1, lower_order_final)
    predict, _ = with_momentum(momentum, beta, lambda i: Slope(_predictor(rule, i, degree[i], "bh2")), eta=eta)
    return multistep_plan(rule, predict, name=f"dpm-solver({core}, order={order})")


def unipc_plan(
    grid: Grid,
    order: int = 2,
    solver_type: str = "bh2",
    lower_order_final: bool = True,
    corrector: bool = True,
    core: str = "data",
    momentum: str | None = None,
    beta: float = 1.0,
) -> Plan:
    """The plan of UniPC: UniP of the given order, each step redone by UniC once its end is evaluated (Zhao et al. 2023).

    From two differences on, B(h) cancels and both are exact for polynomials in λ; with one difference they are the
    paper's ½ rules, D_1·B(h)/2. The correction costs no call: the outputs evaluated at uncorrected states are kept.

    Args:
        grid: the grid to step on.
        order: 1, 2 or 3, of the predictor; the corrector's is one more.
        solver_type: "bh1" (B = h) or "bh2" (B = e^h − 1).
        lower_order_final: let the order fall to 1 towards the last step.
        corrector: False for UniP alone.
        core: "data" or "noise".
        momentum, beta: see `momentum.with_momentum`.

    Raises:
        UsageError: an order or a solver type that does not exist.
    """
    _check(order, core, "UniPC")
    if solver_type not in SOLVER_TYPES:
        raise unknown("solver_type", str(solver_type), SOLVER_TYPES)
    rule = Core(core, grid)
    degree = degrees(grid.steps, order - 1, lower_order_final)

    def predict(i: int) -> Slope:
        return Slope(_predictor(rule, i, degree[i], solver_type))

    def correct(i: int) -> Slope | None:
        if math.isinf(rule.grid.rho[i - 1]) and solver_type == "bh1":
            return None  # the step is infinitely long in λ
        if degree[i - 1] == 0:
            half = 0.5 * _relaxation(rule, i - 1, solver_type)
            return Slope((half, 1.0 - half))
        return Slope(rule.lagrange(i - 1, range(i, i - degree[i - 1] - 2, -1), "log-rho"))

    predict, redo = with_momentum(momentum, beta, predict, correct if corrector else None)
    return multistep_plan(rule, predict, redo, name=f"unipc({core}, order={order}, {solver_type})")


def _predictor(rule: Core, i: int, degree: int, solver_type: str) -> tuple[float, ...]:
    rho = rule.grid.rho
    if rho[i + 1] == 0.0 or degree == 0 or math.isinf(rho[i - 1]):
        return (1.0,)
    if degree > 1:
        return rule.lagrange(i, range(i, i - degree - 1, -1), "log-rho")
    ratio = math.log(rho[i] / rho[i + 1]) / math.log(rho[i - 1] / rho[i])
    half = 0.5 * ratio * _relaxation(rule, i, solver_type)
    return 1.0 + half, -half


def _relaxation(rule: Core, i: int, solver_type: str) -> float:
    """B(h) over the first-order coefficient: 1 for bh2."""
    if solver_type == "bh2":
        return 1.0
    rho = rule.grid.rho
    h = math.log(rho[i] / rho[i + 1])
    return h / -math.expm1(-h) if rule.name == "data" else h / math.expm1(h)


def _check(order: int, core: str, name: str) -> None:
    if order not in (1, 2, 3):
        raise UsageError(f"The order of {name} must be 1, 2 or 3; got {order!r}.")
    if core not in ("data", "noise"):
        raise unknown(f"core of {name}", str(core), ("data", "noise"))
