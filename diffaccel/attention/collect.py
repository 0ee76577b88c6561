"""What attention a network is made of: its signatures, and the modules that have them."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ..core.errors import UsageError
from ..models.networks import eager
from .route import Installation, attention_modules, is_routed, why_left_alone
from .signature import Signature, signature_of

_CALLS = 8  # of a network that are kept: one for each shape of its inputs


@dataclass
class Use:
    """How a network uses one signature.

    Attributes:
        signature: of the calls.
        modules: names of the modules, each as often as it makes such a call in one evaluation.
        kinds: "self", "cross" or "joint" (text and image tokens together).
        rms: root mean square of queries, keys and values as they were.
        tokens_first: whether tokens come before heads in memory, as after a projection.
        device: where they were.
    """

    signature: Signature
    rms: tuple[float, float, float]
    tokens_first: bool
    device: torch.device
    modules: list[str] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)


@dataclass
class Collection:
    """What `collect` found.

    Attributes:
        network: the network, eager.
        calls: arguments it was called with, one (args, kwargs) for each shape.
        uses: of each signature.
        modules: those that can be routed, by name.
        left_alone: names of the others with the reason.
    """

    network: nn.Module
    calls: list[tuple[tuple, dict]]
    uses: dict[Signature, Use]
    modules: dict[str, nn.Module]
    left_alone: list[tuple[str, str]]


def capture_calls(networks: dict[str, nn.Module], run: Callable[[], object]) -> dict[str, list[tuple[tuple, dict]]]:
    """The arguments with which ``run`` calls networks, one call for each shape of their tensors; none where it calls one not.

    Raises:
        UsageError: it calls none of them.
    """
    calls: dict[str, dict] = {name: {} for name in networks}
    with ExitStack() as hooks, torch.no_grad():
        for name, network in networks.items():

            def hook(module, args, kwargs, known=calls[name]):
                shape = tuple(_shapes([*args, *(kwargs[key] for key in sorted(kwargs))]))
                if len(known) < _CALLS:
                    known.setdefault(shape, (args, dict(kwargs)))

            hooks.callback(network.register_forward_pre_hook(hook, with_kwargs=True).remove)
        run()
    if not any(calls.values()):
        kinds = " or ".join(type(eager(network)).__name__ for network in networks.values())
        raise UsageError(f"run must call this {kinds}, such as lambda: pipe('a cat', num_inference_steps=1).")
    return {name: list(known.values()) for name, known in calls.items()}


def collect(network: nn.Module, calls: list[tuple[tuple, dict]]) -> Collection:
    """Run a network once per call and note every attention that can be routed. The network is left as it was.

    Args:
        network: any diffusers denoiser, eager or compiled.
        calls: arguments, from `capture_calls`.

    Raises:
        UsageError: a network without attention modules, or one that is optimised already.
    """
    network = eager(network)
    every = attention_modules(network)
    if not every:
        raise UsageError(f"{type(network).__name__} has no attention modules of diffusers.")
    if any(is_routed(module) for module in every.values()):
        raise UsageError("The attention of this network is optimised already; undo that first: report.undo().")
    reasons = {name: why_left_alone(module) for name, module in every.items()}
    modules = {name: module for name, module in every.items() if reasons[name] is None}
    uses: dict[Signature, Use] = {}
    odd: set[str] = set()
    record = {name: _recorder(name, _kind(module), uses, odd) for name, module in modules.items()}
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(Installation(modules, record))
        for args, kwargs in calls:
            network(*args, **kwargs)
    seen = {name for use in uses.values() for name in use.modules}
    left = [(name, reason) for name, reason in reasons.items() if reason is not None]
    left += [(name, "its calls have a form that is left to PyTorch") for name in sorted(odd - seen)]
    left += [(name, "no routed attention was called in it") for name in modules if name not in seen | odd]
    modules = {name: module for name, module in modules.items() if name in seen}
    return Collection(network, calls, uses, modules, left)


def _recorder(name: str, kind: str, uses: dict, odd: set) -> Callable:
    def attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):  # fmt: skip
        signature = signature_of(query, key, value, attn_mask, is_causal, scale)
        if signature is None or dropout_p or enable_gqa:
            odd.add(name)
        else:
            if signature not in uses:
                rms = tuple(float(tensor.double().square().mean().sqrt()) for tensor in (query, key, value))
                uses[signature] = Use(signature, rms, query.stride(2) >= query.stride(1), query.device)
            uses[signature].modules.append(name)
            uses[signature].kinds.add(kind)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
            **({"enable_gqa": True} if enable_gqa else {}),
        )  # fmt: skip

    return attention


def _kind(module: nn.Module) -> str:
    if getattr(module, "add_k_proj", None) is not None:
        return "joint"
    return "cross" if getattr(module, "is_cross_attention", False) else "self"


def _shapes(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield tuple(value.shape)
        elif isinstance(value, dict):
            yield from _shapes(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _shapes(value)
