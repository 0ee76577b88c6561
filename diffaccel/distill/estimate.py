"""The memory of a run by role and update, and of its variants that take less."""

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..core.errors import UsageError
from ..models.denoiser import Condition
from ..training.config import TrainerConfig
from .adapters import AdapterConfig, AdapterDenoiser, find_targets
from .rehearsal import Cost, Rehearsal, Update

SUGGESTIONS = 3


@dataclass(frozen=True)
class RoleMemory:
    """Bytes of one role, and its number of parameters.

    Attributes:
        name: of the role.
        parameters: all of them.
        weights: parameters and buffers.
        gradients: of one update, if the role is trained.
        moments: of the optimiser.
        average: of the moving average.
    """

    name: str
    parameters: int
    weights: int
    gradients: int = 0
    moments: int = 0
    average: int = 0

    @property
    def lasting(self) -> int:
        """What is there all the time, gradients excepted."""
        return self.weights + self.moments + self.average


class Estimator:
    """Estimates variants of one run; what was rehearsed once is kept.

    Args:
        roles: see `plan.make_plan`.
        updates: of one training step.
        average: role of which there is a moving average.
        device: where training is to run.
        processes: that share a batch.
        condition: see `rehearsal.Rehearsal`.
    """

    def __init__(
        self,
        roles: Mapping[str, tuple[nn.Module, bool]],
        updates: Sequence[Update],
        average: str,
        device: torch.device,
        processes: int,
        condition: Condition | None,
    ):
        self._given, self._updates, self._average = roles, updates, average
        self._device, self._processes, self._condition = device, processes, condition
        self._rehearsals: dict[str, Rehearsal] = {}
        self._known: dict[tuple, Cost | None] = {}

    def roles(self, trainer: TrainerConfig, adapters: AdapterConfig | None) -> list[RoleMemory]:
        """What each role takes; trained denoisers are adapters of "teacher" if there are settings of those."""
        modules = self._rehearsal(adapters).roles
        return [
            _role(name, modules[name], trained, trainer.eight_bit, name == self._average)
            for name, (_, trained) in self._given.items()
        ]

    def samples(self, trainer: TrainerConfig) -> int:
        """Of one micro-batch of one process."""
        return trainer.batch_size // (self._processes * trainer.micro_batches)

    def costs(
        self, trainer: TrainerConfig, adapters: AdapterConfig | None, samples: int | None = None
    ) -> list[Cost | None]:
        """Of each update, one micro-batch; of ``samples`` if that is given."""
        batch = samples or self.samples(trainer)
        how = batch, trainer.precision, trainer.gradient_checkpointing, trainer.micro_batches > 1
        found = []
        for index, update in enumerate(self._updates):
            key = (index, repr(adapters), *how)
            if key not in self._known:
                self._known[key] = self._rehearsal(adapters).cost(update, *how)
            found.append(self._known[key])
        return found

    def suggestions(self, trainer: TrainerConfig, adapters: AdapterConfig | None, free: int) -> list[tuple[str, int]]:
        """Settings to type and the bytes of the run with them: a few that fit, or else all others, at least.

        What changes nothing but time comes first.
        """
        fitting, rest = [], []
        for changes, lora in self._variants(trainer, adapters):
            variant, count = self._fewest_parts(replace(trainer, **changes), lora or adapters, free)
            if typed := _typed(trainer, variant, lora):
                (fitting if count <= free else rest).append((typed, count))
            if len(fitting) == SUGGESTIONS:
                break
        return fitting or rest

    def _rehearsal(self, adapters: AdapterConfig | None) -> Rehearsal:
        key = repr(adapters)
        if key not in self._rehearsals:
            self._rehearsals[key] = Rehearsal(self._given, adapters, self._device, self._condition)
        return self._rehearsals[key]

    def _variants(self, trainer: TrainerConfig, adapters) -> Iterator[tuple[dict, AdapterConfig | None]]:
        more = not trainer.gradient_checkpointing and self._rehearsal(adapters).checkpointable
        checkpointing = {"gradient_checkpointing": True} if more else {}
        yield {}, None
        if checkpointing:
            yield checkpointing, None
        if self._device.type == "cuda" and trainer.precision == "no":
            yield checkpointing | {"precision": "bf16"}, None
        if self._device.type == "cuda" and not trainer.eight_bit and importlib.util.find_spec("bitsandbytes"):
            yield checkpointing | {"eight_bit": True}, None
        if adapters is None and self._adaptable():
            lora = AdapterConfig()
            yield {}, lora
            if checkpointing:
                yield checkpointing, lora

    def _adaptable(self) -> bool:
        """Whether adapters can take the place of the trained networks."""
        if any(isinstance(module, AdapterDenoiser) for module, _ in self._given.values()):
            return False
        try:
            find_targets(self._given["teacher"][0].net)
        except UsageError:
            return False
        return importlib.util.find_spec("peft") is not None

    def _fewest_parts(self, trainer: TrainerConfig, adapters, free: int) -> tuple[TrainerConfig, int]:
        """The trainer with the fewest micro-batches that fit, or else as many as there are samples, and its bytes."""
        rows, share = self.roles(trainer, adapters), trainer.batch_size // self._processes
        parts = [count for count in range(trainer.micro_batches, share + 1) if share % count == 0]
        finest = replace(trainer, micro_batches=parts[-1])
        if (least := total_bytes(rows, [])) > free:  # whatever activations take
            return finest, least
        if (count := total_bytes(rows, self.costs(trainer, adapters))) <= free or len(parts) == 1:
            return trainer, count
        low = total_bytes(rows, self.costs(finest, adapters))
        if low > free or len(parts) == 2:
            return finest, low
        # Peaks are the highest of straight lines in the number of samples, and so at most on a line between two of them.
        high, most = total_bytes(rows, self.costs(finest, adapters, share // parts[0])), share // parts[0]
        for count in parts[1:]:
            at_most = math.ceil(low + (high - low) * (share // count - 1) / (most - 1))
            if at_most <= free:
                return replace(trainer, micro_batches=count), at_most
        return finest, low


def total_bytes(roles: Sequence[RoleMemory], costs: Sequence[Cost | None]) -> int:
    """At the peak of a training step; where costs are not known, gradients without activations."""
    peaks = [cost.peak for cost in costs if cost is not None]
    gradients = [role.gradients for role in roles]
    return sum(role.lasting for role in roles) + max(peaks + gradients, default=0)


def _typed(before: TrainerConfig, after: TrainerConfig, lora: AdapterConfig | None) -> str:
    """What to type for a change of settings."""
    values = {
        "micro_batches": after.micro_batches,
        "gradient_checkpointing": str(after.gradient_checkpointing).lower(),
        "precision": after.precision,
        "eight_bit": str(after.eight_bit).lower(),
    }
    changed = [name for name in values if getattr(before, name) != getattr(after, name)]
    typed = [f"--lora {lora.rank}"] if lora else []
    return " ".join(typed + [f"--set trainer.{name}={values[name]}" for name in changed])


def _role(name: str, module: nn.Module, trained: bool, eight_bit: bool, averaged: bool) -> RoleMemory:
    parameters, buffers = list(module.parameters()), sum(buffer.nbytes for buffer in module.buffers())
    numbers = sum(parameter.numel() for parameter in parameters)
    if not trained:
        return RoleMemory(name, numbers, sum(parameter.nbytes for parameter in parameters) + buffers)
    single = 4 * numbers  # whatever is trained is in single precision
    moments = sum(_moments(parameter.numel(), eight_bit) for parameter in parameters)
    return RoleMemory(name, numbers, single + buffers, single, moments, single + buffers if averaged else 0)


def _moments(numbers: int, eight_bit: bool) -> int:
    """Bytes of AdamW's state of one parameter: two moments and, in torch, its number of steps.

    bitsandbytes keeps 32 bits for less than 4096 numbers, and else one scale for each block of 256.
    """
    if eight_bit and numbers >= 4096:
        return 2 * (numbers + 4 * math.ceil(numbers / 256))
    return 8 * numbers + (0 if eight_bit else 4)
