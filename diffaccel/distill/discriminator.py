"""A discriminator on the features of the frozen teacher (DMD2, f-distill)."""

import torch
from torch import nn

from ..core.rng import seeded
from ..models.conditions import Conditions
from ..models.denoiser import NetworkDenoiser


class FeatureDiscriminator(nn.Module):
    """One small head per teacher feature map; the logit is the mean over heads.

    The teacher knows time and condition, and so do its features. At the optimum, with real and generated samples
    noised to the same time, the logit is log p_t/q_t.

    Args:
        channels: channels of each feature map.
        width: hidden width of the heads.
    """

    def __init__(self, channels: list[int], width: int = 64):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, count),
                nn.Conv2d(count, width, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, stride=2, padding=1),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.Linear(4 * width, 1),
            )
            for count in channels
        )

    @classmethod
    def of(cls, teacher: NetworkDenoiser, conditions: Conditions, seed: int) -> "FeatureDiscriminator":
        """A new one for the features of a teacher, with initial weights by ``seed``."""
        device = next(teacher.parameters()).device
        with torch.no_grad():
            _, features = teacher.forward_with_features(
                torch.zeros(1, *teacher.sample_shape, device=device),
                torch.full((1,), teacher.schedule.t_max, device=device),
                conditions.at(conditions.members[:1].to(device)),
            )
        with seeded(seed):
            return cls([feature.shape[1] for feature in features])

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Logits (B,) of maps [(B, C_i, h_i, w_i)]; positive means real."""
        return torch.stack([head(f).squeeze(1) for head, f in zip(self.heads, features, strict=True)]).mean(0)
