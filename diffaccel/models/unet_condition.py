"""diffusers' UNet2DConditionModel as a Denoiser: latent models that read text, in the layout of Stable Diffusion."""

import torch
from torch import nn

from .denoiser import Condition, NetworkDenoiser


class UNetConditionDenoiser(NetworkDenoiser):
    """Condition: ``{"encoder_hidden_states": (B, tokens, width) float}``, what the text encoder says of a prompt.

    Args:
        net: UNet2DConditionModel, with square samples.
        schedule, prediction_type: see `NetworkDenoiser`.
        null_states: (tokens, width), the states of the empty prompt.
    """

    def __init__(self, net, schedule, prediction_type: str, null_states: torch.Tensor):
        super().__init__(net, schedule, prediction_type)
        size = net.config.sample_size
        self.sample_shape = (net.config.in_channels, *(size if isinstance(size, (tuple, list)) else (size, size)))
        self.register_buffer("null_states", null_states)

    def null_condition(self, count: int) -> Condition:
        return {"encoder_hidden_states": self.null_states.expand(count, *self.null_states.shape)}

    def predict(self, x_t, t, condition):
        dtype = self.net.dtype
        states = condition["encoder_hidden_states"].to(x_t.device, dtype)
        return self.net(x_t.to(dtype), t.to(x_t.device, torch.float32), states).sample

    def feature_modules(self) -> list[nn.Module]:
        return [*self.net.down_blocks, self.net.mid_block, *self.net.up_blocks]


@torch.no_grad()
def encode_prompts(tokenizer, text_encoder, prompts: list[str], batch_size: int = 64) -> torch.Tensor:
    """(N, tokens, width) float32: the states that StableDiffusionPipeline hands to its U-Net for these prompts."""
    states = []
    for start in range(0, len(prompts), batch_size):
        tokens = tokenizer(
            prompts[start : start + batch_size],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        states.append(text_encoder(tokens.input_ids.to(text_encoder.device)).last_hidden_state.float())
    return torch.cat(states)
