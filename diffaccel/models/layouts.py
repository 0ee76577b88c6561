"""Pipelines that can be taught from, by the name of their class; importing this imports neither torch nor diffusers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """How a pipeline calls its network.

    Attributes:
        denoiser: "module:class" of the network's Denoiser.
        encoded: what the pipeline's `encode_prompt` returns, in order, by the names of the Denoiser's condition; a name
            that begins with null_ is for the empty prompt. None of it where the pipeline reads no text.
        latent: whether a VAE stands between the network and the images.
    """

    denoiser: str
    encoded: tuple[str, ...] = ()
    latent: bool = True


_STATES = ("encoder_hidden_states", "null_encoder_hidden_states")
_PIXART = Layout(
    "diffaccel.models.transformers:PixArtDenoiser",
    ("encoder_hidden_states", "encoder_attention_mask", "null_encoder_hidden_states", "null_encoder_attention_mask"),
)
LAYOUTS = {
    "ClassConditionalPipeline": Layout("diffaccel.models.pixel:PixelDenoiser", latent=False),
    "StableDiffusionPipeline": Layout("diffaccel.models.unet_condition:UNetConditionDenoiser", _STATES),
    "StableDiffusionXLPipeline": Layout(
        "diffaccel.models.unet_condition:UNetConditionDenoiser", (*_STATES, "text_embeds", "null_text_embeds")
    ),
    "StableDiffusion3Pipeline": Layout(
        "diffaccel.models.transformers:SD3Denoiser", (*_STATES, "pooled_projections", "null_pooled_projections")
    ),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
    "DiTPipeline": Layout("diffaccel.models.transformers:DiTDenoiser"),
}
