"""The public schedulers: drop-in replacements for diffusers' own, one plan each.

    pipe.scheduler = diffaccel.DEISScheduler.from_config(pipe.scheduler.config)

All take the arguments of `config.common` besides their own. Their module is given as ``diffaccel``, because diffusers
looks there for the class of a saved pipeline. Arguments that several share:

    core               what is integrated: "noise", "data" or "velocity"; None for velocity on flows and noise elsewhere
    lower_order_final  let the order fall to 1 towards the last step
    momentum           "heavy-ball" or "nesterov", see `momentum.with_momentum`
    beta               β of the momentum in (0, 1]; None for 0.8
    guidance_scale     with momentum and no beta: choose β for this scale of classifier-free guidance, as Wizadwongsa et al.
                       2024 recommend
"""

from ..core.errors import UsageError, unknown
from ..core.grids import Grid
from ..core.schedule import VPDiscrete
from .adams import MAX_ORDER as MAX_ADAMS
from .adams import ghvb_plan, ipndm_plan, split
from .config import configured
from .ddim import check_eta, ddim_plan
from .deis import MAX_DEGREE, deis_plan
from .log_snr import SOLVER_TYPES, dpm_solver_plan, unipc_plan
from .momentum import MOMENTA, check_momentum, ghvb_beta, heavy_ball_beta
from .multistep import QUANTITIES, VARIABLES, check_stochastic
from .plan import Plan
from .runge_kutta import TABLEAUX, runge_kutta_plan
from .shell import PlanScheduler

_FOREIGN_TYPES = ("midpoint", "heun", "logrho")  # of diffusers' other solvers, read as the default here
_ALGORITHMS = {"dpmsolver++": ("data", 0.0), "sde-dpmsolver++": ("data", 1.0), "dpmsolver": ("noise", 0.0)}


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
        check_eta(self.config.eta)

    def plan(self, grid: Grid) -> Plan:
        """See `ddim.ddim_plan`."""
        return ddim_plan(grid, self.config.eta)

    @property
    def _end(self) -> str:
        table = isinstance(self.noise_schedule, VPDiscrete)  # elsewhere the key is a leftover of another scheduler
        return "sigma_min" if table and not self.config.set_alpha_to_one else super()._end


class FlowAdamsScheduler(PlanScheduler):
    """Adams predictor and corrector for the velocity of any model seen as a flow: the one to try first.

    With s = σ/(α+σ), x/(α+σ) moves with the rectified-flow velocity ε − x0 whatever the noise schedule. The velocity is
    taken as a polynomial in arctan(σ/α), every step is corrected once its end is evaluated, and a little momentum damps
    what the correction overshoots. On VP and EDM models the class comes with its own grid, "fast"; flows keep their own
    spacing. One network call per step.

    Args:
        solver_order: evaluations that a prediction combines, 1 … 4; the correction takes one more.
        corrector: None for on, but off where ``guidance_scale`` is above 2: strong guidance makes it unstable.
        variable: as for `DEISScheduler`.
        grid: a name in `core.spacings.GRIDS`, or None for ``timestep_spacing``.
        momentum, lower_order_final: see above.
        beta: None for 1 − 1/(2·steps), which keeps the second order; above a guidance scale of 2 for 1 − 0.03·scale, 0.8 at
            least (`benchmarks/momentum.py`).
        guidance_scale: the pipeline's scale of classifier-free guidance; say it here if it is above 2.
        **shared: see `config.common`.

    Raises:
        UsageError: a value that does not exist.
    """

    __module__ = "diffaccel"

    @configured
    def __init__(
        self,
        solver_order: int = 2,
        corrector: bool | None = None,
        variable: str = "angle",
        grid: str | None = "fast",
        lower_order_final: bool = False,
        momentum: str | None = "heavy-ball",
        beta: float | None = None,
        guidance_scale: float | None = None,
        **shared,
    ):
        super().__init__()
        _check_multistep(self.config, MAX_DEGREE + 1)

    def plan(self, grid: Grid) -> Plan:
        """See `deis.deis_plan`."""
        config, scale = self.config, self.config.guidance_scale
        guided = scale is not None and scale > 2.0
        corrector = config.corrector if config.corrector is not None else not guided
        beta = config.beta
        if beta is None:
            beta = max(0.8, 1.0 - 0.03 * scale) if guided else 1.0 - 0.5 / grid.steps
        degree, low, variable = config.solver_order - 1, config.lower_order_final, config.variable or "angle"
        return deis_plan(grid, degree, variable, low, "velocity", 0.0, corrector, config.momentum, beta)


