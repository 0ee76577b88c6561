"""Learning from pairs of noise and the teacher's sample: regression (Luhman & Luhman 2021) and reflow (Liu et al. 2023)."""

from dataclasses import dataclass, replace

import torch

from ...core.errors import UsageError, unknown
from ...core.prediction import coefficients
from ...models.denoiser import Condition
from ...training.method import Draw, Loss, Phase
from ..base import Distillation
from ..pairs import PairCache
from ..updates import Update

OBJECTIVES = ("regression", "reflow")
LOSSES = ("l2", "huber")
HUBER = (
    0.00054  # of the root of the dimension (Song & Dhariwal 2024, Improved Techniques for Consistency Models, eq. 8)
)


class Pairs(Distillation):
    """Role: student. It draws along a deterministic path, so that its sample is a function of the noise, as the teacher's."""

    @dataclass
    class Config(Distillation.Config):
        """Attributes:
        guidance_scale: classifier-free guidance of the teacher, folded into the student.
        student_steps: network evaluations of the student.
        student_start: fraction of the schedule at which the student is called first; it sees pure noise there.
        preset: name in `diffaccel list methods`, whose settings lie under those that are given.
        objective: "regression": the student's sample is to be the teacher's from the same noise. "reflow": the student
            learns to walk the straight line between the two, so that few steps do what many did.
        pairs: number of pairs, drawn before training and kept in the run folder.
        pair_steps: network evaluations of the teacher for each.
        loss: of the error per sample: "l2", its mean square, or "huber", √(‖·‖² + c²) − c with c = 0.00054·√dimension.
        """

        objective: str = "regression"
        pairs: int = 10000
        pair_steps: int = 20
        loss: str = "huber"

        def __post_init__(self):
            super().__post_init__()
            for name, valid in (("objective", OBJECTIVES), ("loss", LOSSES)):
                if getattr(self, name) not in valid:
                    raise unknown(f"method.{name}", getattr(self, name), valid)
            for name in ("pairs", "pair_steps"):
                if getattr(self, name) < 1:
                    raise UsageError(f"method.{name} must be at least 1, got {getattr(self, name)}.")

    def student_schedule(self):
        return replace(super().student_schedule(), noise="predicted")

    def begin(self, folder):
        super().begin(folder)
        config = self.config
        self.pairs = PairCache(folder / "pairs", self.task, self.real, config.pairs, config.pair_steps, self.seed)

    def phases(self, step: int) -> list[Phase]:
        return [Phase("student", ("student",))]

    def updates(self, steps):
        return [Update("student", ("student",), {"student": 1}, {"student": self.earlier_calls})]

    def loss(self, phase: Phase, draw: Draw) -> Loss:
        noise, x0, condition = self.pairs.batch(draw)
        error = self.regression_error if self.config.objective == "regression" else self.straight_error
        squares, metrics = error(noise, x0, condition, draw)
        metrics["mean_square"] = squares.detach().mean()
        if self.config.loss == "l2":
            return Loss(squares.mean(), metrics)
        root = x0[0].numel() ** 0.5
        return Loss(root * (torch.sqrt(squares + HUBER**2) - HUBER).mean(), metrics)

    def regression_error(
        self, noise: torch.Tensor, x0: torch.Tensor, condition: Condition | None, draw: Draw
    ) -> tuple[torch.Tensor, dict]:
        """(B,) mean squared distance between the student's sample, after a random one of its calls, and the teacher's."""
        count = 1 + int(draw.random.integers(f"{draw.stream}/calls", draw.step, 0, 1, len(self.steps.times)))
        x = self.generate(self.roles["student"], noise, condition, lambda step: None, count)
        return (x - x0).square().flatten(1).mean(1), self.health(x.detach())

    def straight_error(
        self, noise: torch.Tensor, x0: torch.Tensor, condition: Condition | None, draw: Draw
    ) -> tuple[torch.Tensor, dict]:
        """(B,) mean squared error of the velocity z − x0 on the straight line (1 − s)·x0 + s·z, s uniform (reflow).

        Every state αx0 + σz is (α + σ) times the line's at s = σ/(α + σ), so any schedule and any prediction type can be
        trained on it: an error of x0 is s times that of the velocity. Where the line is noisier than the student's first
        time it is its noisy end, fed to the student as in drawing.
        """
        schedule, first = self.schedule, self.steps.times[0]
        low, high = (sigma / (alpha + sigma) for alpha, sigma in map(schedule.level, (schedule.t_min, first)))
        s = low + (1.0 - low) * draw.stratified("time")
        beyond = s >= high
        t = torch.where(beyond, first, schedule.t_from_rho(s / (1.0 - s)))
        alpha, sigma = self.teacher.level(t)
        pure = (self.steps.start(schedule, noise) - alpha * x0) / sigma
        eps = torch.where(beyond.reshape_as(alpha), pure, noise)
        _, r = coefficients("sample", self.teacher.prediction_type, alpha, sigma)
        weight = (
            ((alpha + sigma) / (sigma * r)).square().flatten()
        )  # from the error of the prediction to the velocity's
        return weight * self.roles["student"].denoising_error(x0, t, eps, condition), {}
