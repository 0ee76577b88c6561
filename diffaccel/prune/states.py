"""Pipelines seen as denoisers with conditions, and clean states that a model draws for its own recovery."""

import copy
import functools
from collections.abc import Mapping, Sequence

import torch

from ..core.errors import UsageError
from ..models.conditioning import PromptConditioning, conditioning_of
from ..models.denoiser import Condition, Guided, NetworkDenoiser
from ..models.networks import NETWORKS, network_of
from ..models.opened import parametrisation
from ..models.teachers import denoiser_of
from ..models.unet_condition import UNetConditionDenoiser, encode_prompts
from ..search.subjects import DenoiserSubject, fine_plan


def recoverable(pipe, prompts: Sequence[str] | None = None) -> tuple[NetworkDenoiser, Condition | None]:
    """A pipeline's network as a denoiser, which shares it, and what samples are conditioned on, in turn.

    Args:
        pipe: a ClassConditionalPipeline, or a text-to-image pipeline in Stable Diffusion's layout.
        prompts: of the latter; None for those that it brings.

    Returns:
        The denoiser, and its conditions (N, …), one a row: all classes, or the states of all prompts; None without any.

    Raises:
        UsageError: a pipeline of another kind or without prompts; what can be recovered is named.
    """
    if hasattr(pipe, "num_classes"):
        denoiser = denoiser_of(pipe)
        return denoiser, denoiser.num_classes and {"class_labels": torch.arange(denoiser.num_classes)}
    try:
        conditioning = conditioning_of(pipe, prompts=prompts)
    except ValueError as error:
        if getattr(pipe, "unet", None) is not None and hasattr(pipe, "tokenizer"):
            raise
        raise _not_recoverable(pipe) from error
    net = pipe.unet
    if (
        not isinstance(conditioning, PromptConditioning)
        or net.config.addition_embed_type
        or net.config.class_embed_type
    ):
        raise _not_recoverable(pipe)
    states = encode_prompts(pipe.tokenizer, pipe.text_encoder, ["", *conditioning.prompts]).to(net.device)
    denoiser = UNetConditionDenoiser(net, *parametrisation(pipe.scheduler), {"encoder_hidden_states": states[0]})
    return denoiser, {"encoder_hidden_states": states[1:]}


def piped(pipe, network):
    """A pipeline like another with another network in the place of its own; everything else is shared."""
    other, own = copy.copy(pipe), network_of(pipe)
    (role,) = [name for name in NETWORKS if getattr(pipe, name, None) is own]
    other.register_modules(**{role: network})
    return other


class DrawnStates:
    """Clean samples that a model drew once, to be noised again: a data set for those who have none.

    Sample i depends on the seed and on i only.

    Args:
        teacher: the model, on its device.
        conditions: see `recoverable`; sample i has the (i mod N)-th.
        count: samples.
        steps: network calls of the solver that draws them.
        guidance_scale: of classifier-free guidance while they are drawn; 1 for none.
        seed: of their noise.
        batch_size: samples drawn at once.
    """

    def __init__(
        self,
        teacher: NetworkDenoiser,
        conditions: Condition | None,
        count: int,
        steps: int,
        guidance_scale: float = 1.0,
        seed: int = 0,
        batch_size: int = 64,
    ):
        self.teacher, self.conditions = teacher, conditions
        self.count, self.steps, self.scale, self.seed, self.batch_size = count, steps, guidance_scale, seed, batch_size

    @functools.cached_property
    def samples(self) -> torch.Tensor:
        """(count, …) float32 on the CPU; drawn when they are first asked for."""

        def given(start: int, count: int) -> Condition | None:
            return taken(self.conditions, torch.arange(start, start + count))

        device = next(self.teacher.parameters()).device
        guided = Guided(self.teacher, self.scale)
        subject = DenoiserSubject(guided, None, lambda *part: moved(given(*part), device), self.batch_size)
        return subject.draw(subject.file(fine_plan(subject.schedule, self.steps)), self.seed, self.count)

    def batch(self, draw) -> tuple[torch.Tensor, Condition | None]:
        """Clean samples and their conditions for one micro-batch (a `training.method.Draw`)."""
        index = draw.integers("states", self.count).cpu()
        return self.samples[index].to(draw.device), moved(taken(self.conditions, index), draw.device)


def taken(conditions: Condition | None, index: torch.Tensor) -> Condition | None:
    """Rows of conditions (N, …), indices from N on starting over."""
    return conditions and {name: rows[index.to(rows.device) % len(rows)] for name, rows in conditions.items()}


def moved(condition: Mapping | None, device) -> Condition | None:
    """A condition on another device."""
    return condition and {name: rows.to(device) for name, rows in condition.items()}


def _not_recoverable(pipe) -> UsageError:
    return UsageError(
        f"Recovery trains pixel models (digits, digits-flow, mnist, DDPM-type folders) and text-to-image models in Stable "
        f"Diffusion's layout with one text encoder (tiny-sd, sd15); got a {type(pipe).__name__}. Prune it without --recover."
    )
