"""Where pipelines keep the networks that predict."""

import torch
from torch import nn

from ..core.errors import UsageError

NETWORKS = ("unet", "transformer", "transformer_2", "prior", "decoder")
"""Components of pipelines that predict."""


def networks_of(target) -> dict[str, nn.Module]:
    """The predicting networks of a pipeline by the names of its components, or a network by itself under "network".

    Networks come as the pipeline holds them, compiled ones in their compiled form; see `eager`.

    Raises:
        UsageError: neither a network nor a pipeline that has one.
    """
    if isinstance(target, nn.Module):
        return {"network": target}
    found = {name: module for name in NETWORKS if isinstance(module := getattr(target, name, None), nn.Module)}
    if not found:
        raise UsageError(
            f"Expected a diffusers pipeline or its network, such as pipe.unet or pipe.transformer; got {target!r:.80}."
        )
    return found


def network_of(pipe) -> nn.Module:
    """The one network of a pipeline that predicts, eager.

    Raises:
        UsageError: no such network, or several.
    """
    found = [module for name in NETWORKS if isinstance(module := getattr(pipe, name, None), nn.Module)]
    if len(found) != 1:
        raise UsageError(f"This works on pipelines with one network; {type(pipe).__name__} has {len(found)}.")
    return eager(found[0])


def eager(network: nn.Module) -> nn.Module:
    """The network inside its compiled form, or itself."""
    return getattr(network, "_orig_mod", network)


def device_of(network: nn.Module) -> torch.device:
    """Where a network computes, which for an offloaded one is not where its weights are."""
    network = eager(network)
    device = getattr(getattr(network, "_hf_hook", None), "execution_device", None)
    device = next(network.parameters(), torch.empty(0)).device if device is None else torch.device(device)
    if device.type == "meta":  # offloaded layer by layer
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device
