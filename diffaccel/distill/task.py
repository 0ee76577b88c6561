"""What is distilled: a frozen teacher, what it is asked for, real samples if there are any, and how its output is seen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..models.conditions import Conditions
from ..models.denoiser import Condition, NetworkDenoiser


class RealSamples(Protocol):
    """Real samples with their conditions, drawn by keyed random numbers."""

    def __len__(self) -> int: ...

    def batch(self, draw) -> tuple[torch.Tensor, Condition | None]:
        """Samples (B, C, H, W) in the teacher's space and their condition for one micro-batch."""

    def only(self, members: torch.Tensor) -> "RealSamples":
        """Those of some conditions (M,), or of some captions where they have captions of their own."""


@dataclass
class Task:
    """Attributes:
    teacher: frozen by the method that distils it.
    conditions: what students are trained for.
    data: real samples for discriminators, consistency training and the like; None without.
    pipeline: the teacher's diffusers pipeline, into whose copy a student is exported; None where nothing is exported.
    decode: from the teacher's samples to images (B, C, H, W) in [−1, 1].
    shared: the one frozen network that students and critics are adapters of; None for networks of their own.
    facts: for the model card: teacher, licence, recipe, …
    """

    teacher: NetworkDenoiser
    conditions: Conditions
    data: RealSamples | None = None
    pipeline: Any = None
    decode: Callable[[torch.Tensor], torch.Tensor] = lambda x0: x0
    shared: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scheduler_config(self) -> dict:
        """Configuration of the teacher's scheduler."""
        return dict(self.pipeline.scheduler.config) if self.pipeline is not None else {}

    def trainable(self, name: str) -> NetworkDenoiser:
        """A trainable network that starts as the teacher: a copy, or an adapter called ``name`` on the shared network."""
        if self.shared is not None:
            return self.shared.adapter(name)
        return self.teacher.clone().float().requires_grad_(True)
