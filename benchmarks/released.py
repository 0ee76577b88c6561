"""Denoisers of the sizes of released models, with random weights, for measurements of time and memory."""

import torch

from diffaccel.models.released import released_network
from diffaccel.prune.classes import pruned_class

RELEASED = ("sd15", "sdxl", "sd3", "flux")


def released(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, pruned=()) -> torch.nn.Module:
    """A denoiser with small random weights, built on its device without being initialised twice.

    Args:
        name: one of `diffaccel.models.released.NETWORKS`.
        device, dtype: of the weights.
        pruned: layers that are missing from the start, as in ``pruned_layers``.
    """
    cls, config = released_network(name)
    with torch.device("meta"):
        network = pruned_class(cls).from_config({**config, "pruned_layers": list(pruned)}) if pruned else cls(**config)
    network = network.to_empty(device=device).eval().requires_grad_(False)
    if dtype != torch.float32:
        network.to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    for key, tensor in network.state_dict().items():
        scale = 0.02 if tensor.dim() > 1 else 0.0
        if tensor.is_floating_point():
            tensor.normal_(generator=generator).mul_(scale)
            tensor.add_(1.0 if tensor.dim() == 1 and key.endswith("weight") else 0.0)
    return network
