"""Residual bodies of diffusers networks: where they are, and what they return without their branches."""

from collections.abc import Callable, Mapping

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from ..core.errors import UsageError
from .pixel import num_classes, sample_shape

_JOINT = ("encoder_hidden_states", "hidden_states")
# What transformer blocks return; without their branches these are their arguments of the same names.
BLOCKS = {
    **dict.fromkeys(("BasicTransformerBlock", "LTXVideoTransformerBlock", "WanTransformerBlock"), "hidden_states"),
    **dict.fromkeys(("FluxSingleTransformerBlock", "FluxTransformerBlock", "JointTransformerBlock"), _JOINT),
    "CogVideoXBlock": _JOINT[::-1],
}
# Transformers inside U-Nets, whose result is added to what they are given: bypassed as a whole where that is one block.
CONTAINERS = ("AnimateDiffTransformer3D", "Transformer2DModel", "TransformerSpatioTemporalModel")
RESNETS = ("ResnetBlock2D", "TemporalResnetBlock")


def bodies(network: nn.Module) -> list[str]:
    """Names of the residual bodies that may be bypassed, as in ``network.named_modules()``; none lies inside another.

    Residual blocks and attention of U-Nets that do not resample, their transformers (block by block where there are
    several), and the blocks of DiT, PixArt, SD3, Flux, CogVideoX, LTX and Wan.

    Raises:
        UsageError: a network without any that is known.
    """
    found: list[str] = []
    for name, module in network.named_modules():
        if name and not any(name.startswith(outer + ".") for outer in found) and _is_body(module):
            found.append(name)
    if not found:
        raise unknown_layers("skippable", network)
    return found


def unknown_layers(wanted: str, network: nn.Module) -> UsageError:
    """The error for a network without layers of a kind, which tells what it has."""
    kinds = sorted({type(module).__name__ for module in network.modules() if list(module.children())})
    return UsageError(f"No layer known to be {wanted} in {type(network).__name__}; it has {', '.join(kinds)}.")


def keeps_shape(module: nn.Module) -> bool:
    """Whether a residual block or attention adds its branch to what it is given without resampling it."""
    kind = type(module).__name__
    if kind in RESNETS:
        return not (getattr(module, "up", False) or getattr(module, "down", False))
    return kind == "Attention" and module.residual_connection


def without_branches(kind: str, module: nn.Module, arguments: Mapping):
    """What a residual body returns without its branches.

    Args:
        kind: name of its class.
        module: the body, or anything with its resampling, shortcut and scale.
        arguments: of its call, by name, defaults included.
    """
    if kind in RESNETS:
        x = arguments["input_tensor"]
        resample = getattr(module, "upsample", None) or getattr(module, "downsample", None)
        x = x if resample is None else resample(x)
        x = x if module.conv_shortcut is None else module.conv_shortcut(x)
        return x / getattr(module, "output_scale_factor", 1.0)
    if kind == "Attention":
        return arguments["hidden_states"] / module.rescale_output_factor
    names = BLOCKS.get(kind, "hidden_states")
    if isinstance(names, str):
        return packed(arguments[names], arguments)
    return tuple(arguments[name] for name in names)


def packed(result: torch.Tensor, arguments: Mapping):
    """A result in the form that the call of a module wants it."""
    if "return_dict" not in arguments:
        return result
    return Transformer2DModelOutput(sample=result) if arguments["return_dict"] else (result,)


def zeros_through(network: nn.Module) -> Callable[[], object]:
    """A function that calls a pixel network once, with zeros in the size of its samples.

    Raises:
        UsageError: a network of another kind, whose inputs are not known.
    """
    if not isinstance(network, (UNet2DModel, DiTTransformer2DModel)):
        raise UsageError(f"Pass run=, which calls this {type(network).__name__} with inputs as it will have them.")
    x = torch.zeros(1, *sample_shape(network)).to(next(network.parameters()))
    labels = {"class_labels": torch.zeros(1, dtype=torch.long, device=x.device)} if num_classes(network) else {}
    return lambda: network(x, torch.zeros(1, device=x.device), **labels)


def _is_body(module: nn.Module) -> bool:
    kind = type(module).__name__
    return keeps_shape(module) or kind in BLOCKS or (kind in CONTAINERS and len(module.transformer_blocks) == 1)
