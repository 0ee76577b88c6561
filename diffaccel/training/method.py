"""What a training method is: roles, phases and losses. The trainer owns everything else."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from ..core.errors import UsageError
from ..core.rng import KeyedRandom


@dataclass(frozen=True)
class Phase:
    """One kind of update inside a training step.

    Attributes:
        name: key of the phase's random streams and metrics.
        trains: roles whose optimisers step; every other role is frozen meanwhile.
        repeats: how many updates of this phase one training step makes.
    """

    name: str
    trains: tuple[str, ...]
    repeats: int = 1


@dataclass(frozen=True)
class Draw:
    """The random numbers of one micro-batch: samples start … start+count−1 of the global batch.

    Because every number is keyed by its sample's index, splitting a batch into micro-batches or over processes gives
    the same numbers.
    """

    random: KeyedRandom
    stream: str
    step: int
    start: int
    count: int
    batch_size: int
    device: torch.device

    def normal(self, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        """(count, *shape) standard normal, float32."""
        return self.random.normal(self._key(purpose), self.step, self.start, self.count, shape).to(self.device)

    def uniform(self, purpose: str) -> torch.Tensor:
        """(count,) in [0, 1), float64."""
        return self.random.uniform(self._key(purpose), self.step, self.start, self.count).to(self.device)

    def stratified(self, purpose: str) -> torch.Tensor:
        """(count,) in [0, 1), float64: one draw in each of batch_size equal strata, in random order."""
        strata = self.random.permutation(self._key(purpose) + "/strata", self.step, self.batch_size)
        own = strata[self.start : self.start + self.count].double().to(self.device)
        return (own + self.uniform(purpose)) / self.batch_size

    def integers(self, purpose: str, high: int) -> torch.Tensor:
        """(count,) int64 in [0, high)."""
        return self.random.integers(self._key(purpose), self.step, self.start, self.count, high).to(self.device)

    def _key(self, purpose: str) -> str:
        return f"{self.stream}/{purpose}"


@dataclass
class Loss:
    """What a phase returns for one micro-batch.

    Attributes:
        total: scalar to minimise, a mean over the micro-batch.
        metrics: scalars to log beside it (tensors or floats), means over the micro-batch.
    """

    total: torch.Tensor
    metrics: dict[str, torch.Tensor | float] = field(default_factory=dict)

    def detached(self) -> "Loss":
        """The same numbers without their graph; the total in float32."""
        metrics = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in self.metrics.items()}
        return Loss(self.total.detach().float(), metrics)


class Method(ABC):
    """Base of training methods. Leaves define a ``Config`` dataclass and the hooks below.

    Attributes:
        roles: trainable networks by name; frozen helpers (a teacher) are ordinary attributes. What requires no gradient
            when training starts is never trained. A role may hold something shared and frozen (the base of an adapter),
            if `parameters`, `state_dict` and `copy.deepcopy` leave it out and the trained rest is complete without it.
        main_role: the role whose moving average is sampled, exported and evaluated.
        reference: real images that the exported pipeline is measured against, as `evaluate` takes them; "" for none.
        drawing: settings of `evaluate` with which it is drawn from for that.
    """

    main_role: str
    reference = ""
    drawing: Mapping[str, object] = MappingProxyType({})
    roles: dict[str, nn.Module]

    @abstractmethod
    def phases(self, step: int) -> list[Phase]:
        """The updates of training step ``step``, in order."""

    @abstractmethod
    def loss(self, phase: Phase, draw: Draw) -> Loss:
        """The loss of one micro-batch; all randomness comes from ``draw``."""

    @abstractmethod
    def samples(self, model: nn.Module, random: KeyedRandom) -> torch.Tensor | None:
        """A fixed set of pictures drawn with ``model`` in the main role: (N, C, H, W) in [−1, 1], or None."""

    @abstractmethod
    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the result with ``model`` in the main role into an empty folder."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Scalars to log with each picture; cheap ones only."""
        return {}

    def to(self, device: torch.device) -> None:
        """Move frozen helpers; the trainer moves the roles."""

    def begin(self, folder: Path) -> None:
        """Called once before the first step and the first picture, after a checkpoint was loaded.

        Called on every process; only the main one (`core.processes.is_main_process`) may write, and no process goes on
        before all have returned.

        Args:
            folder: the run's folder, the same when the run is resumed; caches belong in a folder of their own in it.
        """

    def enable_gradient_checkpointing(self) -> None:
        """Make the network ``net`` of each role that has one compute its activations again in the backward pass.

        Raises:
            UsageError: a network that cannot, or no network at all.
        """
        networks = {name: module.net for name, module in self.roles.items() if hasattr(module, "net")}
        for name, net in networks.items():
            try:
                net.enable_gradient_checkpointing()
            except (AttributeError, ValueError):  # none of ours; diffusers' for a network that does not support it
                raise UsageError(
                    f"The {name}, a {type(net).__name__}, cannot compute its activations again; leave "
                    "trainer.gradient_checkpointing out."
                ) from None
        if not networks:
            raise UsageError("This method has no network for trainer.gradient_checkpointing; leave it out.")

    def extra_state(self) -> dict[str, torch.Tensor]:
        """State beyond weights and optimisers (running bins, counters) that resuming needs.

        Names and shapes are the same at every step: a checkpoint with others is refused.
        """
        return {}

    def load_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `extra_state`."""

    def end_phase(self, phase: Phase, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Called once after each update, when all its micro-batches were seen.

        Args:
            total: sums a tensor over the processes of the run.
        """

    def end_step(self, step: int) -> None:
        """Called after the updates of training step ``step`` (0-based) and before any checkpoint of it.

        Called on every process; only the main one may write, atomically, and no process goes on before all have
        returned. After a kill the step may be run again: it then gives the same bits, so writing a file twice is harmless.
        """
