"""Latent transformers as Denoisers: PixArt, Stable Diffusion 3 and DiT."""

import torch
from torch import nn

from .pixel import PixelDenoiser
from .unet_condition import TextDenoiser


class PixArtDenoiser(TextDenoiser):
    """PixArtTransformer2DModel.

    Condition: ``encoder_hidden_states`` (B, tokens, width) float and ``encoder_attention_mask`` (B, tokens), 1 for tokens of
    the prompt; also ``resolution`` (B, 2) and ``aspect_ratio`` (B, 1) where the network takes them (PixArt-α at 1024).
    """

    added = ("resolution", "aspect_ratio")

    @staticmethod
    def micro_conditions(net, height, width):
        if not net.use_additional_conditions:
            return {}
        return {"resolution": torch.tensor([height, width]).float(), "aspect_ratio": torch.tensor([height / width])}

    def feature_modules(self) -> list[nn.Module]:
        return list(self.net.transformer_blocks)


class SD3Denoiser(TextDenoiser):
    """SD3Transformer2DModel.

    Condition: ``encoder_hidden_states`` (B, tokens, width) and ``pooled_projections`` (B, width), float.
    """

    def feature_modules(self) -> list[nn.Module]:
        return list(self.net.transformer_blocks)

    def feature_of(self, output):
        return output[1]  # the states of the text come first


class DiTDenoiser(PixelDenoiser):
    """DiTTransformer2DModel of latents. Condition: ``{"class_labels": (B,) int64}``."""

    def predict(self, x_t, t, condition):
        return super().predict(x_t, t, condition)[:, : self.sample_shape[0]]  # a learned variance follows
