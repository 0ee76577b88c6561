"""The samplers by the names that the command line uses. Importing this needs neither torch nor diffusers."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ..core.errors import unknown
from ..core.lazy import load_object


@dataclass(frozen=True)
class Sampler:
    """One sampler.

    Attributes:
        name: what the user types.
        summary: one line.
        paper: where it comes from.
        nfe_per_step: network calls per step, without guidance.
        target: "module:class" of the scheduler.
        defaults: keyword arguments that make the class this sampler.
        vp_grid: the grid that suits it on VP models, used where the caller and the model's configuration name none; flows
            and EDM models keep their own spacing.
        told_guidance: its class wants to know the scale of classifier-free guidance.
    """

    name: str
    summary: str
    paper: str
    nfe_per_step: int
    target: str
    defaults: Mapping = field(default_factory=lambda: MappingProxyType({}))
    vp_grid: str | None = None
    told_guidance: bool = False

    def load(self) -> type:
        """Import and return the scheduler class."""
        return load_object(self.target)

    def build(self, config: Mapping | None = None, **overrides):
        """A scheduler for a model.

        Args:
            config: ``pipe.scheduler.config`` of any diffusers scheduler for VP or flow models; None for the defaults.
            **overrides: configuration values on top of ``defaults``.

        Raises:
            UsageError: a name that the class does not take, or a value that does not exist.
        """
        from ..core.schedule import VPDiscrete  # here, because these import torch
        from .config import COMMON, SWITCHES, completed, translated

        cls = self.load()
        known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        for name in overrides:
            if name not in known:
                raise unknown("sampler option", name, known)
        # What the model's scheduler was told about its own rule is not meant for this one; where a run ends is.
        own = set(known) - COMMON - {"set_alpha_to_one"}
        model = {key: value for key, value in translated(config or {}).items() if key not in own}
        arguments = completed({**self.defaults, **overrides})
        scheduler = cls.from_config(model, **arguments)
        settled = "grid" in arguments or scheduler.config["grid"] or any(scheduler.config[key] for key in SWITCHES)
        if self.vp_grid is not None and not settled and isinstance(scheduler.noise_schedule, VPDiscrete):
            scheduler.register_to_config(grid=self.vp_grid)
        return scheduler


_DDIM = "Song, Meng & Ermon 2021, Denoising Diffusion Implicit Models (arXiv 2010.02502)"
_DEIS = "Zhang & Chen 2023, Fast Sampling of Diffusion Models with Exponential Integrator (arXiv 2204.13902)"
_MOMENTUM = "Wizadwongsa et al. 2024, Diffusion Sampling with Momentum (arXiv 2307.11118)"
_DPM = "Lu et al. 2022, DPM-Solver++ (arXiv 2211.01095)"
_UNIPC = "Zhao et al. 2023, UniPC: A Unified Predictor-Corrector Framework (arXiv 2302.04867)"


def _sampler(name, summary, paper, cls, grid="fast", nfe_per_step=1, told_guidance=False, **defaults) -> Sampler:
    target = f"diffaccel.samplers.scheduler:{cls}"
    return Sampler(name, summary, paper, nfe_per_step, target, MappingProxyType(defaults), grid, told_guidance)


SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        _sampler(
            "flow-adams",
            "the one to try first: any model as a flow, predictor and corrector",
            "docs/samplers.md of this package",
            "FlowAdamsScheduler",
            None,
            told_guidance=True,
        ),
        _sampler("ddim", "first order, deterministic; Euler on flows", _DDIM, "DDIMScheduler", None),
        _sampler("ddpm", "first order, ancestral noise", _DDIM, "DDIMScheduler", None, eta=1.0),
        _sampler("deis", "tAB-DEIS, noise (flows: velocity) as a polynomial in t", _DEIS, "DEISScheduler"),
        _sampler("deis-rho", "ρAB-DEIS, noise as a polynomial in σ/α", _DEIS, "DEISScheduler", variable="rho"),
        _sampler(
            "deis-log-rho",
            "noise as a polynomial in log σ/α, the rule of diffusers' DEIS",
            _DEIS,
            "DEISScheduler",
            variable="log-rho",
        ),
        _sampler(
            "deis-sde",
            "stochastic DEIS: x0 as a polynomial in log σ/α, ancestral noise",
            _DEIS,
            "DEISScheduler",
            solver_order=2,
            variable="log-rho",
            core="data",
            eta=1.0,
        ),
        _sampler("ipndm", "Adams–Bashforth with the weights of equal steps", _DEIS, "IPNDMScheduler"),
        _sampler(
            "heavy-ball",
            "iPNDM with heavy-ball momentum, for strong guidance",
            _MOMENTUM,
            "IPNDMScheduler",
            momentum="heavy-ball",
            beta=0.8,
        ),
        _sampler("ghvb", "generalised heavy ball of real order 1.8, for strong guidance", _MOMENTUM, "GHVBScheduler"),
        _sampler("dpm-solver", "DPM-Solver++ 2M, x0 in log σ/α", _DPM, "DPMSolverScheduler"),
        _sampler(
            "dpm-solver-3m",
            "DPM-Solver++ 3M with a third order that is one",
            _DPM,
            "DPMSolverScheduler",
            solver_order=3,
        ),
        _sampler("unipc", "predictor and corrector in log σ/α", _UNIPC, "UniPCScheduler"),
        _sampler("rho-heun", "Heun in σ/α", _DEIS, "RhoRKScheduler", nfe_per_step=2, tableau="2heun"),
        _sampler("rho-kutta", "Kutta's third order in σ/α", _DEIS, "RhoRKScheduler", nfe_per_step=3, tableau="3kutta"),
        _sampler("rho-rk4", "classical Runge–Kutta in σ/α", _DEIS, "RhoRKScheduler", nfe_per_step=4, tableau="4rk"),
    )
}


def get_sampler(name: str) -> Sampler:
    """The sampler of this name.

    Raises:
        UsageError: no such sampler.
    """
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    return SAMPLERS[name]
