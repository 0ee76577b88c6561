"""Diffusers' pipelines as few-step students need them: called with a prompt alone, they take the student's own steps.

`FewStepStableDiffusionPipeline` is a StableDiffusionPipeline whose call takes ``num_inference_steps`` from its configuration
and runs no guidance unless it is told to, because the teacher's is folded into the student. Such a class exists for every
pipeline in `BASES`, and is made when it is asked for.
"""

import copy
import functools
import inspect
from contextlib import nullcontext

import diffusers
from torch import nn

from .networks import NETWORKS, eager
from .pipeline import ClassConditionalPipeline

PREFIX = "FewStep"
BASES = (
    "DiTPipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
)
_DEFAULTS = {"num_inference_steps": None, "guidance_scale": 1.0}


def student_pipeline(pipe, network: nn.Module, scheduler, num_inference_steps: int):
    """The pipeline of a student, which shares everything but network and scheduler with its teacher's.

    Args:
        pipe: pipeline of the teacher.
        network: of the student.
        scheduler: with the student's own timesteps.
        num_inference_steps: of a call that names none.

    Returns:
        A ClassConditionalPipeline for one, a few-step pipeline for one of `BASES`, and one of the teacher's own class for
        others, whose call must be told that there is no guidance.
    """
    if isinstance(pipe, ClassConditionalPipeline):
        return ClassConditionalPipeline.of(eager(network), scheduler, num_inference_steps)
    (role,) = [name for name in NETWORKS if getattr(pipe, name, None) is not None]
    student = copy.copy(pipe)
    student.register_modules(**{role: eager(network), "scheduler": scheduler})
    if (base := type(pipe).__name__.removeprefix(PREFIX)) in BASES:
        student.__class__ = few_step_class(getattr(diffusers, base))
        student.register_to_config(num_inference_steps=num_inference_steps)
    return student


@functools.cache
def few_step_class(base: type) -> type:
    """The few-step class of a pipeline class of diffusers: that of `BASES` with other defaults of its call."""
    signature = inspect.signature(base.__init__)
    steps = inspect.Parameter(
        "num_inference_steps", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=int | None
    )
    call = inspect.signature(base.__call__)
    changed = [p.replace(default=_DEFAULTS.get(p.name, p.default)) for p in call.parameters.values()]
    own_steps = call.parameters["num_inference_steps"].default

    def __init__(self, *args, num_inference_steps=None, **kwargs):
        base.__init__(self, *args, **kwargs)
        self.register_to_config(num_inference_steps=num_inference_steps)

    @functools.wraps(base.__call__)
    def __call__(self, *args, **kwargs):
        given = __call__.__signature__.bind(self, *args, **kwargs)
        given.apply_defaults()
        if given.arguments["num_inference_steps"] is None:
            given.arguments["num_inference_steps"] = self.config.num_inference_steps or own_steps
        # Some pipelines keep their generator from the scheduler, and the noise between steps is to follow it, too.
        drawing = getattr(self.scheduler, "drawing_from", nullcontext)
        with drawing(given.arguments["generator"]):
            return base.__call__(*given.args, **given.kwargs)

    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), steps])  # diffusers reads it
    __call__.__signature__ = call.replace(parameters=changed)
    name = PREFIX + base.__name__
    members = {
        "__doc__": f"A {base.__name__} of a few-step student: its call takes the student's steps and no guidance by itself.",
        "__init__": __init__,
        "__call__": __call__,
        "__module__": "diffaccel",
        "__qualname__": name,
    }
    return type(name, (base,), members)


def __getattr__(name: str) -> type:
    base = name.removeprefix(PREFIX)
    if not name.startswith(PREFIX) or base not in BASES:
        raise AttributeError(
            f"There is no {name}: pipelines of few-step students are {PREFIX} and one of {', '.join(BASES)}."
        )
    return few_step_class(getattr(diffusers, base))
