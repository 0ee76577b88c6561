"""The chosen backends on a network, and whether the network as a whole is faster with them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from .collect import Collection
from .route import Installation
from .signature import Signature, signature_of
from .timing import alternate, medians

DISAGREEMENT = 0.05
"""Largest difference between a network's outputs with and without exact backends, relative to the largest value."""


@dataclass(frozen=True)
class Confirmation:
    """The network's evaluations with PyTorch's choice and with ours, timed in turn.

    Attributes:
        default, chosen: median seconds of the network's calls.
        difference: of the outputs, relative to the largest value.
        problem: why the choice was not kept, or None.
    """

    default: float
    chosen: float
    difference: float
    problem: str | None


def attention_by(table: dict[Signature, Callable]) -> Callable:
    """Attention by the kernel that a table has for the signature, and by PyTorch's choice for all other calls.

    Calls with dropout, grouped heads or gradients are PyTorch's: backends are tried for inference.
    """

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if dropout_p or enable_gqa:
            options = {"enable_gqa": True} if enable_gqa else {}
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options
            )
        wanted = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        kernel = None if wanted else table.get(signature_of(query, key, value, attn_mask, is_causal, scale))
        if kernel is None:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale)
        return kernel(query, key, value, attn_mask, is_causal, scale)

    return attention


def installation_of(collection: Collection, table: dict[Signature, Callable]) -> Installation:
    """Routes for the modules of a network that have a signature of the table."""
    names = {name for signature in table for name in collection.uses[signature].modules}
    modules = {name: module for name, module in collection.modules.items() if name in names}
    return Installation(modules, dict.fromkeys(modules, attention_by(table)))


def confirm(
    collection: Collection,
    installation: Installation,
    exact: bool,
    faster: bool = True,
    rounds: int = 10,
    seconds: float = 10.0,
) -> Confirmation:
    """Time the network's calls with and without an installation, and compare what they return.

    Args:
        collection: the network and its calls.
        installation: not installed; it is not when this returns or raises.
        exact: whether outputs must agree.
        faster: whether the network must be faster, as it need not be where the choice was made for its memory.
        rounds, seconds: see `alternate`.
    """
    device = next(iter(collection.uses.values())).device

    def evaluate():
        with torch.no_grad():
            return [collection.network(*args, **kwargs) for args, kwargs in collection.calls]

    def chosen():
        with installation:
            return evaluate()

    difference = _difference(chosen(), evaluate())
    if not difference <= (DISAGREEMENT if exact else 1.0):
        return Confirmation(0.0, 0.0, difference, f"outputs differ by {difference:.2g}")
    taken = medians(alternate({"default": evaluate, "chosen": chosen}, device, rounds, seconds))
    slower = faster and taken["chosen"] > taken["default"]
    problem = "the network is not faster with them" if slower else None
    return Confirmation(taken["default"], taken["chosen"], difference, problem)


def _difference(left, right) -> float:
    """Largest difference of all tensors, relative to the largest value; NaN where values are not finite."""
    pairs = zip(tree_leaves(left), tree_leaves(right), strict=True)
    pairs = [(a.double(), b.double()) for a, b in pairs if isinstance(a, torch.Tensor)]
    found = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs]
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)
