"""Single-base mode: a frozen teacher, and students and critics that are low-rank adapters of its one network.

LoRA (Hu et al. 2021, arXiv 2106.09685): a layer W becomes W + (alpha / rank)·B·A, of which A and B are trained. With its
weights in the network once, three networks cost little more memory than one (LCM-LoRA, Luo et al. 2023, arXiv 2311.05556,
trains such students).

    shared = SharedBase(teacher, AdapterConfig(rank=64))
    student, critic = shared.adapter("student"), shared.adapter("critic")

Adapters own their weights and are put into the network for the time of a forward, so at rest the network is the teacher.
"""

import copy
import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..core.errors import UsageError, unknown
from ..core.rng import KeyedRandom
from ..models.denoiser import NetworkDenoiser
from ..models.quiet import quiet_diffusers

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TARGETS = (
    *ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
"""Layers that LCM-LoRA adapts in U-Nets, and attention and feed-forward layers of transformers."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SLOT = "lora"  # the name under which every adapter is in the network, one at a time


@dataclass
class AdapterConfig:
    """Attributes:
    rank: of the trained matrices; what an adapter can learn and its memory grow with it.
    alpha: an adapter counts alpha / rank times; None stands for the rank.
    targets: names, or ends of names, of linear and convolutional layers; () adapts those of `TARGETS` that the network has.
    base_dtype: precision of the frozen network, "float32" or "bfloat16"; adapters are float32.
    """

    rank: int = 64
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    base_dtype: str = "float32"

    def __post_init__(self):
        if self.rank < 1:
            raise UsageError(f"adapters.rank must be at least 1, got {self.rank}.")
        if self.alpha is not None and not self.alpha > 0:
            raise UsageError(f"adapters.alpha must be positive, got {self.alpha}.")
        if self.base_dtype not in _DTYPES:
            raise unknown("adapters.base_dtype", self.base_dtype, _DTYPES)
        self.targets = tuple(self.targets)


class SharedBase:
    """A teacher whose frozen network also carries adapters, one at a time.

    The network is changed in place: adapted layers are wrapped by peft (weights of a layer ``x`` are then called
    ``x.base_layer``), it is in evaluation mode, frozen and in ``base_dtype``. `AdapterDenoiser.merged` makes plain networks.

    Args:
        denoiser: the teacher.
        config: settings of all adapters.
        seed: of their initial weights.

    Attributes:
        teacher: the same denoiser; no adapter takes part in its calls.
        own_dtype: precision that its network had.

    Raises:
        UsageError: peft is not installed, a network that has adapters already, or a target that it does not have.
    """

    def __init__(self, denoiser: NetworkDenoiser, config: AdapterConfig | None = None, seed: int = 0):
        require_peft()
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        self.teacher, self.config, self.seed = denoiser, config or AdapterConfig(), seed
        net, rank = denoiser.net, self.config.rank
        if any(isinstance(module, LoraLayer) for module in net.modules()):
            raise UsageError(
                "The teacher's network has adapters already: fuse them (pipe.fuse_lora(); pipe.unload_lora_weights()) "
                "or unload them, and share it then."
            )
        lora = LoraConfig(
            r=rank,
            lora_alpha=self.config.alpha or rank,
            target_modules=list(find_targets(net, self.config.targets)),
            init_lora_weights=False,
        )
        inject_adapter_in_model(lora, net, _SLOT, low_cpu_mem_usage=True)
        self.own_dtype = net.dtype
        with quiet_diffusers():
            net.to(_DTYPES[self.config.base_dtype]).eval().requires_grad_(False)
        self.layers = {name: module for name, module in net.named_modules() if isinstance(module, LoraLayer)}
        # What peft made, without memory, is the pattern of all adapters; between calls the layers hold none.
        self._patterns = {name: _Pair(layer.lora_A[_SLOT], layer.lora_B[_SLOT]) for name, layer in self.layers.items()}
        self._active: list[_Pair] | None = list(self._patterns.values())
        self._select(None)
        self._frozen = dict(net.named_parameters())
        net.enable_gradient_checkpointing = self.checkpoint_activations  # whoever asks for it gets this one

    @property
    def scale(self) -> float:
        """What B·A is multiplied by."""
        return (self.config.alpha or self.config.rank) / self.config.rank

    def adapter(self, name: str) -> "AdapterDenoiser":
        """A new adapter that computes what the teacher does, bit for bit, until it is trained.

        Args:
            name: with the seed, the key of its initial A, which is uniform in ±1/√(inputs); B is 0.
        """
        random, device = KeyedRandom(self.seed), next(self.teacher.net.parameters()).device
        pairs = {layer: pattern.on(device) for layer, pattern in self._patterns.items()}
        for layer, pair in pairs.items() if device.type != "meta" else ():
            weight = pair.lora_A.weight
            draws = random.uniform(f"adapter/{name}/{layer}", 0, 0, len(weight), tuple(weight.shape[1:]))
            with torch.no_grad():
                weight.copy_((2 * draws - 1) / math.sqrt(weight[0].numel()))
                pair.lora_B.weight.zero_()
        return AdapterDenoiser(self, _tree(pairs))

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass instead of keeping them, with the adapter of the forward pass.

        The network's own ``enable_gradient_checkpointing()`` does this.

        Raises:
            UsageError: a network without gradient checkpointing.
        """
        net = self.teacher.net
        if not getattr(net, "_supports_gradient_checkpointing", False):
            raise UsageError(f"{type(net).__name__} has no gradient checkpointing; switch it off.")
        type(net).enable_gradient_checkpointing(net, self._checkpoint)

    @contextmanager
    def selected(self, pairs: "list[_Pair] | None") -> Iterator[None]:
        """Put an adapter, or None, into the network inside the block; then whatever was there before."""
        previous = self._active
        self._select(pairs)
        try:
            yield
        finally:
            self._select(previous)

    def check_frozen(self) -> None:
        """Refuse to compute gradients of the shared weights.

        Raises:
            UsageError: some of them are trainable.
        """
        for name, parameter in self._frozen.items():
            if parameter.requires_grad:
                raise UsageError(
                    f"{name} of the shared network is trainable, though only adapters are to be trained: call "
                    "requires_grad_(False) of the teacher."
                )

    def _select(self, pairs: "list[_Pair] | None") -> None:
        # Past peft's set_adapter and enable_adapters, which also switch requires_grad; a layer without adapter is its base.
        for index, layer in enumerate(self.layers.values()):
            for name in ("lora_A", "lora_B"):
                slot = layer._modules[name]._modules
                if pairs is None:
                    slot.pop(_SLOT, None)
                else:
                    slot[_SLOT] = pairs[index]._modules[name]
        self._active = pairs

    def _checkpoint(self, module, *args, **kwargs):
        pairs = self._active  # by the time of the recomputation another adapter, or none, is in the network

        def run(*args, **kwargs):
            with self.selected(pairs):
                return module(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, **kwargs)


class AdapterDenoiser(NetworkDenoiser):
    """An adapter of a shared network as a denoiser with weights of its own.

    Parameters and state are those of the adapter alone; a deep copy is one more adapter of the same network. Whatever else
    the teacher has (``num_classes``, ``net``, …) is read from it; ``net`` is the network without the adapter.

    Args:
        base: the network.
        weights: lora_A and lora_B of every adapted layer, under the layer's name.
    """

    def __init__(self, base: SharedBase, weights: nn.Module):
        nn.Module.__init__(self)  # not that of NetworkDenoiser, which would make the shared network a part of this
        self.base, self.weights = base, weights
        self.schedule, self.sample_shape = base.teacher.schedule, base.teacher.sample_shape
        self.prediction_type = base.teacher.prediction_type
        self._pairs = {name: weights.get_submodule(name) for name in base.layers}

    def forward(self, x_t, t, condition=None):
        with self._selected():
            return self.base.teacher(x_t, t, condition)

    def predict(self, x_t, t, condition):
        with self._selected():
            return self.base.teacher.predict(x_t, t, condition)

    def forward_with_features(self, x_t, t, condition=None):
        with self._selected():
            return self.base.teacher.forward_with_features(x_t, t, condition)

    def predict_with_features(self, x_t, t, condition=None):
        with self._selected():
            return self.base.teacher.predict_with_features(x_t, t, condition)

    def denoising_error(self, x0, t, eps, condition=None):
        with self._selected():
            return self.base.teacher.denoising_error(x0, t, eps, condition)

    def feature_modules(self):
        return self.base.teacher.feature_modules()

    def null_condition(self, count):
        return self.base.teacher.null_condition(count)

    def lora_state(self) -> dict[str, torch.Tensor]:
        """Weights as diffusers loads them, without prefix: ``layer.lora_A.weight`` (rank, …), ``layer.lora_B.weight``.

        alpha / rank is multiplied into B, so that no further numbers need to go with them. Float32 on the CPU.
        """
        state = {}
        for name, pair in self._pairs.items():
            state[f"{name}.lora_A.weight"] = pair.lora_A.weight.detach().cpu().clone()
            state[f"{name}.lora_B.weight"] = (pair.lora_B.weight.detach() * self.base.scale).cpu()
        return state

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A copy of the network, without any trace of adapters, whose weights are W + (alpha / rank)·B·A.

        It has the precision that the network had before it was shared; W is as exact as ``base_dtype`` left it.
        """
        with quiet_diffusers():
            net = copy.deepcopy(self.base.teacher.net).to(self.base.own_dtype)
        if getattr(net, "is_gradient_checkpointing", False):
            net.disable_gradient_checkpointing()
        for name, pair in self._pairs.items():
            layer = net.get_submodule(name)
            layer.lora_A[_SLOT], layer.lora_B[_SLOT] = pair.lora_A, pair.lora_B
            layer.merge(adapter_names=[_SLOT])
            net.set_submodule(name, layer.get_base_layer())
        del net.peft_config, net.enable_gradient_checkpointing
        return net

    @contextmanager
    def _selected(self):
        if torch.is_grad_enabled():
            self.base.check_frozen()
        with self.base.selected(list(self._pairs.values())):
            yield

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "weights"):  # not set yet
                raise
            return getattr(self.base.teacher, name)

    def __deepcopy__(self, memo):
        base = memo.get(id(self.base), self.base)
        return AdapterDenoiser(base, copy.deepcopy(self.weights, memo)).train(self.training)


class _Pair(nn.Module):
    """A and B of one layer."""

    def __init__(self, lora_A: nn.Module, lora_B: nn.Module):
        super().__init__()
        self.lora_A, self.lora_B = lora_A, lora_B

    def on(self, device: torch.device) -> "_Pair":
        """A trainable float32 copy, its numbers not set yet."""
        return copy.deepcopy(self).to_empty(device=device).float().requires_grad_(True)


def require_peft() -> None:
    """Raises:
    UsageError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise UsageError("Adapters need peft, which is not installed: pip install 'diffaccel[lora]'.")


def find_targets(net: nn.Module, targets: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """The layers that targets name, by target.

    Args:
        net: a diffusers network.
        targets: names or ends of names; () stands for those of `TARGETS` that there are.

    Raises:
        UsageError: a target that names no linear or convolutional layer, or a network that has none of `TARGETS`.
    """
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    found = {t: [name for name in layers if f".{name}".endswith(f".{t}")] for t in targets or TARGETS}
    if targets:
        for target, names in found.items():
            if not names:
                raise unknown("adapter target", target, {name.rpartition(".")[2] for name in layers} | set(TARGETS))
    found = {target: names for target, names in found.items() if names}
    if not found:
        raise UsageError(
            f"{type(net).__name__} has none of the layers that adapters are for; name some with adapters.targets, such as "
            f"{', '.join(layers[:3])}."
        )
    return found


def _tree(leaves: dict[str, nn.Module]) -> nn.Module:
    """A module in which each leaf has its dotted name."""
    root = nn.Module()
    for name, leaf in leaves.items():
        node, (*path, last) = root, name.split(".")
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node._modules[part]
        node.add_module(last, leaf)
    return root
