"""Rules in diffusers' modular pipelines, whose blocks leave guidance to a component, the guider.

A guider sees predictions only. Here it also learns the state, from what the network is called with, and the noise level,
from the scheduler of the pipeline.
"""

import functools
import inspect
from functools import cached_property, partial

import torch
from diffusers.guiders import guider_utils
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from diffusers.modular_pipelines.modular_pipeline import BlockState

from ..core.errors import GuidanceError, UsageError
from ..core.standins import stand_in
from ..models.batches import SAMPLE
from ..models.networks import NETWORKS
from . import functional
from .attach import Guidance
from .base import COND, UNCOND, Rule
from .conditions import capture
from .context import Context
from .levels import level_of, target_of
from .rules import CFG

_PREFIX = "pred_"  # of the names of branches in diffusers


class RuleGuider(BaseGuidance):
    """A guider that follows a rule; `guide` puts it into a pipeline, ``pipe.update_components(guider=…)`` does too.

    Args:
        rule: such as `CFG` or `APG`.
        pipe: the modular pipeline, whose scheduler tells the noise level; None for rules that need none.

    Raises:
        UsageError: no rule. During calls of the pipeline:
        GuidanceError: the rule cannot act exactly; the text says why and what to do.
    """

    def __init__(self, rule: Rule, pipe=None):
        if not isinstance(rule, Rule):
            raise UsageError(f"RuleGuider takes a rule, such as diffaccel.APG(scale=10); got {rule!r}.")
        self.rule, self.pipe, self._input_predictions = rule, pipe, []
        self.attached = False  # whether a run takes care of what a guider alone cannot do
        self.eta = 0.0  # of the steps of DDIM
        self.conditions: dict[str, dict] = {}  # inputs of branches whose condition is not among the pipeline's own
        self.memory, self.context, self._undo = {}, None, []
        # The base class warns about an experimental interface, which is no news for those who call `guide`.
        log = guider_utils.logger
        before, log.disabled = log.disabled, True
        try:
            super().__init__()
        finally:
            log.disabled = before
        self.register_to_config(rule=rule, pipe=pipe)  # `new` and `from_config` make another of it

    @property
    def num_conditions(self) -> int:
        """Branches that the pipeline has to encode conditions for, 1 or 2."""
        return len(self.rule.requires & {COND, UNCOND}) if self._enabled else 1

    @property
    def is_conditional(self) -> bool:
        """Whether the branch being computed has a condition."""
        return self._branch != UNCOND

    @property
    def _branch(self) -> str:
        return self._branches[self._count_prepared - 1]

    def set_state(self, step, num_inference_steps, timestep):
        """Begin an evaluation; step 0 begins a run."""
        super().set_state(step, num_inference_steps, timestep)
        if step == 0:
            self._check_rule()
            self.memory = {}
            self._steps = num_inference_steps if self.pipe is None else _evaluations(self.pipe.scheduler, timestep)
        self.context = _Evaluation(self, step, self._steps, timestep)

    def _check_rule(self) -> None:
        beyond = self.rule.requires - {COND, UNCOND} or self.rule.corrects
        if beyond and not self.attached:
            raise GuidanceError(
                f"{self.rule.title} needs more than a guider can do by itself: use `with diffaccel.guide(pipe, rule):`."
            )

    def prepare_inputs(self, data):
        """The inputs of every branch that this evaluation needs, from pairs (with, without condition) by field.

        Raises:
            GuidanceError: the pipeline was called without what the unconditional branch needs.
        """
        pairs = [value for value in data.values() if isinstance(value, tuple)]
        if self.num_conditions == 2 and (not pairs or pairs[0][1] is None):
            raise GuidanceError(
                f"{self.rule.title} needs an unconditional branch: call the pipeline with negative_prompt, which may "
                "be empty, or with negative_prompt_embeds."
            )
        self.fields = data
        needed = (self.rule.branches(self.context) if self._enabled else frozenset()) | {COND}
        self._branches = sorted(needed, key=lambda branch: (branch != COND, branch != UNCOND, branch))
        return [self._inputs(data, branch) for branch in self._branches]

    def prepare_inputs_from_block_state(self, data, input_fields):
        """Like `prepare_inputs`, for the names of fields."""
        known, fields = vars(data), {}
        for field, names in input_fields.items():
            if isinstance(names, tuple):
                fields[field] = tuple(known.get(name) for name in names)
            elif names in known:
                fields[field] = known[names]
        return self.prepare_inputs(fields)

    def _inputs(self, data, branch: str) -> BlockState:
        own, index = self.conditions.get(branch), 1 if branch == UNCOND else 0
        fields = {}
        for name, value in data.items():
            paired = isinstance(value, tuple)
            if own is not None and paired and value[0] is not value[1]:  # a pair of the same is no condition
                value = own[name]
            fields[name] = value[index] if isinstance(value, tuple) else value
        return BlockState(**fields, **{self._identifier_key: _PREFIX + branch})

    def prepare_models(self, denoiser):
        """Make the network ready for the next branch."""
        super().prepare_models(denoiser)
        self._undo.append(denoiser.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        network = None if self._branch in (COND, UNCOND) else self.rule.extra(self._branch).network
        if network is not None:
            self._undo.append(_exchanged(denoiser, network))

    def cleanup_models(self, denoiser):
        """Leave the network as it was."""
        while self._undo:
            self._undo.pop()()

    def _before(self, _, args, kwargs):
        self.latents = args[0] if args else next((kwargs[name] for name in SAMPLE if name in kwargs), None)

    def __call__(self, data):
        """The guided prediction, in the dtype of the network's."""
        raw = {getattr(batch, self._identifier_key).removeprefix(_PREFIX): batch.noise_pred for batch in data}
        c = self.predicted = raw[COND]
        wide = {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in raw.items()}
        self.guided = self.rule(wide, self.context).to(c.dtype) if self._enabled else c
        return GuiderOutput(pred=self.guided, pred_cond=c, pred_uncond=raw.get(UNCOND))

    def save_config(self, *_, **__):
        """Refused: rules may hold networks and embeddings.

        Raises:
            UsageError: always.
        """
        raise UsageError("A rule is not saved with a pipeline: keep it in code and apply diffaccel.guide(pipe, rule).")

    def __repr__(self):
        return f"RuleGuider({self.rule!r})"


class _Evaluation(Context):
    """The context of an evaluation; its state is worked out when a rule asks, for that takes the noise level."""

    def __init__(self, guider: RuleGuider, step: int, steps: int | None, timestep):
        scheduler = getattr(guider.pipe, "scheduler", None)

        def known(find):
            if scheduler is None:
                raise GuidanceError("This rule needs the noise level: use RuleGuider(rule, pipe) or guide(pipe, rule).")
            return find(scheduler, timestep)

        target = partial(target_of, eta=guider.eta)
        super().__init__(step, steps, partial(known, level_of), None, partial(known, target), guider.memory)
        del self.x  # a value in the instance would hide the property
        self._guider = guider

    @cached_property
    def x(self) -> torch.Tensor:
        """(B, …) the state as the scheduler carries it, in the shape of the predictions."""
        seen, like = self._guider.latents, self._guider.predicted
        if isinstance(seen, (list, tuple)):  # one tensor per sample
            seen = torch.stack(list(seen))
        if seen is not None and seen.numel() == like.numel():
            seen = seen.reshape(like.shape)
        elif seen is not None and seen.ndim == like.ndim:  # images to start from and masks come after the state
            seen = seen[tuple(map(slice, like.shape))]
        if seen is None or seen.shape != like.shape:
            raise _hidden(type(self._guider.pipe).__name__)
        return seen.to(torch.promote_types(seen.dtype, torch.float32)) / self.level.scale


class ModularRun:
    """One call of a guided modular pipeline, as a context manager around it.

    Args:
        guidance: the `ModularGuidance`.
        pipe: the pipeline.
        cls: its own class.
        arguments: of the call, by name: ``state``, ``output`` and ``kwargs``.
    """

    def __init__(self, guidance: "ModularGuidance", pipe, cls: type, arguments: dict):
        self.pipe, self.cls, self.state, self.arguments = pipe, cls, arguments["state"], arguments["kwargs"]
        self.guiders, self.guider = guidance.guiders, RuleGuider(guidance.rule, pipe)
        self.guider.attached = True
        self.stepped, self.corrects = False, guidance.rule.corrects

    def __enter__(self):
        self._encode()
        replaced = dict.fromkeys(self.guiders, self.guider)
        scheduler = self.pipe.scheduler
        if scheduler is not None:
            replaced["scheduler"] = stand_in(scheduler, step=self._stepping(type(scheduler).step))
        self._own = self._put(replaced)
        self._replaced = replaced

    def __exit__(self, kind, *_):
        self.guider.cleanup_models(None)
        slots = self.pipe.__dict__  # the pipeline may have been given another component meanwhile
        self._put({name: own for name, own in self._own.items() if slots.get(name) is self._replaced[name]})
        evaluated = self.guider.context is not None
        if kind is None and evaluated and not self.stepped and ("x" in vars(self.guider.context) or self.corrects):
            raise _hidden(self.cls.__name__)

    def _put(self, components: dict) -> dict:
        """Exchange components of the pipeline; returns those before."""
        before = {name: self.pipe.__dict__[name] for name in components}
        self.pipe.__dict__.update(components)
        return before

    def _encode(self) -> None:
        """Check the call, and let the pipeline encode the conditions that its own branches do not have."""
        rule, given = self.guider.rule, {} if self.state is None else self.state.values
        defaults = {item.name: item.default for item in self.pipe.blocks.inputs if item.name}
        asked = {**defaults, **given, **self.arguments}
        rule.check(asked)
        self.guider.eta = asked.get("eta") or 0.0
        call = {**{name: value for name, value in asked.items() if name in defaults}, "state": self.state}
        for branch in rule.requires - {COND, UNCOND}:
            changes = rule.extra(branch).arguments
            if changes is None:
                continue
            recorder = RuleGuider(CFG(1.0))
            own = self._put(dict.fromkeys(self.guiders, recorder))
            try:
                capture(self.pipe, self.cls, call, changes, NETWORKS)
            finally:
                recorder.cleanup_models(None)
                self._put(own)
            self.guider.conditions[branch] = recorder.fields

    def _stepping(self, original):
        signature = inspect.signature(original)

        @functools.wraps(original)
        def step(scheduler, *args, **kwargs):
            given = signature.bind(scheduler, *args, **kwargs).arguments
            context = self.guider.context
            if "x" in vars(context) and not _same(context.x, given["sample"], self.guider.latents):
                raise _hidden(self.cls.__name__)
            result, self.stepped = original(scheduler, *args, **kwargs), True
            if not self.corrects:
                return result
            if not _same(self.guider.guided, given["model_output"], self.guider.guided):
                raise GuidanceError(
                    f"{self.cls.__name__} changes the guided prediction before its scheduler's step, which "
                    f"{self.guider.rule.title} cannot take into account; use another rule."
                )
            corrected = self.guider.rule.correct(result[0], context)
            return (corrected.to(result[0].dtype), *result[1:])  # no block asks for anything but a tuple

        return step


class ModularGuidance(Guidance):
    """A rule on a modular pipeline, as a context manager; made by `guide`. The pipeline keeps its own guider.

    Attributes:
        guiders: names of the guiders that the rule stands in for during calls.
    """

    run = ModularRun

    def __init__(self, pipe, rule: Rule, layout: str | None = None):
        super().__init__(pipe, rule)
        name = type(pipe).__name__
        if layout is not None:
            raise UsageError(f"layout is for classic pipelines; {name} names its branches itself, so leave it out.")
        own = {key: value for key, value in pipe.components.items() if isinstance(value, BaseGuidance)}
        if not own:
            raise GuidanceError(
                f"{name} has no guider: it runs the conditional branch alone, which no rule can change."
            )
        if any(hasattr(guider, "active_predictions") for guider in own.values()):
            raise GuidanceError(f"{name} guides several modalities at once, which rules do not know; keep its guiders.")
        self.guiders = list(own)


def _evaluations(scheduler, first) -> int:
    """Evaluations of a run that begins at a timestep."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is None:
        begin = int((scheduler.timesteps == first).int().argmax())
    return len(scheduler.timesteps) - begin


def _exchanged(denoiser: torch.nn.Module, network: torch.nn.Module):
    """Have calls of one network answered by another; returns what ends that."""
    slots = denoiser.__dict__
    before = {name: slots[name] for name in ("forward",) if name in slots}
    slots["forward"] = lambda *args, **kwargs: network(*args, **kwargs)  # a module itself would become a part of it

    def undo():
        del slots["forward"]
        slots.update(before)

    return undo


def _same(value: torch.Tensor, reference: torch.Tensor, stored) -> bool:
    """Whether two tensors differ by no more than the precision of ``stored`` explains."""
    stored = stored if isinstance(stored, torch.Tensor) else stored[0]
    if value.shape != reference.shape:
        return False
    tolerance = 8 * torch.finfo(stored.dtype).eps
    return bool((functional.norm(value - reference) <= tolerance * functional.norm(reference)).all())


def _hidden(name: str) -> GuidanceError:
    return GuidanceError(
        f"The network of this {name} is not called with the state that its scheduler steps, so that rules do not know x; use "
        'a rule in raw space, such as APG(space="raw").'
    )
