"""Updates of a training step rehearsed on tensors without contents: their memory at its peak and their operations.

The networks run forward and backward as in training, but nothing is computed or allocated (torch's fake tensors), so that
what does not fit is known before anything is allocated. What operators store for themselves meanwhile is not seen.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..core.errors import UsageError
from ..core.memory import peak_bytes
from ..models.denoiser import Condition, NetworkDenoiser
from .adapters import AdapterConfig, AdapterDenoiser, SharedBase
from .updates import Update, calls

_ATEN = torch.ops.aten
_FORMULAS = {
    **flop_registry,  # which knows no attention of CPUs
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}


@dataclass(frozen=True)
class Cost:
    """Of one micro-batch of an update.

    Attributes:
        peak: bytes that are alive at once beyond weights: activations and gradients.
        gradients: bytes of the gradients among them.
        flops: of matrix products, convolutions and attention.
        operators: how many are called.
    """

    peak: int
    gradients: int
    flops: int
    operators: int


class Rehearsal:
    """The roles of a method without the contents of their tensors.

    Args:
        roles: modules by name and whether they are trained; names may share a module of which each is to have a copy.
            Trained modules that are no denoisers (a discriminator) are called with features of ``teacher``, whose
            evaluation counts as theirs.
        adapters: if given, all other denoisers are adapters of ``teacher`` instead of networks of their own.
        device: where training is to run; kernels, and so memory, depend on it.
        condition: of samples of the networks, (1, …) each; default: their empty condition.

    Attributes:
        roles: the copies.
    """

    def __init__(
        self,
        roles: Mapping[str, tuple[nn.Module, bool]],
        adapters: AdapterConfig | None = None,
        device: torch.device | str = "cpu",
        condition: Condition | None = None,
    ):
        self.device, self._condition = torch.device(device), condition
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        modules = {name: module for name, (module, _) in roles.items()}
        if adapters is not None:
            base = SharedBase(_hollow(modules["teacher"], {}, "meta"), adapters)
            others = [name for name, module in modules.items() if isinstance(module, NetworkDenoiser)]
            modules |= {name: base.adapter(name) for name in others} | {"teacher": base.teacher}
        bases = {id(module.base): module.base for module in modules.values() if isinstance(module, AdapterDenoiser)}
        shared: dict = {}
        with self._mode:
            for base in bases.values():
                _hollow(base.teacher, shared, self.device)
            of_base = {id(base.teacher) for base in bases.values()}
            self.roles = {}
            for name, module in modules.items():
                with_base = isinstance(module, AdapterDenoiser) or id(module) in of_base
                self.roles[name] = _hollow(module, shared if with_base else {}, self.device)
        self.trained = [name for name, (_, train) in roles.items() if train]

    def cost(
        self,
        update: Update,
        batch_size: int,
        precision: str = "no",
        checkpointing: bool = False,
        accumulated: bool = False,
    ) -> Cost | None:
        """Rehearse one micro-batch; None where a network decides by what its tensors contain.

        Args:
            update: what is evaluated.
            batch_size: samples of the micro-batch.
            precision: "no" or "bf16", as `training.config.TrainerConfig` means it.
            checkpointing: trained networks compute activations again in the backward pass.
            accumulated: gradients of earlier micro-batches are there already.

        Raises:
            UsageError: checkpointing of a network that has none.
        """
        self._checkpoint(checkpointing)
        parameters = [parameter for name in update.trains for parameter in self.roles[name].parameters()]
        for module in self.roles.values():
            module.requires_grad_(False)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

        def evaluate(part) -> Iterator[torch.Tensor]:
            return (self._evaluate(name, count * batch_size, update) for name, count in calls(part))

        @torch.no_grad()
        def evaluate_only(part) -> None:
            for _ in evaluate(part):
                pass

        def run():
            with autocast:
                evaluate_only(update.before)
                kept = list(evaluate(update.graph))
                evaluate_only(update.beside)
                loss = sum(value.float().square().mean() for value in kept)
            loss.backward()

        operations = _Operations()
        with self._mode:
            for parameter in parameters:
                parameter.requires_grad_(True)
                parameter.grad = torch.zeros_like(parameter) if accumulated else None
            try:
                with operations:
                    peak = peak_bytes(run, torch.device("meta"))  # which is where fake tensors are
            except RuntimeError:  # fake tensors have no contents to decide by
                return None
            gradients = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
            for parameter in parameters:
                parameter.grad = None
        peak += gradients if accumulated else 0
        return Cost(peak, gradients, operations.flops, operations.operators)

    def _evaluate(self, name: str, count: int, update: Update) -> torch.Tensor:
        module = self.roles[name]
        if not isinstance(module, NetworkDenoiser):
            with torch.no_grad():
                _, features = self.roles["teacher"].predict_with_features(*self._inputs("teacher", count))
            return module(features)
        x, t, condition = self._inputs(name, count)
        return module.predict(x.requires_grad_(name not in update.trains), t, condition)

    def _inputs(self, name: str, count: int) -> tuple[torch.Tensor, torch.Tensor, Condition | None]:
        model = self.roles[name]
        condition = self._condition or model.null_condition(1)
        given = {
            key: torch.empty(count, *value.shape[1:], dtype=value.dtype, device=self.device)
            for key, value in (condition or {}).items()
        }
        x = torch.empty(count, *model.sample_shape, device=self.device)
        return x, torch.empty(count, device=self.device), given or None

    @property
    def checkpointable(self) -> bool:
        """Whether every trained network has gradient checkpointing."""
        return all(getattr(net, "_supports_gradient_checkpointing", False) for net in self._networks())

    def _networks(self) -> list[nn.Module]:
        """Of the trained roles, discriminators excepted."""
        return [self.roles[name].net for name in self.trained if isinstance(self.roles[name], NetworkDenoiser)]

    def _checkpoint(self, enable: bool) -> None:
        if enable and not self.checkpointable:
            raise UsageError("A network of this method has no gradient checkpointing; switch it off.")
        for net in self._networks():
            if enable:
                net.enable_gradient_checkpointing()
            elif getattr(net, "is_gradient_checkpointing", False):
                net.disable_gradient_checkpointing()


class _Operations(TorchDispatchMode):
    """Counts operators and their floating-point operations."""

    def __init__(self):
        super().__init__()
        self.flops = self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operators += func.namespace == "aten"
        if formula := _FORMULAS.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def _hollow(module: nn.Module, memo: dict, device: torch.device | str) -> nn.Module:
    """A deep copy whose tensors, those that ``memo`` does not know yet, are on ``device`` and empty."""
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in memo:
            empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
            memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)
