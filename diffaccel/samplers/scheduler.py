"""The public schedulers: drop-in replacements for diffusers' own, one plan each.

    pipe.scheduler = diffaccel.DEISScheduler.from_config(pipe.scheduler.config)

All take the arguments of `config.common` besides their own. Their module is given as ``diffaccel``, because diffusers
looks there for the class of a saved pipeline.
"""

from ..core.errors import UsageError, unknown
from ..core.grids import Grid
from .config import configured
from .ddim import ddim_plan
from .deis import MAX_ORDER, VARIABLES, deis_plan
from .plan import Plan
from .shell import PlanScheduler


class DDIMScheduler(PlanScheduler):
    """DDIM (Song, Meng & Ermon 2021); Euler's method on flows. One network call per step.

    Args:
        eta: 0 deterministic … 1 ancestral sampling.
        set_alpha_to_one: diffusers' key of DDIM; False ends at the cleanest training level.
        **shared: see `config.common`.

    Raises:
        UsageError: a value that does not exist.
    """

    __module__ = "diffaccel"

    @configured
    def __init__(self, eta: float = 0.0, set_alpha_to_one: bool = True, **shared):
        super().__init__()

    def plan(self, grid: Grid) -> Plan:
        """See `ddim.ddim_plan`."""
        return ddim_plan(grid, self.config.eta)

    @property
    def _end(self) -> str:
        return super()._end if self.config.set_alpha_to_one else "sigma_min"


class DEISScheduler(PlanScheduler):
    """DEIS (Zhang & Chen 2023): exponential Adams–Bashforth on the noise prediction. One network call per step.

    Args:
        solver_order: evaluations that a step combines, 1 … 4 (the paper's order 0 … 3).
        variable: "t" (tAB-DEIS), "rho" (ρAB-DEIS) or "log-rho" (diffusers' DEISMultistepScheduler).
        lower_order_final: let the order fall to 1 towards the last step.
        **shared: see `config.common`.

    Raises:
        UsageError: a value that does not exist.
    """

    __module__ = "diffaccel"

    @configured
    def __init__(self, solver_order: int = 3, variable: str = "t", lower_order_final: bool = False, **shared):
        super().__init__()
        if self.config.solver_order not in range(1, MAX_ORDER + 2):
            raise UsageError(f"solver_order must be 1, 2, 3 or 4; got {self.config.solver_order!r}.")
        if self.config.variable not in VARIABLES:
            raise unknown("DEIS variable", str(self.config.variable), VARIABLES)

    def plan(self, grid: Grid) -> Plan:
        """See `deis.deis_plan`."""
        return deis_plan(grid, self.config.solver_order - 1, self.config.variable, self.config.lower_order_final)
