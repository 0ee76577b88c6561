"""Networks that predict pixels, UNet2DModel and DiTTransformer2DModel, as Denoisers; with or without classes."""

import torch
from torch import nn

from .denoiser import Condition, NetworkDenoiser


def is_transformer(net) -> bool:
    """Whether a pixel network is a DiTTransformer2DModel, which is always conditional on classes."""
    return "num_embeds_ada_norm" in net.config


def sample_shape(net) -> tuple[int, int, int]:
    """(channels, height, width) of the samples of a pixel network."""
    size = net.config.sample_size
    return (net.config.in_channels, *(size if isinstance(size, (tuple, list)) else (size, size)))


def num_classes(net) -> int | None:
    """Number of classes of a pixel network, the null class not counted; None for an unconditional one."""
    if is_transformer(net):
        return net.config.num_embeds_ada_norm
    embeddings = net.config.num_class_embeds
    return embeddings - 1 if embeddings else None


class PixelDenoiser(NetworkDenoiser):
    """Condition: ``{"class_labels": (B,) int64}`` if the network has classes, else None.

    The index behind the last class is the null class of classifier-free guidance.
    """

    def __init__(self, net, schedule, prediction_type):
        super().__init__(net, schedule, prediction_type)
        if is_transformer(net):  # in training, diffusers' DiT drops labels by random numbers of its own
            for module in net.modules():
                if hasattr(module, "dropout_prob"):
                    module.dropout_prob = 0.0
        self.sample_shape, self.num_classes = sample_shape(net), num_classes(net)

    def null_condition(self, count: int) -> Condition | None:
        if self.num_classes is None:
            return None
        return {"class_labels": torch.full((count,), self.num_classes, dtype=torch.long)}

    def predict(self, x_t, t, condition):
        dtype = self.net.dtype
        # Times stay float: these networks embed any real timestep, and rounding would move solver grids.
        return self.net(x_t.to(dtype), t.to(x_t.device, torch.float32), **(condition or {})).sample

    def feature_modules(self) -> list[nn.Module]:
        if is_transformer(self.net):
            return list(self.net.transformer_blocks)
        return [*self.net.down_blocks, self.net.mid_block, *self.net.up_blocks]
