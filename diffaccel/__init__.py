"""diffaccel: diffusers models in 1 to 10 network evaluations.

Everything public is imported on first use, so `import diffaccel` costs neither torch nor diffusers. Importing the
package is also what lets `diffusers.DiffusionPipeline.from_pretrained` open folders that it saved.
"""

import importlib
import logging

from ._registration import install as _install

__version__ = "0.1.0"

_PUBLIC = {
    "APG": "diffaccel.guidance.rules",
    "AutoGuidance": "diffaccel.guidance.rules",
    "CFG": "diffaccel.guidance.rules",
    "CFGPlusPlus": "diffaccel.guidance.rules",
    "CFGZeroStar": "diffaccel.guidance.rules",
    "ClassConditionalPipeline": "diffaccel.models.pipeline",
    "DDIMScheduler": "diffaccel.samplers.scheduler",
    "DEISScheduler": "diffaccel.samplers.scheduler",
    "DPMSolverScheduler": "diffaccel.samplers.scheduler",
    "FeynmanKac": "diffaccel.guidance.feynman_kac",
    "FewStepDiTPipeline": "diffaccel.models.few_step_pipelines",
    "FewStepPixArtAlphaPipeline": "diffaccel.models.few_step_pipelines",
    "FewStepPixArtSigmaPipeline": "diffaccel.models.few_step_pipelines",
    "FewStepScheduler": "diffaccel.samplers.few_step",
    "FewStepStableDiffusion3Pipeline": "diffaccel.models.few_step_pipelines",
    "FewStepStableDiffusionPipeline": "diffaccel.models.few_step_pipelines",
    "FewStepStableDiffusionXLPipeline": "diffaccel.models.few_step_pipelines",
    "FlowAdamsScheduler": "diffaccel.samplers.scheduler",
    "GHVBScheduler": "diffaccel.samplers.scheduler",
    "IPNDMScheduler": "diffaccel.samplers.scheduler",
    "MultiStudentModel": "diffaccel.models.multi_student",
    "RhoRKScheduler": "diffaccel.samplers.scheduler",
    "SearchedScheduler": "diffaccel.samplers.searched",
    "UniPCScheduler": "diffaccel.samplers.scheduler",
    "PrunedUNet2DConditionModel": "diffaccel.prune.classes",
    "PrunedUNet2DModel": "diffaccel.prune.classes",
    "Interval": "diffaccel.guidance.rules",
    "PerpNeg": "diffaccel.guidance.rules",
    "Rescale": "diffaccel.guidance.rules",
    "RuleGuider": "diffaccel.guidance.modular",
    "compare_methods": "diffaccel.distill_comparison",
    "calibrate_guidance": "diffaccel.guidance.calibrate",
    "disable_guidance": "diffaccel.guidance.attach",
    "distill_model": "diffaccel.distillation",
    "enable_guidance": "diffaccel.guidance.attach",
    "apply_plan": "diffaccel.search.layers",
    "evaluate_fid": "diffaccel.evaluate.run",
    "evaluate_images": "diffaccel.evaluate.run",
    "generate": "diffaccel.generation",
    "get_sampler": "diffaccel.samplers.registry",
    "guide": "diffaccel.guidance.attach",
    "load_denoiser": "diffaccel.models.teachers",
    "load_pipeline": "diffaccel.models.teachers",
    "optimize": "diffaccel.execution.optimize",
    "optimize_attention": "diffaccel.attention.optimize",
    "parallel_cfg": "diffaccel.execution.rows",
    "prune_model": "diffaccel.pruning",
    "reuse_text": "diffaccel.attention.text",
    "sequential_cfg": "diffaccel.execution.rows",
    "recommended_guidance": "diffaccel.guidance.settings",
    "remove_plan": "diffaccel.search.layers",
    "search_schedule": "diffaccel.solver_search",
    "skip_layers": "diffaccel.search.layers",
    "skippable": "diffaccel.search.layers",
    # diffusers decides how to load a third-party component by looking for these names beside its class.
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
}
_PRUNED = "diffaccel.prune.classes"  # has a class for every model of diffusers: PrunedFluxTransformer2DModel, …
__all__ = [name for name in _PUBLIC if name not in ("ModelMixin", "SchedulerMixin")]


def __getattr__(name: str):
    if name in _PUBLIC or name.startswith("Pruned"):
        value = getattr(importlib.import_module(_PUBLIC.get(name, _PRUNED)), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'diffaccel' has no attribute {name!r}")


def __dir__():
    return sorted(set(globals()) | set(_PUBLIC))


_install()
if logging.getLogger("xformers").level == logging.NOTSET:
    # Without CUDA its import warns in five lines, whoever imports a model; `AttentionReport.explain` says what it lacks.
    logging.getLogger("xformers").setLevel(logging.ERROR)
