"""Conditions besides those of a pipeline's own branches, encoded by the pipeline itself.

Encoding prompts is different in every pipeline, but all of them do it before they call their network. So the pipeline is
called with the other prompt, and stopped when it calls its network for the first time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..core.errors import GuidanceError, UsageError
from ..core.standins import stand_in
from ..models.batches import SAMPLE
from .batches import half, rows_of

# Arguments of networks that belong to the evaluation, not to the condition.
_OF_THE_EVALUATION = (*SAMPLE, "timestep", "t", "return_dict")


@dataclass(frozen=True)
class Condition:
    """The arguments of a network's first call under a condition, all branches of the pipeline in it."""

    args: tuple
    kwargs: dict
    rows: int

    def applied(self, args: tuple, kwargs: dict, layout: str) -> tuple[tuple, dict]:
        """Arguments of one branch's call with this condition in place of their own."""
        if layout == "uncond, cond":
            raise GuidanceError(
                "Negatives of their own need a pipeline that runs its conditional branch first, or both at once."
            )
        own_args, own_kwargs = self.args, self.kwargs
        if "-" in layout:
            index = layout.split("-").index("cond")
            own_args, own_kwargs = half(own_args, self.rows, index), half(own_kwargs, self.rows, index)
        stated, asked = rows_of(own_args, own_kwargs), rows_of(args, kwargs)
        if stated != asked:
            raise GuidanceError(
                f"A negative describes {stated} samples where the call makes {asked}: give one, or one each."
            )
        changed = {name: value for name, value in own_kwargs.items() if name in kwargs and _is_condition(name)}
        return (*args[:2], *own_args[2:]), {**kwargs, **changed}


class _Started(BaseException):
    """Ends a call of a pipeline at its network; no `except Exception` of a pipeline stops it."""


def capture(pipe, cls: type, call: dict, changes: Mapping, networks: tuple[str, ...]) -> Condition:
    """The condition of a pipeline's call with some arguments changed.

    Args:
        pipe: the pipeline.
        cls: its class, whose call is started.
        call: arguments of the call by name.
        changes: arguments that state the condition; a single prompt, embedding or class is repeated over the batch of
            the call. Where they state a prompt, nothing is left of the call's own.
        networks: names of components, one of which the pipeline calls.

    Raises:
        UsageError: arguments that the pipeline does not have, or a negative prompt in the call.
    """
    stranger = next((name for name in changes if name not in call), None)
    if stranger is not None:
        raise UsageError(f"{cls.__name__} has no argument {stranger!r}; state negatives by arguments of its call.")
    if any(any(map(str.strip, _texts(value))) for name, value in call.items() if name.startswith("negative_prompt")):
        raise UsageError(
            f"Call {cls.__name__} with an empty negative_prompt: what is not wanted are the negatives of the rule, which "
            "compares them with the empty prompt."
        )
    prompts = any(map(_is_prompt, changes))
    given = {name: None if prompts and _is_prompt(name) else value for name, value in call.items()}
    given |= {name: _repeated(value, call, name) for name, value in changes.items()}
    if "generator" in given:
        given["generator"] = None
    started = []

    def stopping(_, *args, **kwargs):
        started.append((args, kwargs))
        raise _Started

    slots, bar = pipe.__dict__, "_progress_bar_config"
    before = {name: slots[name] for name in (*networks, bar) if name in slots}
    own = {name: value for name, value in before.items() if isinstance(value, torch.nn.Module)}
    try:
        slots.update({name: stand_in(network, __call__=stopping) for name, network in own.items()})
        slots[bar] = {**before.get(bar, {}), "disable": True}
        # Its noise is thrown away and must not change that of the real call.
        device = torch.device(getattr(pipe, "_execution_device", "cpu"))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            cls.__call__(pipe, **given)
    except _Started:
        pass
    finally:
        slots.pop(bar, None)
        slots.update(before)
    if not started:
        raise GuidanceError(f"{cls.__name__} did not call its network for the condition {dict(changes)!r}.")
    args, kwargs = started[0]
    return Condition(args, kwargs, rows_of(args, kwargs))


def _is_prompt(name: str) -> bool:
    return "prompt" in name and "negative" not in name and not name.startswith(("num_", "max_"))


def _is_condition(name: str) -> bool:
    return name not in _OF_THE_EVALUATION and not any(
        part in name for part in ("residual", "controlnet", "block_samples")
    )


def _texts(value) -> list[str]:
    return [text for text in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(text, str)]


def _repeated(value, call: dict, name: str):
    """A single prompt, embedding or class for every one of the call."""
    like = call.get(name)
    if like is None and _is_prompt(name):  # the call stated its prompts in another way
        like = next((call[other] for other in ("prompt", "prompt_embeds") if call.get(other) is not None), None)
    if not isinstance(like, (list, tuple)) and not (isinstance(like, torch.Tensor) and like.ndim):
        return value
    if isinstance(value, torch.Tensor) and len(value) == 1:
        return value.expand(len(like), *value.shape[1:])
    return [value] * len(like) if isinstance(value, (str, int)) else value
