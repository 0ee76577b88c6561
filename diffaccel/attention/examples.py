"""Inputs as released pipelines give them, for one evaluation of a network at the size it was trained at."""

import torch
from torch import nn

from ..core.errors import UsageError

_TEXT = {"SD3Transformer2DModel": 333, "PixArtTransformer2DModel": 300, "FluxTransformer2DModel": 512}
_ALPHA = 120  # tokens of PixArt-α at 1024 × 1024; PixArt-Σ has 300
_CLIP = 77  # tokens of prompts of U-Nets


def example_call(network: nn.Module, images: int = 1) -> dict[str, torch.Tensor]:
    """Keyword arguments for one evaluation: random latents, random text, two branches of guidance where it has them.

    Args:
        network: UNet2DModel, UNet2DConditionModel, DiT, PixArt, SD3 or Flux transformer, eager.
        images: number of samples.

    Raises:
        UsageError: a network of another kind, or one that takes more than prompts or classes.
    """
    kind = type(network).__name__
    if kind not in _MAKERS:
        raise UsageError(
            f"How {kind} is called is not known: pass run=, such as lambda: pipe('a cat', num_inference_steps=1)."
        )
    first = next(network.parameters())
    device, dtype = first.device, network.dtype
    if device.type == "meta":
        raise UsageError("The weights are offloaded: pass run=, such as lambda: pipe('a cat', num_inference_steps=1).")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def whole(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.long, device=device)

    return _MAKERS[kind](network.config, normal, whole, images)


def has_example(network: nn.Module) -> bool:
    """Whether `example_call` knows how a network is called."""
    try:
        example_call(network)
    except UsageError:
        return False
    return True


def _unet(config, normal, whole, images: int) -> dict:
    height, width = _pair(config.sample_size or 64)
    classes = {"class_labels": whole(images)} if getattr(config, "num_class_embeds", None) else {}
    return {"sample": normal(images, config.in_channels, height, width), "timestep": whole(images) + 500, **classes}


def _unet_condition(config, normal, whole, images: int) -> dict:
    rows = 2 * images
    images_too = config.encoder_hid_dim_type not in (None, "text_proj")
    if images_too or config.class_embed_type is not None or config.addition_embed_type not in (None, "text_time"):
        raise UsageError(
            "This U-Net takes more than prompts: pass run=, such as lambda: pipe('a cat', num_inference_steps=1)."
        )
    width = config.encoder_hid_dim or config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    call = {**_unet(config, normal, whole, rows), "encoder_hidden_states": normal(rows, _CLIP, width)}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        call["added_cond_kwargs"] = {"text_embeds": normal(rows, pooled), "time_ids": normal(rows, 6)}
    return call


def _dit(config, normal, whole, images: int) -> dict:
    size, rows = config.sample_size, 2 * images
    sample = normal(rows, config.in_channels, size, size)
    return {"hidden_states": sample, "timestep": whole(rows) + 500, "class_labels": whole(rows)}


def _pixart(config, normal, whole, images: int) -> dict:
    size, rows = config.sample_size, 2 * images
    length = _ALPHA if config.use_additional_conditions else _TEXT["PixArtTransformer2DModel"]
    mask = torch.ones(rows, length, device=whole(1).device)
    mask[images:, 20:] = 0  # a prompt of ordinary length
    resolution = {"resolution": normal(rows, 2), "aspect_ratio": normal(rows, 1)} if size == 128 else {}
    return {
        "hidden_states": normal(rows, config.in_channels, size, size),
        "encoder_hidden_states": normal(rows, length, config.caption_channels),
        "encoder_attention_mask": mask,
        "timestep": whole(rows) + 500,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None} | resolution,
    }


def _sd3(config, normal, whole, images: int) -> dict:
    size, rows = config.sample_size, 2 * images
    return {
        "hidden_states": normal(rows, config.in_channels, size, size),
        "encoder_hidden_states": normal(rows, _TEXT["SD3Transformer2DModel"], config.joint_attention_dim),
        "pooled_projections": normal(rows, config.pooled_projection_dim),
        "timestep": whole(rows) + 500,
    }


def _flux(config, normal, whole, images: int) -> dict:
    tokens, length = 64 * 64, _TEXT["FluxTransformer2DModel"]  # 1024 × 1024 pixels
    guidance = {"guidance": normal(images).abs()} if config.guidance_embeds else {}
    return {
        "hidden_states": normal(images, tokens, config.in_channels),
        "encoder_hidden_states": normal(images, length, config.joint_attention_dim),
        "pooled_projections": normal(images, config.pooled_projection_dim),
        "timestep": normal(images).abs(),
        "img_ids": normal(tokens, 3),
        "txt_ids": normal(length, 3),
        **guidance,
    }


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


_MAKERS = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _unet_condition,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}
