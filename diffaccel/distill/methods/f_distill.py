"""f-distill (Xu et al. 2025): distribution matching under any f-divergence.

Each sample's score difference is weighted by h(r), r = p_t/q_t read from a discriminator. Two normalisations keep the
weights calibrated: per bin of the schedule's index r is divided by its running mean (exactly 1 for a perfect
discriminator, since E_q[r] = 1), and h by its own running mean. Both running means are those of the updates before, so
the samples of a batch do not depend on each other and gradient accumulation changes nothing.
"""

from dataclasses import dataclass

import torch

from ...core.errors import UsageError
from ...training.method import Phase
from ..divergences import get_divergence
from .dmd import DMD

BINS = 10


class FDistill(DMD):
    """DMD with the weight h(r) of a divergence; reverse KL without adversarial loss is DMD itself."""

    @dataclass
    class Config(DMD.Config):
        """Attributes:
        divergence: one of `diffaccel list divergences`.
        ratio_range: r is clamped to this range after calibration.
        normalizer_decay: decay of the running means, in student updates.
        """

        divergence: str = "js"
        ratio_range: tuple[float, ...] = (0.1, 20.0)
        normalizer_decay: float = 0.9

        def __post_init__(self):
            super().__post_init__()
            get_divergence(self.divergence)
            if len(self.ratio_range) != 2 or not 0.0 < self.ratio_range[0] < self.ratio_range[1]:
                raise UsageError(f"method.ratio_range must be two rising positive numbers, got {self.ratio_range}.")
            if not 0.0 <= self.normalizer_decay < 1.0:
                raise UsageError(f"method.normalizer_decay must be in [0, 1), got {self.normalizer_decay}.")

    def __init__(self, task, config: Config, seed: int = 0):
        self.divergence = get_divergence(config.divergence)
        super().__init__(task, config, seed)
        self.ratio_means = torch.ones(BINS)
        self.weight_mean = self.divergence.h(torch.ones(()))
        self._seen = torch.zeros(2, BINS)  # this update's sums of r, counts
        self._weights = torch.zeros(2)  # this update's sum of h, count

    def needs_discriminator(self) -> bool:
        return super().needs_discriminator() or self.divergence.name != "reverse-kl"

    def to(self, device):
        super().to(device)
        for name in ("ratio_means", "weight_mean", "_seen", "_weights"):
            setattr(self, name, getattr(self, name).to(device))

    def sample_weight(self, u, logit, metrics):
        if self.divergence.name == "reverse-kl":
            return super().sample_weight(u, logit, metrics)
        bins = (u * BINS).long().clamp_(0, BINS - 1)
        ratio = logit.float().clamp(-10.0, 10.0).exp()
        self._seen[0].index_add_(0, bins, ratio)
        self._seen[1].index_add_(0, bins, torch.ones_like(ratio))
        calibrated = (ratio / self.ratio_means[bins]).clamp(*self.config.ratio_range)
        weight = self.divergence.h(calibrated)
        self._weights += torch.stack([weight.sum(), torch.full_like(self.weight_mean, len(weight))])
        weight = weight / self.weight_mean
        metrics["weight_std"] = weight.std(correction=0)
        metrics["ratio_std"] = calibrated.std(correction=0)
        metrics |= {f"ratio_mean_bin{k}": value for k, value in enumerate(self.ratio_means)}
        return weight

    def end_phase(self, phase: Phase, total) -> None:
        if phase.name != "student" or self.divergence.name == "reverse-kl":
            return
        seen, weights, keep = total(self._seen), total(self._weights), self.config.normalizer_decay
        means = seen[0] / seen[1].clamp_min(1.0)
        self.ratio_means = torch.where(seen[1] > 0, torch.lerp(means, self.ratio_means, keep), self.ratio_means)
        self.weight_mean = torch.lerp(weights[0] / weights[1], self.weight_mean, keep)
        self._seen, self._weights = torch.zeros_like(self._seen), torch.zeros_like(self._weights)

    def extra_state(self) -> dict[str, torch.Tensor]:
        return {"ratio_means": self.ratio_means, "weight_mean": self.weight_mean}

    def load_extra_state(self, state) -> None:
        device = self.ratio_means.device
        self.ratio_means, self.weight_mean = state["ratio_means"].to(device), state["weight_mean"].to(device)
