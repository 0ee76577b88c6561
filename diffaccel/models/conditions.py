"""What a generator can be asked for: a finite list of classes or prompts, from which training draws."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

from .denoiser import Condition


class Conditions(ABC):
    """A finite list of conditions, drawn uniformly from all of them or from a part.

    Attributes:
        names: what people call each of them.
        members: (M,) int64, those that `draw` draws.
    """

    def __init__(self, names: Sequence[str], members: Sequence[int] | torch.Tensor | None = None):
        self.names = list(names)
        self.members = torch.as_tensor(range(len(self.names)) if members is None else members, dtype=torch.long)

    @property
    def count(self) -> int:
        """How many there are, 1 for a generator that takes no condition."""
        return len(self.names)

    @abstractmethod
    def at(self, index: torch.Tensor) -> Condition | None:
        """The network's keyword arguments for conditions ``index`` (B,) int64, on its device; None without condition."""

    @abstractmethod
    def only(self, members: Sequence[int] | torch.Tensor) -> "Conditions":
        """The same list, of which only ``members`` are drawn."""

    def draw(self, draw, purpose: str = "labels") -> torch.Tensor:
        """Indices (B,) int64 for one micro-batch (a `training.method.Draw`)."""
        return self.members.to(draw.device)[draw.integers(purpose, len(self.members))]

    def in_turn(self, start: int, count: int, device=None) -> torch.Tensor:
        """Indices (count,) of the samples from ``start`` on if the members take turns."""
        return self.members.to(device)[torch.arange(start, start + count, device=device) % len(self.members)]


class NoConditions(Conditions):
    """Of an unconditional model."""

    def __init__(self):
        super().__init__([""])

    def at(self, index):
        return None

    def only(self, members):
        return self


class ClassConditions(Conditions):
    """Classes 0 … count − 1.

    Args:
        count: number of classes, the null class not counted.
        members: those that are drawn; None for all.
    """

    def __init__(self, count: int, members: Sequence[int] | torch.Tensor | None = None):
        super().__init__([str(label) for label in range(count)], members)

    def at(self, index):
        return {"class_labels": index}

    def only(self, members):
        return ClassConditions(self.count, members)


class PromptConditions(Conditions):
    """Prompts, encoded once.

    Args:
        prompts: the texts.
        states: what the network is given for them, by its keywords: each (N, …).
        members: those that are drawn; None for all.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        states: Mapping[str, torch.Tensor],
        members: Sequence[int] | torch.Tensor | None = None,
    ):
        super().__init__(prompts, members)
        self.states = dict(states)

    def at(self, index):
        return {key: value[index.to(value.device)].to(index.device) for key, value in self.states.items()}

    def only(self, members):
        return PromptConditions(self.names, self.states, members)
