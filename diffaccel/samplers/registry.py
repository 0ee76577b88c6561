"""The samplers by the names that the command line uses. Importing this needs neither torch nor diffusers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ..core.errors import unknown
from ..core.lazy import load_object

_GRID_KEYS = {"grid", "timestep_spacing", "use_karras_sigmas", "use_exponential_sigmas"}


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
        vp_grid: the grid that suits it on VP models, used where the caller names none; flows keep their own spacing.
    """

    name: str
    summary: str
    paper: str
    nfe_per_step: int
    target: str
    defaults: Mapping = field(default_factory=lambda: MappingProxyType({}))
    vp_grid: str | None = None

    def load(self) -> type:
        """Import and return the scheduler class."""
        return load_object(self.target)

    def build(self, config: Mapping | None = None, **overrides):
        """A scheduler for a model.

        Args:
            config: ``pipe.scheduler.config`` of any diffusers scheduler for VP or flow models; None for the defaults.
            **overrides: configuration values on top of ``defaults``.
        """
        arguments = {**self.defaults, **overrides}
        scheduler = self.load().from_config(dict(config or {}), **arguments)
        settled = _GRID_KEYS & set(arguments) or scheduler.config.prediction_type == "flow_prediction"
        if self.vp_grid is None or settled:
            return scheduler
        return self.load().from_config(scheduler.config, grid=self.vp_grid)


_MODULE = "diffaccel.samplers.scheduler"
_DEIS = "Zhang & Chen 2023, Fast Sampling of Diffusion Models with Exponential Integrator (arXiv 2204.13902)"
SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler(
            "ddim",
            "first order, deterministic; Euler on flows",
            "Song, Meng & Ermon 2021, Denoising Diffusion Implicit Models (arXiv 2010.02502)",
            1,
            f"{_MODULE}:DDIMScheduler",
        ),
        Sampler(
            "deis", "tAB-DEIS, noise as a polynomial in t", _DEIS, 1, f"{_MODULE}:DEISScheduler", vp_grid="quadratic"
        ),
        Sampler(
            "deis-rho",
            "ρAB-DEIS, noise as a polynomial in σ/α",
            _DEIS,
            1,
            f"{_MODULE}:DEISScheduler",
            MappingProxyType({"variable": "rho"}),
            "quadratic",
        ),
        Sampler(
            "deis-log-rho",
            "noise as a polynomial in log σ/α, the rule of diffusers' DEIS",
            _DEIS,
            1,
            f"{_MODULE}:DEISScheduler",
            MappingProxyType({"variable": "log-rho"}),
            "quadratic",
        ),
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
