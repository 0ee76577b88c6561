"""diffusers' UNet2DModel as a Denoiser: pixel models, with or without classes."""

import torch
from torch import nn

from .denoiser import Condition, NetworkDenoiser


def sample_shape(net) -> tuple[int, int, int]:
    """(channels, height, width) of the samples of a UNet2DModel."""
    size = net.config.sample_size
    return (net.config.in_channels, *(size if isinstance(size, (tuple, list)) else (size, size)))


def num_classes(net) -> int | None:
    """Number of classes of a UNet2DModel, the null class not counted; None for an unconditional one."""
    embeddings = net.config.num_class_embeds
    return embeddings - 1 if embeddings else None


class UNet2DDenoiser(NetworkDenoiser):
    """Condition: ``{"class_labels": (B,) int64}`` if the network has class embeddings, else None.

    The last class index is the null class of classifier-free guidance.
    """

    def __init__(self, net, schedule, prediction_type):
        super().__init__(net, schedule, prediction_type)
        self.sample_shape, self.num_classes = sample_shape(net), num_classes(net)

    def null_condition(self, count: int) -> Condition | None:
        if self.num_classes is None:
            return None
        return {"class_labels": torch.full((count,), self.num_classes, dtype=torch.long)}

    def predict(self, x_t, t, condition):
        dtype = self.net.dtype
        # Times stay float: UNet2DModel embeds any real timestep, and rounding would move solver grids.
        return self.net(x_t.to(dtype), t.to(x_t.device, torch.float32), **(condition or {})).sample

    def feature_modules(self) -> list[nn.Module]:
        return [*self.net.down_blocks, self.net.mid_block, *self.net.up_blocks]