class DEISScheduler(PlanScheduler):
    """DEIS (Zhang & Chen 2023): exponential Adams–Bashforth on the noise prediction. One network call per step.

    Args:
        solver_order: evaluations that a step combines, 1 … 4 (the paper's order 0 … 3).
        variable: "t" (tAB-DEIS), "rho" (ρAB-DEIS), "log-rho" (diffusers' DEISMultistepScheduler) or "angle".
        core: see above; the paper's is "noise".
        eta: 0 deterministic, 1 ancestral; the core is then "data" unless named, see `deis.deis_plan`.
        corrector: redo each step once its end is evaluated; not with eta.
        lower_order_final, momentum, beta, guidance_scale: see above.
        **shared: see `config.common`.

    Raises:
        UsageError: a value that does not exist.
    """

    __module__ = "diffaccel"

    @configured
    def __init__(
        self,
        solver_order: int = 3,
        variable: str = "t",
        core: str | None = None,
        eta: float = 0.0,
        corrector: bool = False,
        lower_order_final: bool = False,
        momentum: str | None = None,
        beta: float | None = None,
        guidance_scale: float | None = None,
        **shared,
    ):
        super().__init__()
        _check_multistep(self.config, MAX_DEGREE + 1, self.config.eta)

    def plan(self, grid: Grid) -> Plan:
        """See `deis.deis_plan`."""
        config, degree = self.config, self.config.solver_order - 1
        low, corrector, variable = config.lower_order_final, config.corrector, config.variable or "t"
        return deis_plan(grid, degree, variable, low, config.core, config.eta, corrector, *_momentum(config))


class IPNDMScheduler(PlanScheduler):
    """iPNDM (Zhang & Chen 2023): Adams–Bashforth with the weights of equal steps. One network call per step.

    Args:
        solver_order: evaluations that a step combines, 1 … 4.
        core, lower_order_final, momentum, beta, guidance_scale: see above.
        **shared: see `config.common`.

    Raises:
        UsageError: a value that does not exist.
    """

    __module__ = "diffaccel"

    @configured
    def __init__(
        self,
        solver_order: int = 3,
        core: str | None = None,
        lower_order_final: bool = False,
        momentum: str | None = None,
        beta: float | None = None,
        guidance_scale: float | None = None,
        **shared,
    ):
        super().__init__()
        _check_multistep(self.config, MAX_ADAMS)

    def plan(self, grid: Grid) -> Plan:
        """See `adams.ipndm_plan`."""
        config = self.config
        return ipndm_plan(grid, config.solver_order, config.lower_order_final, config.core, *_momentum(config))


class GHVBScheduler(PlanScheduler):
    """GHVB (Wizadwongsa et al. 2024): Adams–Bashforth of a real order, for strong guidance. One network call per step.

    Args:
        ghvb_order: k.d in (0, 5]: order ⌈k.d⌉ with β = the fractional part; 1.8 for few steps, 2.5 and more for many.
        variable: None for the paper's fixed coefficients; "t", "rho", "log-rho" or "angle" for variable-step GHVB.
        core: see above.
        guidance_scale: replace the fractional part of ``ghvb_order`` by the β recommended for this scale.
        **shared: see `config.common`.

    Raises:
        UsageError: a value that does not exist.
    """

    __module__ = "diffaccel"

    @configured
    def __init__(
        self,
        ghvb_order: float = 1.8,
        variable: str | None = None,
        core: str | None = None,
        guidance_scale: float | None = None,
        **shared,
    ):
        super().__init__()
        split(self.config.ghvb_order)
        _check_names(self.config)

    def plan(self, grid: Grid) -> Plan:
        """See `adams.ghvb_plan`."""
        number, scale = self.config.ghvb_order, self.config.guidance_scale
        if scale is not None:
            number = split(number)[0] - 1 + ghvb_beta(scale)
        return ghvb_plan(grid, number, self.config.core, self.config.variable)


