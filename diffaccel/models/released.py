"""Networks of released models without their weights: what plans and measurements need of models that are not on this machine.

Importing this needs neither torch nor diffusers.
"""

from typing import TYPE_CHECKING

from ..core.errors import unknown
from ..core.lazy import load_object

if TYPE_CHECKING:
    from .denoiser import NetworkDenoiser

_UNET = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2}
_XL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
_SD21 = {
    "sample_size": 96, "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True,
}  # fmt: skip
_SD3 = {
    "sample_size": 128, "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}  # fmt: skip
_CIFAR = {
    "sample_size": 32, "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2, "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "attention_head_dim": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


def _text(tokens: int, width: int, **others: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, width), **others}


NETWORKS = {
    "sd15": ("UNet2DConditionModel", _UNET | {"sample_size": 64, "cross_attention_dim": 768}),
    "sd21": ("UNet2DConditionModel", _UNET | _SD21),
    "sdxl": ("UNet2DConditionModel", _UNET | _XL),
    "sd3": ("SD3Transformer2DModel", _SD3),
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),  # the defaults of the class are those of FLUX.1
    "pixart": ("PixArtTransformer2DModel", {"sample_size": 128}),
    "dit": ("DiTTransformer2DModel", {"num_attention_heads": 16, "attention_head_dim": 72, "out_channels": 8}),
    "ddpm-cifar10": ("UNet2DModel", _CIFAR),
}
"""Classes of diffusers and configurations by name of the model."""

_CONDITION = "diffaccel.models.unet_condition:UNetConditionDenoiser"
_TRANSFORMERS = "diffaccel.models.transformers"
_DENOISERS = {  # and the shapes of a sample's condition
    "sd15": (_CONDITION, _text(77, 768)),
    "sd21": (_CONDITION, _text(77, 1024)),
    "sdxl": (_CONDITION, _text(77, 2048, text_embeds=(1280,), time_ids=(6,))),
    "sd3": (f"{_TRANSFORMERS}:SD3Denoiser", _text(333, 4096, pooled_projections=(2048,))),
    "pixart": (
        f"{_TRANSFORMERS}:PixArtDenoiser",
        _text(120, 4096, encoder_attention_mask=(120,), resolution=(2,), aspect_ratio=(1,)),
    ),
    "dit": (f"{_TRANSFORMERS}:DiTDenoiser", None),
    "ddpm-cifar10": ("diffaccel.models.pixel:PixelDenoiser", None),
}


def has_released(name: str) -> bool:
    """Whether `released_teacher` knows a teacher."""
    return name in _DENOISERS


def released_network(name: str) -> tuple[type, dict]:
    """Class and configuration of the network of a released model.

    Args:
        name: one of `NETWORKS`.

    Raises:
        UsageError: a model that is not known here.
    """
    if name not in NETWORKS:
        raise unknown("released model", name, NETWORKS)
    import diffusers

    network, config = NETWORKS[name]
    return getattr(diffusers, network), config


def released_teacher(name: str) -> "NetworkDenoiser":
    """The Denoiser of a released model on the meta device: shapes, and neither weights nor schedule.

    Args:
        name: of a model in `models.teachers.TEACHERS`.

    Raises:
        UsageError: a model that is not known here.
    """
    if name not in _DENOISERS:
        raise unknown("released teacher", name, _DENOISERS)
    import torch

    (network, config), (denoiser, shapes) = released_network(name), _DENOISERS[name]
    with torch.device("meta"):
        net = network(**config)
        null = [{key: torch.empty(shape) for key, shape in shapes.items()}] if shapes is not None else []
    return load_object(denoiser)(net, None, "epsilon", *null)
