"""DEIS: exponential Adams–Bashforth samplers.

Zhang & Chen 2023, Fast Sampling of Diffusion Models with Exponential Integrator (arXiv 2204.13902).
"""

import math

from ..core.errors import UsageError
from ..core.grids import Grid
from .momentum import with_momentum
from .multistep import Core, Slope, check_stochastic, degrees, multistep_plan, resolve_core
from .plan import Plan

MAX_DEGREE = 3


def deis_plan(
    grid: Grid,
    degree: int = 2,
    variable: str = "t",
    lower_order_final: bool = False,
    core: str | None = "noise",
    eta: float = 0.0,
    corrector: bool = False,
    momentum: str | None = None,
    beta: float = 1.0,
) -> Plan:
    """The plan of tAB-DEIS, ρAB-DEIS or its log ρ variant (Zhang & Chen 2023, eq. 14 and 15), and of their relatives.

    In y = x/α the probability-flow ODE is dy/dρ = ε. ε is replaced by the polynomial in the chosen variable z through
    the last k+1 evaluations, with Lagrange basis L_j:

        x' = (α'/α)·x + α'·Σ_j w_j·ε_j,     w_j = ∫_ρ^ρ' L_j(z(ρ)) dρ.

    The first k steps use the orders that their history allows. Nodes at ρ = ∞ (start of a flow) take no part where z is
    infinite too. In log ρ a step to σ = 0 is first order, since z has no end there.

    Args:
        grid: the grid to step on.
        degree: k of the polynomial, 0 … 3 (the paper's order); 0 is DDIM.
        variable: what the polynomial is in: "t" (the schedule's time), "rho", "log-rho" (as in diffusers) or "angle"
            (arctan ρ, finite at both ends).
        lower_order_final: let the degree fall to 0 towards the last step.
        core: what the polynomial stands for: "noise" (ε, the paper's), "data" (x0) or "velocity" (ε − x0); None for
            data with eta, else velocity on flows and noise elsewhere.
        eta: 0 for the ODE, more for the SDE with the same marginals (1: ancestral). With the data core the noise of a
            step is exact for constant x0; with the noise core, the paper's, it is far too large below
            some 50 steps.
        corrector: redo each step once its end is evaluated, with that point as one more node (Adams–Moulton; no further
            calls). With eta = 0 only.
        momentum, beta: see `momentum.with_momentum`.

    Raises:
        UsageError: an order, a variable or a core that does not exist.
    """
    if degree not in range(MAX_DEGREE + 1):
        raise UsageError(f"The degree of DEIS must be 0, 1, 2 or 3; got {degree!r}.")
    check_stochastic(eta, corrector)
    rule = Core(resolve_core(core, grid, eta), grid, eta)
    reach = degrees(grid.steps, degree, lower_order_final)

    def polynomial(i: int) -> Slope:
        return Slope(rule.lagrange(i, range(i, i - reach[i] - 1, -1), variable))

    def corrected(i: int) -> Slope | None:
        if variable in ("rho", "log-rho") and math.isinf(grid.rho[i - 1]):
            return None  # the step's own start has no place in this variable
        return Slope(rule.lagrange(i - 1, range(i, i - reach[i - 1] - 2, -1), variable))

    predict, correct = with_momentum(momentum, beta, polynomial, corrected if corrector else None, eta)
    return multistep_plan(rule, predict, correct, name=f"deis({rule.name}, {variable}, degree={degree}, eta={eta:g})")
