"""One call of a guided pipeline: what its network predicts is recorded, and what it hands to its scheduler replaced."""

import functools
import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..core.errors import GuidanceError
from .batches import doubled, half, rows_of, tensor_of
from .conditions import Condition, capture
from .context import Context
from .layouts import KNOWN, Branches, cond_only, recognise, repeated, shaped
from .levels import level_of, target_of
from .rules import COND, UNCOND
from .standins import stand_in

NETWORKS = ("unet", "transformer", "transformer_2", "prior", "decoder")
"""Components of pipelines that predict."""


@dataclass
class Call:
    """A call of the network: its arguments, and its output or None where it was left out."""

    network: torch.nn.Module
    args: tuple
    kwargs: dict
    output: Any


class Run:
    """One call of a guided pipeline, as a context manager around it.

    Args:
        guidance: the `attach.Guidance`; its layout is filled in when it becomes known.
        pipe: the pipeline.
        cls: its own class.
        arguments: of the call, by name, defaults included.
    """

    def __init__(self, guidance, pipe, cls: type, arguments: dict):
        self.guidance, self.rule, self.pipe, self.cls, self.arguments = guidance, guidance.rule, pipe, cls, arguments
        self.step, self.start = 0, None  # evaluations before this one; index of the first in the scheduler's timesteps
        self.memory: dict = {}
        self.conditions: dict[str, Condition] = {}
        self._begin_evaluation()

    def _begin_evaluation(self) -> None:
        self.context: Context | None = None
        self.calls: list[Call] = []
        self.left_out = False

    def __enter__(self):
        self._check_call()
        own = {branch: self.rule.extra(branch).arguments for branch in self.rule.requires - {COND, UNCOND}}
        for branch, arguments in own.items():
            if arguments is not None:
                self.conditions[branch] = capture(self.pipe, self.cls, self.arguments, arguments, NETWORKS)
        scheduler = self.pipe.scheduler
        self._replaced = {"scheduler": (scheduler, stand_in(scheduler, step=self._stepping(type(scheduler).step)))}
        for name in NETWORKS:
            network = getattr(self.pipe, name, None)
            if isinstance(network, torch.nn.Module):
                self._replaced[name] = network, stand_in(network, __call__=self._calling(network))
        self.pipe.__dict__.update({name: double for name, (_, double) in self._replaced.items()})

    def __exit__(self, kind, *_):
        for name, (original, double) in self._replaced.items():
            if self.pipe.__dict__.get(name) is double:  # else the pipeline was given another meanwhile
                self.pipe.__dict__[name] = original
        if kind is None and (self.step == 0 or self.calls):
            raise GuidanceError(
                f"{self.cls.__name__} does not pass what its network predicts to the step of its scheduler; its images are "
                "not guided by this rule."
            )

    def _check_call(self) -> None:
        name, scale = self.cls.__name__, self.arguments.get("guidance_scale", self.arguments.get("max_guidance_scale"))
        known = name in KNOWN and "true_cfg_scale" not in self.arguments and isinstance(scale, (int, float))
        if UNCOND in self.rule.requires and known and scale <= 1.0:
            raise self._without_uncond(f"was called with guidance_scale={scale:g} and so")

    def _without_uncond(self, how: str) -> GuidanceError:
        remedy = (
            "true_cfg_scale above 1 and a negative_prompt"
            if "true_cfg_scale" in self.arguments
            else "guidance_scale above 1"
        )
        return GuidanceError(
            f"{self.cls.__name__} {how} runs without its unconditional branch, which {type(self.rule).__name__} needs: call it "
            f"with {remedy} (the rule's own scale is what counts)."
        )

    def _calling(self, network):
        def call(_, *args, **kwargs):
            return self._evaluate(network, args, kwargs)

        return call

    def _stepping(self, original):
        signature = inspect.signature(original)

        @functools.wraps(original)
        def step(scheduler, *args, **kwargs):
            return self._advance(original, signature, scheduler, args, kwargs)

        return step

    def _evaluate(self, network, args, kwargs):
        """Call the network as far as the rule needs it, and remember the call."""
        if len(self.calls) == 2:
            raise GuidanceError(
                "The network was called three times without a step of the scheduler in between; pipelines with more than two "
                "branches, or with steps of their own, cannot be guided."
            )
        if self.context is None:
            self.context = self._ahead(args, kwargs)
        index = self._spared(args, kwargs)
        if index is None:
            output = network(*args, **kwargs)
        elif index == "whole":
            output = self.calls[0].output
        else:
            rows = rows_of(args, kwargs)
            args, kwargs = half(args, rows, index), half(kwargs, rows, index)
            output = network(*args, **kwargs)
        self.left_out |= index is not None
        self.calls.append(Call(network, args, kwargs, output))
        return doubled(output) if index in (0, 1) else output

    def _spared(self, args, kwargs):
        """What of this call to leave out: None for nothing, "whole", or the index of the half of the batch to keep."""
        layout = self.guidance.layout
        if layout is None or UNCOND in self.rule.branches(self.context):
            return None
        if ", " in layout:
            # Where u comes first, its shape is still unknown when it would be left out.
            return "whole" if self.calls and layout.startswith(COND) else None
        return None if rows_of(args, kwargs) % 2 else layout.split("-").index(COND)

    def _ahead(self, args, kwargs) -> Context:
        """The context of an evaluation before the scheduler tells more about it."""
        scheduler = self.pipe.scheduler
        if self.start is None:
            begin = getattr(scheduler, "begin_index", None)
            self.start = _position(scheduler, args, kwargs) if begin is None else begin
        unknown = self.start is None
        steps = None if unknown else len(scheduler.timesteps) - self.start

        def find_level():
            if unknown:
                raise GuidanceError(
                    "The noise level of this pipeline's evaluations is not known before they are made; use "
                    "Interval(fraction_range=(start, stop))."
                )
            return level_of(scheduler, scheduler.timesteps[self.start + self.step])

        return Context(self.step, steps, find_level, memory=self.memory)

    def _advance(self, original, signature, scheduler, args, kwargs):
        """The scheduler's step with the rule's prediction in place of the pipeline's."""
        bound = signature.bind(scheduler, *args, **kwargs)
        given = bound.arguments
        if not {"model_output", "timestep", "sample"} <= given.keys() or not self.calls:
            raise GuidanceError(
                f"{self.cls.__name__} steps its {type(scheduler).__name__} in a way that guidance does not know."
            )
        branches, context = self._branches(given["model_output"]), self.context
        context.x = given["sample"].chunk(branches.copies)[0]
        context.find_level = partial(level_of, scheduler, given["timestep"])
        context.find_target = partial(target_of, scheduler, given["timestep"])
        given["model_output"] = branches.restore(self._guided(branches), given["model_output"])
        result = original(*bound.args, **bound.kwargs)
        state = result[0]
        corrected = self.rule.correct(state.chunk(branches.copies)[0], context)
        if corrected is not state:
            result = _with_state(result, repeated(corrected, branches.copies).to(state.dtype))
        self.step += 1
        self._begin_evaluation()
        return result

    def _branches(self, result: torch.Tensor) -> Branches:
        outputs = [tensor_of(call.output) for call in self.calls]
        if self.left_out:
            return cond_only(outputs[0], result)
        guidance = self.guidance
        found = recognise(outputs, result, guidance.layout, guidance.trusted)
        if found.uncond is None and UNCOND in self.rule.requires:
            raise self._without_uncond("runs")
        guidance.layout = guidance.layout or found.layout
        return found

    def _guided(self, branches: Branches) -> torch.Tensor:
        predictions = {COND: _wide(branches.cond)}
        if branches.uncond is not None:
            predictions[UNCOND] = _wide(branches.uncond)
        for branch in sorted(self.rule.branches(self.context) - {COND, UNCOND}):
            predictions[branch] = _wide(shaped(self._extra(branch, branches.layout), branches.cond))
        return self.rule(predictions, self.context)

    def _extra(self, branch: str, layout: str | None) -> torch.Tensor:
        """A branch that the pipeline does not compute: the call of its conditional branch with something exchanged."""
        layout = layout or self.guidance.layout or ""
        call = self.calls[1 if layout == "uncond, cond" and len(self.calls) == 2 else 0]
        args, kwargs, rows = call.args, call.kwargs, rows_of(call.args, call.kwargs)
        whole = "-" in layout and not self.left_out
        if whole:
            index = layout.split("-").index(COND)
            args, kwargs = half(args, rows, index), half(kwargs, rows, index)
        if branch in self.conditions:
            args, kwargs = self.conditions[branch].applied(args, kwargs, layout)
        network = self.rule.extra(branch).network or call.network
        return tensor_of(network(*args, **kwargs))


def _position(scheduler, args: tuple, kwargs: dict) -> int | None:
    """Index in the scheduler's timesteps of the time that the network is called with, None if it is not among them."""
    time = kwargs.get("timestep", args[1] if len(args) > 1 else None)
    if time is None:
        return None
    time = float(time.max()) if isinstance(time, torch.Tensor) else float(time)
    times = scheduler.timesteps.double().cpu()
    for unit in (1.0, float(scheduler.config.get("num_train_timesteps", 1000))):  # some networks take t / 1000
        distance, index = (times - time * unit).abs().min(0)
        if distance <= 4e-3 * max(abs(time * unit), 1.0):  # they may round it to bfloat16
            return int(index)
    return None


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _with_state(result, state: torch.Tensor):
    """A scheduler's result, tuple or output, with another state."""
    if isinstance(result, tuple):
        return (state, *result[1:])
    result.prev_sample = state
    return result
