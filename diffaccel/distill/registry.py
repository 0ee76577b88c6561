"""The distillation methods by name. Importing this needs neither torch nor diffusers."""

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..core.errors import DataError, UsageError, unknown
from ..core.lazy import load_object


@dataclass(frozen=True)
class MethodInfo:
    """Attributes:
    name: as typed on the command line.
    summary: one line.
    paper: where it comes from.
    cost: network evaluations of one training step, forward and backward not told apart.
    target: "module:class", or the class, a `base.Distillation`.
    presets: names in the literature of settings that differ from the defaults of its Config.
    """

    name: str
    summary: str
    paper: str
    cost: str
    target: str | type
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))

    def load(self, settings: Mapping[str, Any]) -> type:
        """The method class for a group of settings; some methods are wrapped around the one that ``base`` names."""
        found = load_object(self.target) if isinstance(self.target, str) else self.target
        return found.variant(settings) if hasattr(found, "variant") else found

    def preset(self, name: str) -> Mapping[str, Any]:
        """The settings of a preset.

        Raises:
            UsageError: unknown name.
        """
        if name not in self.presets:
            if not self.presets:
                raise UsageError(f"{self.name} has no presets; leave method.preset out.")
            raise unknown(f"preset of {self.name}", name, self.presets)
        return self.presets[name]


_MODULE = "diffaccel.distill.methods"
METHODS = {
    info.name: info
    for info in (
        MethodInfo(
            "dmd",
            "distribution matching: the student follows teacher score minus critic score; needs no data",
            "Yin et al. 2024, One-step Diffusion with Distribution Matching Distillation (arXiv 2311.18828); DMD2 (2405.14867)",
            "3 (student update) + 2 per critic update",
            f"{_MODULE}.dmd:DMD",
            {
                "vsd": {"weighting": "vsd"},
                "diff-instruct": {"weighting": "uniform", "time_sampling": "log-normal"},
                "dmd": {"regression_weight": 0.25},
                "dmd2": {"gan_weight": 1e-3, "critic_steps": 5},
                "ladd": {"distribution_weight": 0.0, "gan_weight": 1.0, "gan_loss": "hinge"},
            },
        ),
        MethodInfo(
            "f-distill",
            "distribution matching under any f-divergence, weighted by a discriminator's density ratio; needs data",
            "Xu et al. 2025, One-step Diffusion Models with f-Divergence Distribution Matching (arXiv 2502.15681)",
            "3 (student update) + 4 per critic update",
            f"{_MODULE}.f_distill:FDistill",
        ),
        MethodInfo(
            "sid",
            "score identity: the gradient flows through teacher and critic into the student; needs no data",
            "Zhou et al. 2024, Score identity Distillation (arXiv 2404.04057)",
            "3 with gradients through all (student update) + 2 per critic update",
            f"{_MODULE}.sid:SiD",
        ),
        MethodInfo(
            "disback",
            "distribution backtracking around dmd, f-distill or sid: easier teachers first, along the path on which it forgets",
            "Zhang et al. 2025, Distribution Backtracking Builds a Faster Convergence Trajectory (arXiv 2408.15991)",
            "those of its base; 2 per recording step",
            f"{_MODULE}.disback:DisBack",
        ),
        MethodInfo(
            "multi-student",
            "several students around dmd, f-distill or sid, each for its share of the classes or prompts",
            "Song et al. 2025, Multi-student Diffusion Distillation for Better One-step Generators (arXiv 2410.23274)",
            "those of its base, for each student",
            f"{_MODULE}.multi_student:MultiStudent",
        ),
        MethodInfo(
            "consistency",
            "consistency distillation for 1 to 8 steps: CD, LCM, and SCott with stochastic steps; needs data",
            "Song et al. 2023 (arXiv 2303.01469); Luo et al. 2023, LCM (2310.04378); Liu et al. 2025, SCott (2403.01505)",
            "3, twice that under guidance",
            f"{_MODULE}.consistency:Consistency",
            {
                "cd": {"grid": "karras", "grid_steps": 40, "metric": "l2", "boundary": 1.0},
                "lcm": {"grid_steps": 50, "metric": "huber", "boundary": 10.0, "target_decay": 0.95},
                "lcm-lora": {"grid_steps": 50, "metric": "huber", "boundary": 10.0, "target_decay": 0.0},
                "scott": {"grid_steps": 42, "substeps": 3, "eta": 0.2, "adversarial_weight": 0.4, "student_steps": 2},
            },
        ),
        MethodInfo(
            "pairs",
            "regression on trajectories of the teacher from noise to image, or reflow on them; needs no data",
            "Luhman & Luhman 2021 (arXiv 2101.02388); Liu et al. 2023, Rectified Flow (2209.03003)",
            "1, after those that make the pairs",
            f"{_MODULE}.pairs:Pairs",
        ),
    )
}


def register(info: MethodInfo) -> MethodInfo:
    """Add a method from outside the package; its file may then be given as ``--method FILE.py``.

    Raises:
        UsageError: the name is taken by another class.
    """
    present = METHODS.get(info.name)
    if present is not None and present.target != info.target and not _same_file(present.target, info.target):
        raise UsageError(f"There is a method {info.name!r} already; register yours under another name.")
    METHODS[info.name] = info
    return info


def get_method(name: str) -> MethodInfo:
    """Look a method up.

    Args:
        name: of a method, or a Python file that registers one.

    Raises:
        UsageError: unknown name, or a file that registers no method.
        DataError: no such file, or one that cannot be imported.
    """
    if name.endswith(".py"):
        return _from_file(Path(name))
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def _from_file(path: Path) -> MethodInfo:
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    label = f"_diffaccel_method_{path.stem}"
    before = dict(METHODS)
    module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location(label, path))
    sys.modules[label] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except UsageError:
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    registered = [info for name, info in METHODS.items() if before.get(name) is not info]
    if len(registered) != 1:
        raise UsageError(
            f"{path} registers {len(registered)} methods; it must call diffaccel.distill.registry.register once."
        )
    return registered[0]


def _same_file(first: str | type, second: str | type) -> bool:
    """Whether two classes are the same one, imported twice from its file."""
    return (
        isinstance(first, type)
        and isinstance(second, type)
        and (first.__module__, first.__qualname__) == (second.__module__, second.__qualname__)
    )
