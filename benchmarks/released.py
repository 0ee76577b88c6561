"""Denoisers of the sizes of released models, with random weights, for measurements of time and memory."""

import diffusers
import torch

from diffaccel.prune.classes import pruned_class

_SD15 = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2, "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip
_SDXL = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
_SD3 = {
    "sample_size": 128, "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}  # fmt: skip
_FLUX = {"guidance_embeds": True}  # the defaults of the class are those of FLUX.1
RELEASED = {
    "sd15": (diffusers.UNet2DConditionModel, _SD15),
    "sdxl": (diffusers.UNet2DConditionModel, _SDXL),
    "sd3": (diffusers.SD3Transformer2DModel, _SD3),
    "flux": (diffusers.FluxTransformer2DModel, _FLUX),
}
"""Classes and configurations by name."""


def released(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, pruned=()) -> torch.nn.Module:
    """A denoiser with small random weights, built on its device without being initialised twice.

    Args:
        name: one of `RELEASED`.
        device, dtype: of the weights.
        pruned: layers that are missing from the start, as in ``pruned_layers``.
    """
    cls, config = RELEASED[name]
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
