"""Latent networks that read text as Denoisers, and the first of them, diffusers' UNet2DConditionModel."""

import torch
from torch import nn

from .denoiser import Condition, NetworkDenoiser
from .pixel import sample_shape


class TextDenoiser(NetworkDenoiser):
    """A latent network whose conditions are keyword arguments, each (B, …), such as ``encoder_hidden_states``.

    Args:
        net: the network.
        schedule, prediction_type: see `NetworkDenoiser`.
        null: the condition of the empty prompt, for one sample and without the batch dimension. It is not part of the
            state dict.
    """

    added: tuple[str, ...] = ()  # conditions that go into ``added_cond_kwargs``

    def __init__(self, net, schedule, prediction_type: str, null: Condition):
        super().__init__(net, schedule, prediction_type)
        self.sample_shape, self._names = sample_shape(net), tuple(null)
        for name, value in null.items():
            self.register_buffer(f"null_{name}", value, persistent=False)

    @staticmethod
    def micro_conditions(net, height: int, width: int) -> Condition:
        """Conditions besides the prompt for images of this size, for one sample and without the batch dimension."""
        return {}

    def null_condition(self, count: int) -> Condition:
        null = {name: getattr(self, f"null_{name}") for name in self._names}
        return {name: value.expand(count, *value.shape) for name, value in null.items()}

    def predict(self, x_t, t, condition):
        dtype, device = self.net.dtype, x_t.device
        given = {
            name: value.to(device, dtype if value.is_floating_point() else None) for name, value in condition.items()
        }
        if added := {name: given.pop(name) for name in self.added if name in given}:
            given["added_cond_kwargs"] = added
        # Times stay float: these networks embed any real timestep.
        prediction = self.net(x_t.to(dtype), timestep=t.to(device, torch.float32), **given).sample
        return prediction[:, : self.sample_shape[0]]  # a learned variance follows


class UNetConditionDenoiser(TextDenoiser):
    """UNet2DConditionModel of Stable Diffusion 1, 2 and XL.

    Condition: ``encoder_hidden_states`` (B, tokens, width) float, what the text encoder says of a prompt; for XL also
    ``text_embeds`` (B, width) float and ``time_ids`` (B, 6): original size, crop and target size (Podell et al. 2023, §2.2).
    """

    added = ("text_embeds", "time_ids")

    @staticmethod
    def micro_conditions(net, height, width):
        if net.config.addition_embed_type != "text_time":
            return {}
        return {"time_ids": torch.tensor([height, width, 0.0, 0.0, height, width])}

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
