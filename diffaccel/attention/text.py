"""`reuse_text`: keys and values of the text, computed in the first step of a run and reused in the others.

The text does not change over steps, and neither do its projections in cross-attention: half of the projections of every
cross-attention layer are computed for nothing. What is reused are the tensors that the first step computed, so results do
not change in a single bit. Whether the text is the same is told by where and what it is in memory and by PyTorch's count of
changes in place, never by its values, so a look-up costs nothing on the device.
"""

import threading
import weakref
from collections.abc import Callable

import torch
from torch import nn

from ..core.errors import UsageError
from ..core.standins import Overlay
from ..models.networks import eager, networks_of
from .route import attention_modules, why_left_alone

_KEPT = 2  # texts per layer: the branches of guidance, where they are two calls
# Modules through which the text passes before cross-attention; reused too, or keys and values would see a new text each step.
_BEFORE = ("caption_projection", "caption_norm", "condition_embedder.text_embedder", "encoder_hid_proj")


class Reuse:
    """The latest results of one module, by the tensor it was given."""

    def __init__(self):
        self.hits = self.misses = 0
        self._entries: tuple = ()
        self._lock = threading.Lock()

    def call(self, module: nn.Module, text: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """``compute()``, or what it returned for this very text and these very weights.

        Entries hold the text and refer to the weights, so nothing else can come to lie where they do.
        """
        weights = _weights(module)
        if weights is None or type(text) is not torch.Tensor or text.is_inference():
            return compute()
        key = (_place(text), [(weight.data_ptr(), weight._version) for weight in weights], _precision(text))
        for known, refs, _, result, version in self._entries:
            same = known == key and all(ref() is weight for ref, weight in zip(refs, weights, strict=True))
            if same and result._version == version:  # nobody wrote into it
                self.hits += 1
                return result
        result = compute()
        if isinstance(result, torch.Tensor) and not result.is_inference():
            self.misses += 1
            entry = (key, [weakref.ref(weight) for weight in weights], text, result, result._version)
            with self._lock:
                self._entries = (entry, *(old for old in self._entries if old[0] != key))[:_KEPT]
        return result

    def clear(self) -> None:
        """Forget all results."""
        self._entries = ()

    @property
    def bytes(self) -> int:
        """Of the results that are kept."""
        return sum(result.numel() * result.element_size() for *_, result, _ in self._entries)


class TextReuse:
    """What `reuse_text` returns.

    Attributes:
        modules: names of the modules whose results are reused.
    """

    def __init__(self, modules: dict[str, nn.Module]):
        self.modules = tuple(modules)
        self._reuses = {name: Reuse() for name in modules}
        self._overlay = Overlay(
            {
                module: {"__call__": self._calling(module, name), "_reuses_text": True}
                for name, module in modules.items()
            }
        )
        self.redo()

    def _calling(self, module: nn.Module, name: str) -> Callable:
        parent, reuse = type(module).__call__, self._reuses[name]

        def __call__(module, *args, **kwargs):
            afresh = torch.compiler.is_compiling() or torch.is_grad_enabled() or not self._overlay.active
            if afresh or len(args) != 1 or kwargs:
                return parent(module, *args, **kwargs)
            return reuse.call(module, args[0], lambda: parent(module, *args))

        return __call__

    @property
    def hits(self) -> int:
        """Evaluations of modules that were spared so far."""
        return sum(reuse.hits for reuse in self._reuses.values())

    @property
    def misses(self) -> int:
        """Evaluations of modules that were needed so far."""
        return sum(reuse.misses for reuse in self._reuses.values())

    @property
    def bytes(self) -> int:
        """Memory of the results that are kept."""
        return sum(reuse.bytes for reuse in self._reuses.values())

    def clear(self) -> None:
        """Forget all results, to free their memory."""
        for reuse in self._reuses.values():
            reuse.clear()

    def undo(self) -> None:
        """Give every module its class back; without effect the second time."""
        self._overlay.off()
        self.clear()

    def redo(self) -> None:
        """Reuse again after `undo`; without effect where that is so already."""
        self._overlay.on()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.undo()


def reuse_text(pipe_or_network) -> TextReuse:
    """Compute the keys and values of an unchanged text once per run instead of once per step, until ``undo``.

        with diffaccel.reuse_text(pipe):
            images = pipe("a red apple").images

    For networks with cross-attention: U-Nets, PixArt, Wan and the like. Not where text and image attend together (SD3, Flux),
    whose text changes from layer to layer. Results are bit-equal. Whatever could make a difference computes afresh: another
    text or one changed in place, other weights, gradients, another autocast, hooks on the projections, weights that are
    offloaded layer by layer, adapters, tensors of inference mode, compiled graphs. What writes into a text or weights past
    PyTorch's count of changes is not seen (``.data``, NumPy views, a LoRA that is fused between two runs with the same
    embeddings): call ``clear()`` then.

    Raises:
        UsageError: neither pipeline nor network, one without text projections that can be reused, or one that has this already.
    """
    found: dict[str, nn.Module] = {}
    for name, network in networks_of(pipe_or_network).items():
        found |= {f"{name}.{key}": module for key, module in _projections(eager(network)).items()}
    if any(hasattr(type(module), "_reuses_text") for module in found.values()):
        raise UsageError("The text of this network is reused already; undo that first.")
    if not found:
        raise UsageError("This network has no cross-attention whose keys and values depend on the text alone.")
    return TextReuse(found)


def _projections(network: nn.Module) -> dict[str, nn.Module]:
    found = {}
    for name, module in attention_modules(network).items():
        alone = why_left_alone(module) is None and getattr(module, "is_cross_attention", False)
        if alone and getattr(module, "add_k_proj", None) is None and getattr(module, "norm_cross", None) is None:
            for part in ("to_k", "to_v"):
                if type(projection := getattr(module, part, None)) is nn.Linear or hasattr(projection, "_reuses_text"):
                    found[f"{name}.{part}"] = projection
    if found:
        modules = dict(network.named_modules())
        found |= {name: modules[name] for name in _BEFORE if name in modules}
    return found


def _weights(module: nn.Module) -> list[torch.Tensor] | None:
    """What results depend on beside the text; None where that is more than weights on their device."""
    parts = tuple(module.modules()) if module._modules else (module,)
    for part in parts:
        if part._forward_hooks or part._forward_pre_hooks or "_hf_hook" in part.__dict__:
            return None
        if not type(part).__module__.startswith(("torch.nn.", "diffusers.")):  # an adapter's, with scales and switches
            return None
        if part.training and isinstance(part, nn.Dropout) and part.p:
            return None
    weights = [weight for part in parts for weight in part._parameters.values() if weight is not None]
    if any(type(weight) is not nn.Parameter or weight.is_meta or weight.is_inference() for weight in weights):
        return None  # quantised, offloaded, or without a count of changes
    return weights


def _place(tensor: torch.Tensor) -> tuple:
    """Where and what a tensor is, and how often it was changed: equal for views of the same numbers."""
    return (
        tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
    )  # fmt: skip


def _precision(text: torch.Tensor) -> torch.dtype | None:
    kind = text.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
