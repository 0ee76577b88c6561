"""The distillation methods by name. Importing this needs neither torch nor diffusers."""

from dataclasses import dataclass

from ..core.errors import unknown
from ..core.lazy import load_object


@dataclass(frozen=True)
class MethodInfo:
    """Attributes:
    name: as typed on the command line.
    summary: one line.
    paper: where it comes from.
    cost: network evaluations of one training step, forward and backward not told apart.
    target: "module:class".
    """

    name: str
    summary: str
    paper: str
    cost: str
    target: str

    def load(self) -> type:
        """Import and return the method class."""
        return load_object(self.target)


METHODS = {
    info.name: info
    for info in (
        MethodInfo(
            "dmd",
            "distribution matching: the student follows teacher score minus critic score; needs no data",
            "Yin et al. 2024, One-step Diffusion with Distribution Matching Distillation (arXiv 2311.18828); DMD2 (2405.14867)",
            "3 (student update) + 2 per critic update",
            "diffaccel.distill.methods.dmd:DMD",
        ),
        MethodInfo(
            "f-distill",
            "distribution matching under any f-divergence, weighted by a discriminator's density ratio; needs data",
            "Xu et al. 2025, One-step Diffusion Models with f-Divergence Distribution Matching (arXiv 2502.15681)",
            "3 (student update) + 4 per critic update",
            "diffaccel.distill.methods.f_distill:FDistill",
        ),
    )
}


def get_method(name: str) -> MethodInfo:
    """Look a method up.

    Raises:
        UsageError: unknown name.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]
