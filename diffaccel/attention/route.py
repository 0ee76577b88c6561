"""Processors of diffusers whose own code calls another attention: how backends are installed.

A routed processor stands in for a stock one: same attributes, same class to whoever asks, and the very code of its class,
except that in this code the names `scaled_dot_product_attention` and `dispatch_attention_fn` mean ours. So every stock
processor (UNet, SD3, PixArt, Flux, …) is routed by one mechanism, and norms, residuals, rotary embeddings and masks stay
exactly what diffusers computes. Compared with the alternatives: nothing global is patched, not even for the time of a call,
so threads cannot meet; nothing is added to a call but a look-up; `torch.compile` traces it as one graph, which a
TorchFunctionMode does not survive (Dynamo breaks at Tensor.unflatten); and no processor is copied.
"""

import types
from collections.abc import Callable

import torch.nn.functional as F
from torch import nn

from ..core.standins import stand_in

# Parts of names of processors that others install, with trained weights or a guidance of their own.
_FOREIGN = ("IPAdapter", "PAG", "LoRA", "CustomDiffusion")
_CALLS = {"scaled_dot_product_attention", "dispatch_attention_fn"}


def attention_modules(network: nn.Module) -> dict[str, nn.Module]:
    """Modules of a network that attend through a processor, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if hasattr(module, "processor") and callable(getattr(module, "set_processor", None))
    }


def is_routed(module: nn.Module) -> bool:
    """Whether a module's processor is one of ours."""
    return hasattr(type(module.processor), "_routed_from")


def why_left_alone(module: nn.Module) -> str | None:
    """The reason for which a module keeps the processor it has, or None where it can be routed."""
    processor = module.processor
    cls = type(processor)
    if any(part in cls.__name__ for part in _FOREIGN):
        return f"{cls.__name__} belongs to an adapter"
    if not cls.__module__.startswith("diffusers.") or isinstance(processor, nn.Module):
        return f"{cls.__name__} is not a stock processor"
    if getattr(processor, "_attention_backend", None) is not None:
        return f"its backend {_value(processor._attention_backend)!r} was set by set_attention_backend"
    if getattr(processor, "_parallel_config", None) is not None:
        return "it runs context-parallel"
    code = getattr(cls.__call__, "__code__", None)
    if code is None or not _CALLS & _names(code):
        return f"{cls.__name__} computes attention itself"
    return None


def routed(processor, attention: Callable):
    """A processor like a stock one, whose attention is another.

    Args:
        processor: of a module that `why_left_alone` says nothing about.
        attention: with the arguments of `torch.nn.functional.scaled_dot_product_attention`, on the same layout.

    Returns:
        An object that shares the attributes of ``processor``; copies and saved files of it are of the stock class.
    """
    cls = type(processor)
    call = cls.__call__
    scope = {name: value for name, value in call.__globals__.items() if name != "__name__"}  # else Dynamo looks there
    functional = types.SimpleNamespace(**{name: getattr(F, name) for name in _names(call.__code__) if hasattr(F, name)})
    functional.scaled_dot_product_attention = attention
    scope["F"] = functional
    if "dispatch_attention_fn" in scope:
        scope["dispatch_attention_fn"] = _dispatch(attention, scope["dispatch_attention_fn"])
    ours = types.FunctionType(call.__code__, scope, call.__name__, call.__defaults__, call.__closure__)
    ours.__kwdefaults__ = call.__kwdefaults__
    # diffusers looks at a processor's __class__ before it resets or replaces it; that is to be the stock one.
    return stand_in(processor, __call__=ours, __class__=property(lambda _: cls), _routed_from=processor)


class Installation:
    """Routed processors on modules of a network, to put on and take off any number of times.

    Args:
        modules: by name; from `attention_modules`, none of them for `why_left_alone` to object to.
        attention: a function for each name, see `routed`.
    """

    def __init__(self, modules: dict[str, nn.Module], attention: dict[str, Callable]):
        self._pairs = [
            (module, module.processor, routed(module.processor, attention[name])) for name, module in modules.items()
        ]

    def install(self) -> None:
        """Route every module that still has the processor it had when this was made."""
        for module, stock, ours in self._pairs:
            if module.processor is stock:
                module.processor = ours

    def remove(self) -> None:
        """Give back the very objects; a processor that was set by others since then stays."""
        for module, stock, ours in self._pairs:
            if module.processor is ours:
                module.processor = stock

    def __enter__(self):
        self.install()
        return self

    def __exit__(self, *_):
        self.remove()


def _dispatch(attention: Callable, stock: Callable) -> Callable:
    """diffusers' dispatcher, on (batch, tokens, heads, dim): ours where it would run PyTorch's choice."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    native = AttentionBackendName.NATIVE

    def dispatch_attention_fn(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
        attention_kwargs=None, *, backend=None, parallel_config=None,
    ):  # fmt: skip
        chosen = backend if backend is not None else _AttentionBackendRegistry._active_backend
        if chosen != native or attention_kwargs or parallel_config is not None:  # somebody asked for something else
            return stock(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs,
                backend=backend, parallel_config=parallel_config,
            )  # fmt: skip
        if attn_mask is not None and attn_mask.dim() == 2 and attn_mask.shape == (query.shape[0], key.shape[1]):
            attn_mask = attn_mask[:, None, None, :]
        tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out = attention(
            *tensors, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return out.transpose(1, 2)

    return dispatch_attention_fn


def _names(code: types.CodeType) -> set[str]:
    """Names that a function uses, those in its comprehensions and inner functions too."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*inner)


def _value(backend) -> str:
    return getattr(backend, "value", backend)