class DPMSolverScheduler(PlanScheduler):
    """Multistep DPM-Solver++ (Lu et al. 2022), 2M and a third order that is one. One network call per step.

    Args:
        solver_order: 1, 2 or 3.
        algorithm_type: "dpmsolver++" (x0 prediction), "sde-dpmsolver++" (stochastic) or "dpmsolver" (noise prediction).
        lower_order_final, momentum, beta, guidance_scale: see above.
        **shared: see `config.common`.

    Raises:
        UsageError: a value that does not exist.
    """

    __module__ = "diffaccel"

    @configured
    def __init__(
        self,
        solver_order: int = 2,
        algorithm_type: str = "dpmsolver++",
        lower_order_final: bool = True,
        momentum: str | None = None,
        beta: float | None = None,
        guidance_scale: float | None = None,
        **shared,
    ):
        super().__init__()
        if self.config.algorithm_type not in (*_ALGORITHMS, "deis"):
            raise unknown("algorithm_type", str(self.config.algorithm_type), _ALGORITHMS)
        _check_multistep(self.config, 3, self._core_and_eta[1])

    def plan(self, grid: Grid) -> Plan:
        """See `log_snr.dpm_solver_plan`."""
        config, (core, eta) = self.config, self._core_and_eta
        return dpm_solver_plan(grid, config.solver_order, config.lower_order_final, core, *_momentum(config), eta)

    @property
    def _core_and_eta(self) -> tuple[str, float]:
        return _ALGORITHMS.get(self.config.algorithm_type, _ALGORITHMS["dpmsolver++"])


class UniPCScheduler(PlanScheduler):
    """UniPC (Zhao et al. 2023): every step is corrected once its end is evaluated. One network call per step.

    Args:
        solver_order: 1, 2 or 3, of the predictor.
        solver_type: "bh1" or "bh2".
        predict_x0: False for the noise prediction.
        corrector: False for the predictor alone.
        lower_order_final, momentum, beta, guidance_scale: see above.
        **shared: see `config.common`.

    Raises:
        UsageError: a value that does not exist.
    """

    __module__ = "diffaccel"

    @configured
    def __init__(
        self,
        solver_order: int = 2,
        solver_type: str = "bh2",
        predict_x0: bool = True,
        corrector: bool = True,
        lower_order_final: bool = True,
        momentum: str | None = None,
        beta: float | None = None,
        guidance_scale: float | None = None,
        **shared,
    ):
        super().__init__()
        _check_multistep(self.config, 3)
        if self.config.solver_type not in (*SOLVER_TYPES, *_FOREIGN_TYPES):
            raise unknown("solver_type", str(self.config.solver_type), SOLVER_TYPES)

    def plan(self, grid: Grid) -> Plan:
        """See `log_snr.unipc_plan`."""
        config = self.config
        kind = "bh2" if config.solver_type in _FOREIGN_TYPES else config.solver_type
        core = "data" if config.predict_x0 else "noise"
        return unipc_plan(
            grid, config.solver_order, kind, config.lower_order_final, config.corrector, core, *_momentum(config)
        )


class RhoRKScheduler(PlanScheduler):
    """ρRK-DEIS (Zhang & Chen 2023): Runge–Kutta in σ/α (in σ on flows). ``order`` network calls per step.

    The last step goes to σ = 0 in a single call, so that N steps of s stages cost s·(N−1) + 1 calls.

    Args:
        tableau: a name in `runge_kutta.TABLEAUX`.
        **shared: see `config.common`.

    Raises:
        UsageError: a value that does not exist.
    """

    __module__ = "diffaccel"

    @configured
    def __init__(self, tableau: str = "2heun", **shared):
        super().__init__()
        if self.config.tableau not in TABLEAUX:
            raise unknown("tableau", str(self.config.tableau), TABLEAUX)
        self.stages = self.order = len(TABLEAUX[self.config.tableau].nodes)

    def plan(self, grid: Grid) -> Plan:
        """See `runge_kutta.runge_kutta_plan`."""
        return runge_kutta_plan(grid, self.config.tableau)


def _momentum(config) -> tuple[str | None, float]:
    if config.momentum is None:
        return None, 1.0
    if config.beta is None:
        return config.momentum, 0.8 if config.guidance_scale is None else heavy_ball_beta(config.guidance_scale)
    return config.momentum, config.beta


def _check_multistep(config, highest_order: int, eta: float = 0.0) -> None:
    if config.solver_order not in range(1, highest_order + 1):
        allowed = ", ".join(map(str, range(1, highest_order)))
        raise UsageError(f"solver_order must be {allowed} or {highest_order}; got {config.solver_order!r}.")
    if config.beta is not None and config.momentum is None:
        raise UsageError(f"beta belongs to momentum: set momentum to one of {', '.join(MOMENTA)}, or leave beta out.")
    check_momentum(*_momentum(config), eta)
    check_stochastic(eta, bool(config.get("corrector")))
    _check_names(config)


def _check_names(config) -> None:
    for key, allowed in (("core", QUANTITIES), ("variable", VARIABLES)):
        if config.get(key) is not None and config[key] not in allowed:
            raise unknown(key, str(config[key]), allowed)
