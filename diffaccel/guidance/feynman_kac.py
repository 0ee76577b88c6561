"""Feynman-Kac correctors: what classifier-free guidance would sample if it followed the distribution that it names.

Guidance at scale w steps along the score of q_u^(1−w)·q_c^w at every noise level, but these are not the noised versions of
one distribution, so the samples are of none of them. Weights on samples make up for it (Skreta et al. 2025):

    d log W = ½·g²·w·(w − 1)·‖∇log q_c − ∇log q_u‖² dt,

which is ½·w·(w − 1)·(1 − (ρ'/ρ)²)·‖ε_c − ε_u‖² for a step from the noise-to-signal ratio ρ to ρ'. On the way samples are
drawn anew by their weights, among those of the same prompt.
"""

import numbers
from dataclasses import dataclass

import torch

from ..core.errors import GuidanceError, UsageError
from . import functional
from .base import COND, UNCOND, check_number, is_number
from .context import Context
from .rules import CFG, Interval, inside


@dataclass(frozen=True)
class FeynmanKac(CFG):
    """Classifier-free guidance among several samples of a prompt, of which the likely ones multiply (Skreta et al. 2025).

    Copies part only where the sampler adds noise, so it has to be DDPM, DDIM with eta, EulerAncestral or "ddpm" of this
    package; samplers that look back would mix the pasts of different samples.

    Args:
        scale: as in `CFG`.
        particles: samples per prompt, next to each other in the batch: the num_images_per_prompt of the call.
        clamp: bound on the change of a log-weight in one step, against the mean of its prompt. None for exact weights,
            with which in many dimensions one sample soon takes all.
        threshold: draw anew below this share of effective samples; 1 always, so that no weights are left at the end.
        sigma_range: (low, high], noise-to-signal ratios between which samples are weighed; None for all.
        seed: of the drawing.

    Raises:
        UsageError: a value out of range.
    """

    particles: int = 4
    clamp: float | None = 1.0
    threshold: float = 1.0
    sigma_range: tuple[float, float] | None = None
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not is_number(self.particles, numbers.Integral) or self.particles < 1:
            raise UsageError(f"particles must be a whole number of at least 1; got {self.particles!r}.")
        if self.clamp is not None:
            check_number(self, "clamp", 0.0)
        check_number(self, "threshold", 0.0, 1.0)
        if self.sigma_range is not None:
            Interval(self, self.sigma_range)  # refuses bad ones

    def check(self, arguments):
        """Refuse a call that does not make ``particles`` samples of each prompt or class.

        Raises:
            UsageError: the call.
        """
        if self.particles == 1:
            return
        each = next(
            (arguments[name] for name in ("num_images_per_prompt", "num_videos_per_prompt") if name in arguments), 1
        )
        labels = torch.as_tensor([] if arguments.get("class_labels") is None else arguments["class_labels"]).reshape(-1)
        repeats = 0 < len(labels) == len(labels) // self.particles * self.particles
        if each != self.particles and not (repeats and (labels.reshape(-1, self.particles).diff() == 0).all()):
            raise UsageError(
                f"FeynmanKac draws among {self.particles} samples of a prompt: call the pipeline with "
                f"num_images_per_prompt={self.particles}, or with each class label {self.particles} times in a row."
            )

    def __call__(self, predictions, context):
        _ = context.target  # asked now, for `correct`: the step moves the scheduler on
        acts = self.sigma_range is None or inside(self.sigma_range, context.level.rho)
        if acts and self.particles > 1 and UNCOND in self.requires:
            rise = self.increments(predictions[COND], predictions[UNCOND], context)
            context.memory["log_weights"] = context.memory.get("log_weights", 0.0) + rise
        return super().__call__(predictions, context)

    def increments(self, c: torch.Tensor, u: torch.Tensor, context: Context) -> torch.Tensor:
        """Changes of the log-weights (prompts, particles) in this step, from predictions (B, …).

        Raises:
            GuidanceError: a batch that is not whole groups, or a step without noise.
        """
        level, target = context.level, context.target
        if len(c) % self.particles:
            raise GuidanceError(
                f"FeynmanKac has {self.particles} particles per prompt, the batch {len(c)} samples: call the pipeline with "
                f"num_images_per_prompt={self.particles}."
            )
        if target.kept == target.sigma > 0.0:
            raise GuidanceError(
                "FeynmanKac needs a sampler that adds noise, or the copies of a sample stay equal: use DDPMScheduler, "
                'EulerAncestralDiscreteScheduler, DDIM with eta=1 or the sampler "ddpm".'
            )
        passed = 1.0 - (target.sigma / (target.alpha * level.rho)) ** 2
        difference = level.affine("epsilon")[1] * (c - u)
        rise = 0.5 * self.scale * (self.scale - 1.0) * passed * functional.inner(difference, difference)
        rise = rise.reshape(-1, self.particles)
        return rise if self.clamp is None else (rise - rise.mean(1, keepdim=True)).clamp(-self.clamp, self.clamp)

    def correct(self, state, context):
        logs = context.memory.get("log_weights")
        if logs is None or context.target.sigma == 0.0:  # copies of the result would be worth nothing
            return state
        weights = logs.softmax(1)
        poor = 1.0 / weights.square().sum(1, keepdim=True) < self.threshold * self.particles
        generator = context.memory.setdefault("draws", torch.Generator().manual_seed(self.seed))
        drawn = systematic(weights, torch.rand(len(weights), 1, generator=generator))
        own = torch.arange(self.particles, device=state.device)
        chosen = (
            torch.where(poor, drawn, own) + self.particles * torch.arange(len(weights), device=state.device)[:, None]
        )
        context.memory["log_weights"] = torch.where(poor, 0.0, logs)
        return state[chosen.flatten()]


def systematic(weights: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Indices (G, K) of a systematic draw from weights (G, K), rows summing to 1; offsets (G, 1) in [0, 1).

    A sample of weight w is drawn ⌊K·w⌋ or ⌈K·w⌉ times.
    """
    count = weights.shape[1]
    points = (torch.arange(count, device=weights.device) + offset.to(weights)) / count
    return torch.searchsorted(weights.cumsum(1), points, right=True).clamp_max(count - 1)
