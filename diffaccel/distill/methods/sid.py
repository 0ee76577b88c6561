"""Score identity distillation (Zhou et al. 2024, SiD): gradients flow through teacher and critic into the samples."""

from dataclasses import dataclass

from ...core.errors import UsageError
from .dmd import DMD


class SiD(DMD):
    """DMD with the loss of SiD in place of distribution matching; roles and phases are the same."""

    through = True

    @dataclass
    class Config(DMD.Config):
        """Attributes:
        alpha: weight of the squared score difference that is subtracted (SiD, equation 23); 1.2 in the paper, 0.5–1
            where that is unstable.
        time_range: fractions of the schedule's index; the paper stops at 0.8.
        """

        alpha: float = 1.2
        time_range: tuple[float, ...] = (0.02, 0.8)

        def __post_init__(self):
            super().__post_init__()
            if not self.distribution_weight > 0:
                raise UsageError("method.distribution_weight must be positive for sid, whose loss it weighs.")

    def matching_loss(self, x, t, u, condition, draw, metrics):
        """(D_teacher − D_critic)·[(D_teacher − x) − α·(D_teacher − D_critic)] / mean|x − D_teacher| per sample."""
        x_t = self.teacher.noised(x, t, draw.normal("eps", self.teacher.sample_shape))
        _, logit = self.judged(x_t, t, condition)
        real, fake = self.real(x_t, t, condition), self.roles["critic"](x_t, t, condition)
        each = tuple(range(1, x.ndim))
        distance = (x - real).detach().abs().mean(each, keepdim=True)
        difference = real - fake
        self.watch(metrics, fake.detach(), real.detach(), distance)
        weight = self.sample_weight(u, logit, metrics).reshape(-1, *[1] * len(each)) / (distance + 1e-6)
        return (weight * difference * ((real - x) - self.config.alpha * difference)).mean(), logit
