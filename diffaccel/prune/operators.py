"""What can be removed from a diffusers network, found by the classes of its modules."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..core.errors import unknown
from ..models.residual import BLOCKS, CONTAINERS, RESNETS, keeps_shape, unknown_layers
from .replacements import Replacement

_SELF, _CROSS, _JOINT, _FEED = "self-attention", "cross-attention", "joint-attention", "feed-forward"
# Children of transformer blocks whose result is added to what goes on.
_BRANCHES = {
    "BasicTransformerBlock": {"attn1": _SELF, "attn2": _CROSS, "ff": _FEED},
    "CogVideoXBlock": {"attn1": _JOINT, "ff": _FEED},
    "FluxTransformerBlock": {"attn": _JOINT, "ff": _FEED, "ff_context": _FEED},
    "JointTransformerBlock": {"attn": _JOINT, "attn2": _SELF, "ff": _FEED, "ff_context": _FEED},
    "LTXVideoTransformerBlock": {"attn1": _SELF, "attn2": _CROSS, "ff": _FEED},
    "WanTransformerBlock": {"attn1": _SELF, "attn2": _CROSS, "ffn": _FEED},
}
KINDS = {
    "resnet": "residual block of a U-Net",
    "attention": "attention of a U-Net without text",
    "transformer": "transformer inside a U-Net, with its projections",
    "block": "transformer block",
    _SELF: "self-attention of a transformer block",
    _CROSS: "cross-attention of a transformer block",
    _JOINT: "attention of image and text together",
    _FEED: "feed-forward of a transformer block",
    "convolution": "convolution of a residual block with as many outputs as inputs",
}
"""Kinds of operators in words."""


@dataclass(frozen=True)
class Operator:
    """A module that can be replaced by something cheaper.

    Attributes:
        name: as in ``network.named_modules()``.
        kind: one of `KINDS`.
        replacement: what takes its place: "identity", "shortcut" (its own, which is kept, as is its resampling) or "zero"
            (of a branch).
        kept: names, inside the module, of what stays.
    """

    name: str
    kind: str
    replacement: str
    kept: tuple[str, ...] = ()


def operators(network: nn.Module, single: bool = False) -> dict[str, Operator]:
    """Everything that can be removed, by name, outer before inner.

    The first and last layers, embeddings, and up- and downsampling never are.

    Args:
        network: a UNet2DModel, UNet2DConditionModel or another U-Net of theirs, or a transformer (DiT, PixArt, SD3, Flux,
            CogVideoX, LTX, Wan); any device, meta too.
        single: single convolutions of residual blocks too, as LD-Pruner has them.

    Raises:
        UsageError: there is nothing that is known; says what there is.
    """
    modules = dict(network.named_modules())
    found = {}
    for name, module in modules.items():
        if name and not isinstance(module, Replacement):
            parent, _, leaf = name.rpartition(".")
            kind, replacement = _what(module, modules[parent], leaf, single)
            if kind:
                found[name] = Operator(name, kind, replacement, _kept(network, name, module, replacement))
    if not found and not any(isinstance(module, Replacement) for module in modules.values()):
        raise unknown_layers("removable", network)
    return found


def check_names(network: nn.Module, names: Iterable[str], table: Mapping[str, Operator]) -> None:
    """Refuse names that are no operators of a network.

    Raises:
        UsageError: with the nearest name and all.
    """
    for name in names:
        if name not in table:
            raise unknown(f"removable layer of {type(network).__name__}", name, operators(network))


def _what(module: nn.Module, parent: nn.Module, leaf: str, single: bool) -> tuple[str | None, str]:
    cls, outer = type(module).__name__, type(parent).__name__
    branch = _BRANCHES.get(outer, {}).get(leaf)
    if branch:
        crosses = getattr(module, "is_cross_attention", True)  # a second attention may be to itself
        return (_SELF if branch == _CROSS and not crosses else branch), "zero"
    if cls in RESNETS:
        return "resnet", "identity" if keeps_shape(module) and module.conv_shortcut is None else "shortcut"
    if keeps_shape(module):
        return "attention", "identity"
    if cls in CONTAINERS or cls in BLOCKS:
        return ("transformer" if cls in CONTAINERS else "block"), "identity"
    if single and outer in RESNETS and isinstance(module, nn.Conv2d) and leaf in ("conv1", "conv2"):
        same = module.in_channels == module.out_channels
        return ("convolution" if same else None), "identity"
    return None, ""


def _kept(network: nn.Module, name: str, module: nn.Module, replacement: str) -> tuple[str, ...]:
    if replacement == "shortcut":
        parts = ("conv_shortcut", "upsample", "downsample")
        return tuple(part for part in parts if isinstance(getattr(module, part, None), nn.Module))
    if type(network).__name__.endswith("DiTTransformer2DModel") and name == "transformer_blocks.0":
        return ("norm1.emb",)  # DiT's last layer asks its first block for the embedding of time and class
    return ()
