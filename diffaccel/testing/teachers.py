"""Teachers whose E[x0 | x_t] is known exactly: the referees of samplers, losses and metrics."""

import math

import torch

from ..core.schedule import NoiseSchedule
from ..models.denoiser import Condition, Denoiser


class GaussianMixtureTeacher(Denoiser):
    """Data from a mixture of K Gaussians with diagonal covariances; a class label selects one component.

    The posterior mean is exact at every level, α = 0 and σ = 0 included, and computed in the dtype of x_t.

    Args:
        weights: (K,) positive, normalised here.
        means: (K, *sample_shape).
        variances: (K, *sample_shape) or broadcastable to it, positive.
        schedule: noise schedule of the states.

    Condition: None, or {"class_labels": (B,)} with the component 0 … K−1; K is the null label (all components).
    """

    def __init__(self, weights, means, variances, schedule: NoiseSchedule):
        super().__init__()
        means = torch.as_tensor(means, dtype=torch.float64)
        weights = torch.as_tensor(weights, dtype=torch.float64)
        variances = torch.as_tensor(variances, dtype=torch.float64).expand_as(means)
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("means", means)
        self.register_buffer("variances", variances.clone())
        self.schedule, self.sample_shape = schedule, tuple(means.shape[1:])

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition | None = None) -> torch.Tensor:
        """(B, *sample_shape) posterior mean in the dtype of x_t; t (B,)."""
        means, variances = (buffer.to(x_t.dtype).flatten(1).unsqueeze(0) for buffer in (self.means, self.variances))
        alpha, sigma = (value.to(x_t).reshape(-1, 1, 1) for value in self.schedule.level(t))
        x = x_t.flatten(1).unsqueeze(1)
        marginal = alpha**2 * variances + sigma**2
        residual = x - alpha * means
        log_density = -0.5 * (residual**2 / marginal + marginal.log()).sum(2)
        responsibility = torch.softmax(log_density + self._log_prior(condition, x_t), dim=1)
        posterior = means + alpha * variances / marginal * residual
        return (responsibility.unsqueeze(2) * posterior).sum(1).reshape(x_t.shape)

    def null_condition(self, count: int) -> Condition:
        """The label K for every sample."""
        return {"class_labels": torch.full((count,), len(self.log_weights), device=self.log_weights.device)}

    def draw(self, count: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """(count, *sample_shape) float64 samples of the data."""
        component = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        noise = torch.randn(count, *self.sample_shape, dtype=torch.float64, generator=generator)
        return self.means[component] + self.variances[component].sqrt() * noise

    def _log_prior(self, condition, x_t):
        log_weights = self.log_weights.to(x_t.dtype)
        if condition is None:
            return log_weights
        labels = condition["class_labels"].unsqueeze(1)
        components = torch.arange(len(log_weights), device=labels.device)
        allowed = (labels == components) | (labels == len(log_weights))
        return torch.where(allowed, log_weights, torch.full_like(log_weights, -math.inf))


class GaussianTeacher(GaussianMixtureTeacher):
    """Data from one Gaussian with diagonal covariance; its probability flow has a closed form.

    Args:
        mean: (*sample_shape).
        std: (*sample_shape) or broadcastable to it.
        schedule: noise schedule of the states.
    """

    def __init__(self, mean, std, schedule: NoiseSchedule):
        mean = torch.as_tensor(mean, dtype=torch.float64)
        std = torch.as_tensor(std, dtype=torch.float64).expand_as(mean)
        super().__init__([1.0], mean.unsqueeze(0), (std**2).unsqueeze(0), schedule)

    def transport(self, x: torch.Tensor, start: tuple[float, float], stop: tuple[float, float]) -> torch.Tensor:
        """Exact end point of the probability-flow ODE between two levels (α, σ), ends included.

        x' = α'μ + (x − αμ)·sqrt((α'²s² + σ'²)/(α²s² + σ²)).
        """
        mean, variance = self.means[0].to(x), self.variances[0].to(x)
        (alpha, sigma), (next_alpha, next_sigma) = start, stop
        ratio = (next_alpha**2 * variance + next_sigma**2) / (alpha**2 * variance + sigma**2)
        return next_alpha * mean + (x - alpha * mean) * ratio.sqrt()
