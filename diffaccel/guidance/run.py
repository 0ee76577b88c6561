"""One call of a guided pipeline: what its network predicts is recorded, and what it hands to its scheduler replaced."""

import functools
import inspect
import logging
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..core.errors import GuidanceError
from ..core.standins import retire, stand_in
from ..models.batches import doubled, tensor_of
from ..models.networks import NETWORKS
from .batches import half, rows_of, samples_of
from .conditions import Condition, capture
from .context import Context
from .layouts import KNOWN, NAMES, Branches, agree, cond_only, recognise, repeated, shaped
from .levels import level_of, target_of
from .rules import COND, UNCOND

_log = logging.getLogger(__name__)

_SCALES = ("true_cfg_scale", "max_guidance_scale", "guidance_scale")

# Arguments by which pipelines guide in further ways, and what switches these off.
_FURTHER_GUIDANCE = {
    "guidance_rescale": 0.0,
    "pag_scale": 0.0,
    "sag_scale": 0.0,
    "stg_scale": 0.0,
    "skip_guidance_layers": None,
    "cfg_normalization": False,
}


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
        self.times: list[float] = []  # of the scheduler
        self.stepped: Counter[float] = Counter()  # by timestep
        self.foreseen: int | None = None  # index in the scheduler's timesteps of this evaluation
        self.memory: dict = {}
        self.conditions: dict[str, Condition] = {}
        extended = any(_is_extension(name) and value is not None for name, value in arguments.items())
        # Whether `half` is right about the arguments of the network; None until that is tried.
        self.halves: bool | None = True if cls.__name__ in KNOWN and not extended else None
        self.has_uncond = False  # whether the pipeline has run that branch
        self.idle = True  # whether the rule has had nothing to do yet
        self.doubled: int | None = None  # samples in calls of the network of which half are u and half are c
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
            retire(double, original)
        unseen, empty = self.step == 0 or self.calls, getattr(self.pipe, "num_timesteps", None) == 0
        self._begin_evaluation()
        self.memory.clear()
        if kind is None and unseen and not empty:
            raise GuidanceError(
                f"{self.cls.__name__} does not pass what its network predicts to the step of its scheduler; its images are "
                "not guided by this rule."
            )
        if kind is None and self.idle and self.rule.requires != {COND} and not empty:
            _log.warning(
                "%s acted in none of the %d evaluations: these images are not guided.", self.rule.title, self.step
            )

    def _check_call(self) -> None:
        self.rule.check(self.arguments)
        for name, off in _FURTHER_GUIDANCE.items():
            value = self.arguments.get(name, off)
            if value != off and not self.guidance.trusted:
                effect = f" (for its effect, guide by diffaccel.Rescale(rule, factor={value}))"
                raise GuidanceError(
                    f"{self.cls.__name__} was called with {name}={value!r}, which guides further than the rule: call it with "
                    f"{name}={off!r}{effect if name == 'guidance_rescale' else ''}."
                )
        if self._own_scale is not None and self._own_scale <= 1.0 and UNCOND in self.rule.requires:
            raise self._without_uncond(f"was called with guidance_scale={self._own_scale:g} and so ")

    @property
    def _own_scale(self) -> float | None:
        """The scale that alone decides whether this pipeline runs both branches; None where that is not known."""
        scale = self.arguments.get("guidance_scale", self.arguments.get("max_guidance_scale"))
        known = self.cls.__name__ in KNOWN and "true_cfg_scale" not in self.arguments
        return float(scale) if known and isinstance(scale, (int, float)) else None

    def _without_uncond(self, how: str = "") -> GuidanceError:
        name, rule = self.cls.__name__, self.rule.title
        if self.has_uncond:
            return GuidanceError(
                f"{name} ended its unconditional branch after {self.step} evaluations, as callbacks that cut guidance off do, and "
                f"{rule} still needs it: leave that callback out and use Interval(rule, fraction_range=(0, share))."
            )
        scale = next((key for key in self.arguments if key in _SCALES), None)
        if scale is None:
            return GuidanceError(
                f"{name} has no guidance of its own, and so no unconditional branch, which {rule} needs."
            )
        negative = " and a negative_prompt" if scale == "true_cfg_scale" else ""
        return GuidanceError(
            f"{name} {how}runs without its unconditional branch, which {rule} needs: call it with {scale} above 1{negative} "
            "(the rule's own scale is what counts)."
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
                f"{self.cls.__name__} calls its network three times without a step of its scheduler in between; pipelines with "
                "more than two branches, or with steps of their own, cannot be guided."
            )
        if self.context is None:
            self.context = self._ahead(args, kwargs)
        if UNCOND not in self.rule.branches(self.context):
            # Where u comes first in calls of their own, its shape is still unknown when it would be left out.
            if self.calls and self.guidance.layout == "cond, uncond":
                self.left_out = True
                self.calls.append(replace(self.calls[0], network=network))
                return self.calls[0].output
            if self._is_doubled(args, kwargs):
                return self._evaluate_half(network, args, kwargs)
        return self._called(network, args, kwargs)

    def _called(self, network, args, kwargs):
        output = network(*args, **kwargs)
        self.calls.append(Call(network, args, kwargs, output))
        return output

    def _is_doubled(self, args, kwargs) -> bool:
        """Whether a call holds both branches: without guidance, an even number of samples looks the same."""
        samples, scale = samples_of(args, kwargs), self._own_scale
        if self.step == 0 and scale is not None and scale > 1.0 and "-" in self.guidance.layout:
            told = getattr(self.pipe, "do_classifier_free_guidance", None)
            if told is None:
                told = len(samples) % 2 == 0 and torch.equal(*samples.chunk(2))
            self.doubled = len(samples) if told else None
        return len(samples) == self.doubled

    def _evaluate_half(self, network, args, kwargs):
        """Call the network for c alone, and hand it out as u too; all of it where that is not possible."""
        index = self.guidance.layout.split("-").index(COND)
        if not self.halves:
            output = self._called(network, args, kwargs)
            if self.halves is None:
                self._half(self.calls[-1], index)
            return output
        self.left_out = True
        return doubled(self._called(network, half(args, self.doubled, index), half(kwargs, self.doubled, index)))

    def _half(self, call: Call, index: int) -> tuple[tuple, dict]:
        """Arguments of a call for one of its branches; `halves` tells whether they are, and is found out here."""
        rows = rows_of(call.args, call.kwargs)
        args, kwargs = half(call.args, rows, index), half(call.kwargs, rows, index)
        if self.halves is None:
            try:
                self.halves = agree(tensor_of(call.network(*args, **kwargs)), tensor_of(call.output).chunk(2)[index])
            except torch.OutOfMemoryError:
                raise
            except Exception:  # of the network, which got something that `half` did not understand
                self.halves = False
        return args, kwargs

    def _ahead(self, args, kwargs) -> Context:
        """The context of an evaluation before the scheduler tells more about it."""
        scheduler = self.pipe.scheduler
        begin, entries = getattr(scheduler, "begin_index", None), len(scheduler.timesteps)
        if self.step == 0:
            self.start = _position(scheduler, args, kwargs) if begin is None else begin
        steps = getattr(self.pipe, "num_timesteps", None)  # some pipelines stop before the last
        if steps is None and self.start is not None:
            steps = entries - self.start

        def find_level():
            index = _position(scheduler, args, kwargs) if begin is None else begin + self.step
            if index is None or index >= entries:
                raise GuidanceError(
                    "The noise level of this pipeline's evaluations is not known before they are made; use "
                    "Interval(fraction_range=(start, stop))."
                )
            self.foreseen = index
            return level_of(scheduler, scheduler.timesteps[index])

        known = steps is not None and self.step < steps
        return Context(self.step, steps if known else None, find_level, memory=self.memory)

    def _advance(self, original, signature, scheduler, args, kwargs):
        """The scheduler's step with the rule's prediction in place of the pipeline's."""
        bound = signature.bind(scheduler, *args, **kwargs)
        given = bound.arguments
        if not {"model_output", "timestep", "sample"} <= given.keys() or not self.calls:
            raise GuidanceError(
                f"{self.cls.__name__} steps its {type(scheduler).__name__} in a way that guidance does not know."
            )
        self._check_time(scheduler, given["timestep"])
        branches, context = self._branches(given["model_output"]), self.context
        self.idle &= self.rule.branches(context) == {COND}
        context.x = given["sample"].chunk(branches.copies)[0]
        context.find_level = partial(level_of, scheduler, given["timestep"])
        context.find_target = partial(target_of, scheduler, given["timestep"], eta=given.get("eta", 0.0))
        given["model_output"] = branches.restore(self._guided(branches), given["model_output"])
        result = original(*bound.args, **bound.kwargs)
        if self.rule.corrects:
            state = result[0]
            corrected = self.rule.correct(state.chunk(branches.copies)[0], context)
            result = _with_state(result, repeated(corrected, branches.copies).to(state.dtype))
        self.step += 1
        self._begin_evaluation()
        return result

    def _check_time(self, scheduler, timestep) -> None:
        """Refuse a step at another time than was foreseen, and steps of several trajectories in turn.

        The former would be at another noise level, the latter would get each other's momentum.
        """
        time = _number(timestep)
        self.times = self.times or scheduler.timesteps.tolist()
        if "level" in vars(self.context) and self.times[self.foreseen] != time:
            raise GuidanceError(
                f"{self.cls.__name__} was foreseen to step at timestep {self.times[self.foreseen]:g} and steps at {time:g}, at "
                "another noise level; use Interval(fraction_range=(start, stop))."
            )
        self.stepped[time] += 1
        if self.stepped[time] > max(1, self.times.count(time)):
            raise GuidanceError(
                f"{self.cls.__name__} steps its scheduler repeatedly at timestep {time:g}, as for views of a panorama or a run "
                "that begins anew; guidance follows one run of one picture."
            )

    def _branches(self, result: torch.Tensor) -> Branches:
        outputs = [tensor_of(call.output) for call in self.calls]
        if self.left_out:
            return cond_only(outputs[0], result, self.guidance.trusted)
        guidance = self.guidance
        per_frame = "max_guidance_scale" in self.arguments
        found = recognise(outputs, result, guidance.layout, guidance.trusted, per_frame)
        if found.uncond is not None:
            self.has_uncond = True
        elif UNCOND in (self.rule.branches(self.context) if self.has_uncond else self.rule.requires):
            raise self._without_uncond()
        guidance.layout = guidance.layout or found.layout
        if found.layout is not None and "-" in found.layout:
            self.doubled = len(outputs[0])
        return found

    def _guided(self, branches: Branches) -> torch.Tensor:
        predictions = {COND: _wide(branches.cond)}
        if branches.uncond is not None:
            predictions[UNCOND] = _wide(branches.uncond)
        for branch in sorted(self.rule.branches(self.context) - {COND, UNCOND}):
            predictions[branch] = branches.sign * _wide(shaped(self._extra(branch, branches), branches.cond))
        return self.rule(predictions, self.context)

    def _extra(self, branch: str, branches: Branches) -> torch.Tensor:
        """A branch that the pipeline does not compute: the call of its conditional branch with something exchanged.

        Raises:
            GuidanceError: that call cannot be had.
        """
        layout = branches.layout or self.guidance.layout
        call = self.calls[1 if layout == "uncond, cond" and len(self.calls) == 2 else 0]
        args, kwargs, rows = call.args, call.kwargs, rows_of(call.args, call.kwargs)
        both = branches.uncond is not None
        if both and layout is None and branch in self.conditions:
            raise GuidanceError(f"The two branches agree and do not tell which is which: pass layout=, one of {NAMES}.")
        if rows == 2 * len(branches.cond):
            index = (layout or "cond-uncond").split("-").index(COND)
            args, kwargs = self._half(call, index)
            if not self.halves:
                raise GuidanceError(
                    f"The network of this {self.cls.__name__} cannot be called for one of its two branches, and so not for the "
                    f"further one that {self.rule.title} needs; use a rule without."
                )
        if branch in self.conditions:
            args, kwargs = self.conditions[branch].applied(args, kwargs, layout or "")
        network = self.rule.extra(branch).network or call.network
        return tensor_of(network(*args, **kwargs))


def _position(scheduler, args: tuple, kwargs: dict) -> int | None:
    """Index in the scheduler's timesteps of the time that the network is called with, None if it is not among them."""
    time = kwargs.get("timestep", args[1] if len(args) > 1 else None)
    if time is None:
        return None
    time = _number(time)
    times = scheduler.timesteps.cpu().double()  # in this order: not every device has float64
    for unit in (1.0, float(scheduler.config.get("num_train_timesteps", 1000))):  # some networks take t / 1000
        distance, index = (times - time * unit).abs().min(0)
        if distance <= 4e-3 * max(abs(time * unit), 1.0):  # they may round it to bfloat16
            return int(index)
    return None


def _is_extension(argument: str) -> bool:
    """Whether an argument of a pipeline puts arguments into the call of its network that no test has tried."""
    return argument.startswith("ip_adapter") or argument.endswith("attention_kwargs")


def _number(time) -> float:
    return float(time.max()) if isinstance(time, torch.Tensor) else float(time)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _with_state(result, state: torch.Tensor):
    """A scheduler's result, tuple or output, with another state."""
    if isinstance(result, tuple):
        return (state, *result[1:])
    result.prev_sample = state
    return result
