"""Adams–Bashforth with fixed weights (iPNDM) and with momentum (GHVB).

iPNDM: Zhang & Chen 2023 (arXiv 2204.13902), section on PNDM; GHVB: Wizadwongsa et al. 2024, Diffusion Sampling with
Momentum for Mitigating Divergence Artifacts (arXiv 2307.11118). Both treat the steps as if they were equally long.
"""

import math
from collections.abc import Sequence

from ..core.errors import UsageError
from ..core.grids import Grid
from .momentum import with_momentum
from .multistep import Core, Slope, degrees, multistep_plan, resolve_core
from .plan import Plan

# Backward-difference coefficients of Adams–Bashforth: ∫_0^1 of the k-th Newton basis polynomial.
_DIFFERENCES = (1.0, 1 / 2, 5 / 12, 3 / 8, 251 / 720)
MAX_ORDER = 4
MAX_GHVB = 5.0


def adams_bashforth(order: int) -> tuple[float, ...]:
    """Weights of the last ``order`` evaluations, newest first: [1], [3, −1]/2, [23, −16, 5]/12, …"""
    return _from_differences(_DIFFERENCES[:order])


def ipndm_plan(
    grid: Grid,
    order: int = 4,
    lower_order_final: bool = False,
    core: str | None = None,
    momentum: str | None = None,
    beta: float = 1.0,
) -> Plan:
    """The plan of iPNDM, the Adams–Bashforth rule with the weights of equal steps.

    y' = y + (ρ' − ρ)·Σ_j b_j ε_{n−j} on VP and VE (y = x/α), x' = x + (σ' − σ)·Σ_j b_j v_{n−j} on flows. Warm-up uses
    the lower orders. On grids that are not uniform in ρ the order is 2 at most; at few steps the fixed weights are
    often the better ones all the same.

    Args:
        grid: the grid to step on.
        order: evaluations that a step combines, 1 … 4; 1 is DDIM.
        lower_order_final: let the order fall to 1 towards the last step.
        core: "noise", "data" or "velocity"; None for velocity on flows, noise elsewhere.
        momentum, beta: see `momentum.with_momentum`.

    Raises:
        UsageError: an order that does not exist.
    """
    if order not in range(1, MAX_ORDER + 1):
        raise UsageError(f"The order of iPNDM must be 1, 2, 3 or 4; got {order!r}.")
    degree = degrees(grid.steps, order - 1, lower_order_final)
    predict, _ = with_momentum(momentum, beta, lambda i: Slope(adams_bashforth(degree[i] + 1)))
    return multistep_plan(Core(resolve_core(core, grid), grid), predict, name=f"ipndm(order={order})")


def ghvb_plan(grid: Grid, number: float = 2.5, core: str | None = None, variable: str | None = None) -> Plan:
    """The plan of the generalised heavy ball, GHVB (Wizadwongsa et al. 2024, eq. 12 and algorithm 2).

    Written k.d as in the paper: order r = ⌈number⌉ and β = its fractional part (1 for whole numbers). With the filtered
    v_n = (1−β)·v_{n−1} + β·e_n the effective slope is

        u_n = (1/β)·Σ_{k<r} γ_k ∇^k v_n,     γ_0 = β,  γ_k = β·g_k + (1−β)·g_{k−1},

    g the Adams–Bashforth differences; 2.0 is AB2, 1.8 Euler with heavy ball, and β → 0 tends to order r − 1. Filtering
    the recurrence instead of the evaluations gives the same u from two network inputs and r evaluations:

        u_n = (1−β)·u_{n−1} + Σ_{k<r} γ_k ∇^k e_n.

    Args:
        grid: the grid to step on.
        number: in (0, 5].
        core: as in `ipndm_plan`.
        variable: None for the fixed coefficients above, which have order r on grids uniform in ρ and 2 at most on
            others. A variable of `deis.deis_plan` for variable-step GHVB, of order r on every smooth grid: the slope's
            recurrence is kept and its weights are made exact for polynomials of degree r − 1 over this step and the
            last,  u_n = (1−β)·u_{n−1} + Σ_j (M_n[L_j] − (1−β)·M_{n−1}[L_j])·e_{n−j},  M_n the mean over step n.

    Raises:
        UsageError: a number outside (0, 5].
    """
    order, beta = split(number)
    rule = Core(resolve_core(core, grid), grid)
    carry = 1.0 - beta
    gammas = [
        beta * g + carry * before
        for g, before in zip(_DIFFERENCES[:order], (0.0, *_DIFFERENCES[: order - 1]), strict=True)
    ]

    def fixed(i: int) -> Slope:
        if i >= order:
            return Slope(_from_differences(gammas), carry)
        velocities = [_filtered(beta, lag) for lag in range(i, -1, -1)]  # of v_i, v_{i−1}, …, v_0 over e_·, newest last
        weights = [0.0] * (i + 1)
        for of_velocity, velocity in zip(_from_differences(gammas[: i + 1]), velocities, strict=True):
            for index, weight in enumerate(velocity):
                weights[i - index] += of_velocity / beta * weight
        return Slope(tuple(weights))

    def variable_step(i: int) -> Slope:
        nodes = range(i, i - min(order, i + 1), -1)
        mean = rule.lagrange(i, nodes, variable)
        if i == 0 or carry == 0.0:
            return Slope(mean)
        past = rule.lagrange(i - 1, nodes, variable)
        return Slope(tuple(now - carry * then for now, then in zip(mean, past, strict=True)), carry)

    return multistep_plan(rule, variable_step if variable else fixed, name=f"ghvb({number:g})")


def split(number: float) -> tuple[int, float]:
    """(order r, β) of a GHVB number k.d.

    Raises:
        UsageError: a number outside (0, 5].
    """
    if not isinstance(number, (int, float)) or not 0.0 < number <= MAX_GHVB:
        raise UsageError(f"The GHVB order must be a number above 0 and at most 5, such as 2.5; got {number!r}.")
    order = math.ceil(number)
    return order, 1.0 - (order - number)


def _filtered(beta: float, newest: int) -> list[float]:
    """Weights of v_newest over e_0 … e_newest."""
    weights = [1.0]
    for _ in range(newest):
        weights = [(1.0 - beta) * weight for weight in weights] + [beta]
    return weights


def _from_differences(gammas: Sequence[float]) -> tuple[float, ...]:
    """Σ_k gammas[k]·∇^k as weights of the values themselves, newest first."""
    return tuple(
        sum((-1) ** lag * math.comb(k, lag) * gamma for k, gamma in enumerate(gammas)) for lag in range(len(gammas))
    )
