"""diffusers' UNet2DModel as a Denoiser: pixel models, with or without classes."""

import torch
from torch import nn

from .denoiser import Condition, NetworkDenoiser


class UNet2DDenoiser(NetworkDenoiser):
    """Condition: ``{"class_labels": (B,) int64}`` if the network has class embeddings, else None.

    The last class index is the null class of classifier-free guidance.
    """

    def __init__(self, net, schedule, prediction_type):
        super().__init__(net, schedule, prediction_type)
        config = net.config
        size = config.sample_size if isinstance(config.sample_size, (tuple, list)) else (config.sample_size,) * 2
        self.sample_shape = (config.in_channels, *size)
        self.num_classes = config.num_class_embeds - 1 if config.num_class_embeds else None

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
