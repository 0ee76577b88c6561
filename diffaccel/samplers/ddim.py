"""DDIM: the first-order sampler of every schedule, deterministic or stochastic."""

import itertools
import math

from ..core.errors import UsageError
from ..core.grids import Grid
from .plan import Plan, Row


def ddim_plan(grid: Grid, eta: float = 0.0) -> Plan:
    """The plan of DDIM (Song, Meng & Ermon 2021, Denoising Diffusion Implicit Models, eq. 12 and 16).

    With noise-to-signal ratio rho = σ/α, one step to the level (α', σ') is

        x' = α'·x0 + sqrt(σ'² − s²)·ε + s·z,     s = eta·σ'·sqrt(1 − (rho'/rho)²),

    which for VP is the paper's variance and holds for VE and flow as well. It is written here in x and x0 alone, whose
    coefficients stay bounded where α = 0 (start of a flow) and where σ' = 0 (clean end). On a flow with eta = 0 it is
    Euler's method for the velocity.

    Args:
        grid: the grid to step on.
        eta: 0 deterministic … 1 ancestral (DDPM).

    Raises:
        UsageError: eta outside [0, 1].
    """
    check_eta(eta)
    nodes = list(zip(grid.times, grid.alpha, grid.sigma, strict=True))
    return Plan(tuple(ddim_row(*pair, eta) for pair in itertools.pairwise(nodes)), name=f"ddim(eta={eta:g})")


def ddim_row(level: tuple[float, float, float], following: tuple[float, float, float], eta: float = 0.0) -> Row:
    """The row of one DDIM step between two levels (t, α, σ); with eta = 0 they may come in any order."""
    (t, alpha, sigma), (_, next_alpha, next_sigma) = level, following
    noise = 0.0
    if eta:  # 1 − (rho'/rho)², without forming rho where α = 0
        noise = eta * next_sigma * math.sqrt(1.0 - (next_sigma * alpha / (next_alpha * sigma)) ** 2)
    direction = math.sqrt(next_sigma**2 - noise**2) / sigma
    return Row(t, alpha, sigma, "sample", (direction,), (next_alpha - direction * alpha,), noise)


def check_eta(eta: float) -> None:
    """Refuse an eta outside [0, 1].

    Raises:
        UsageError: saying so.
    """
    if not 0.0 <= eta <= 1.0:
        raise UsageError(f"eta must lie in [0, 1] (0 deterministic, 1 ancestral); got {eta!r}.")
