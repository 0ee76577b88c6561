"""Consistency distillation (Song et al. 2023), latent consistency models (Luo et al. 2023), SCott (Liu et al. 2024).

A student f that maps every state of a trajectory to its clean end is taught by itself: f at t_n is to be what f at the cleaner
t_m is, where the teacher carries the state from t_n to t_m. SCott's teacher does so by a reverse SDE in several sub-steps, and
a discriminator judges the result.

Noise and a squared error make f(x_t) the mean of the targets, and over the grid that averages away: for η = 1 the student
tends to E[x0 | x_t], a blur, not to the map of the flow. Little noise, a coarse grid and the discriminator keep the
spread; ``one_step_std_ratio``, logged with every picture, shows what is left of it (1 is right).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...core.errors import UsageError, unknown
from ...core.grids import make_grid
from ...core.rng import KeyedRandom
from ...models.denoiser import Condition, NetworkDenoiser
from ...samplers.few_step import FewStep
from ...training.method import Draw, Loss, Phase
from ..base import Distillation
from ..discriminator import FeatureDiscriminator
from ..substeps import check_noise, solve_between
from ..task import Task
from ..updates import Update

GRID_KINDS = ("trailing", "karras")
METRICS = ("huber", "l2")
HUBER = 1e-3  # c of LCM's √(difference² + c²) − c
ONE_STEP = 64  # samples whose spread is looked at


class Consistency(Distillation):
    """Roles: student, and discriminator where the loss has an adversarial term. The target network is state.

    Raises:
        UsageError: no real samples.
    """

    @dataclass
    class Config(Distillation.Config):
        """Attributes:
        guidance_scale: classifier-free guidance of the teacher, folded into the student; LCM's w is guidance_scale − 1.
        student_steps: network evaluations of the student, spread evenly over the grid as LCM's sampler does; between
            them its clean sample is noised afresh.
        student_start: 1; a consistency model starts from pure noise.
        preset: "cd", "lcm-lora" or "scott": settings of these papers that differ from the defaults, which are LCM's.
        grid: times between which the student is made consistent: "trailing" (uniform in the schedule's index, LCM) or
            "karras" (ρ = 7 in the noise level, CD).
        grid_steps: their number N; 50 of 1000 is LCM's skip of 20.
        substeps: evaluations of the teacher from one of them to the next (SCott's h).
        eta: strength of the noise of these sub-steps in [0, 1]; 0 is the probability flow (CD, LCM).
        noise_family: how that noise falls with the step: "ddim" (DDIM's η, 1 is DDPM), "er-sde-1.5", "er-sde-2.5",
            "er-sde-5" (ER-SDE solvers; SCott's best is the last) or "ctm" (η is CTM's γ).
        metric: distance of the two clean samples, "huber" (LCM) or "l2".
        boundary: how quickly f leaves the identity at the clean end, per unit of time: 10 with times 0 … 999 (LCM); 1
            where times are noise levels (CD).
        sigma_data: scale of the data in f.
        target_decay: decay per step of the moving average that gives the targets; 0 for the student itself (LCM-LoRA).
        adversarial_weight: weight of the discriminator's hinge loss on clean samples; 0.4 in SCott.
        adversarial_time: fraction of the schedule's index to which samples are noised before the frozen teacher's
            features are taken for the discriminator; small, for it judges clean samples.
        """

        student_steps: int = 4
        grid: str = "trailing"
        grid_steps: int = 50
        substeps: int = 1
        eta: float = 0.0
        noise_family: str = "ddim"
        metric: str = "huber"
        boundary: float = 10.0
        sigma_data: float = 0.5
        target_decay: float = 0.95
        adversarial_weight: float = 0.0
        adversarial_time: float = 0.05

        def __post_init__(self):
            super().__post_init__()
            for name in ("grid_steps", "substeps"):
                if getattr(self, name) < 1:
                    raise UsageError(f"method.{name} must be at least 1, got {getattr(self, name)}.")
            for name, known in (("grid", GRID_KINDS), ("metric", METRICS)):
                if getattr(self, name) not in known:
                    raise unknown(f"method.{name}", getattr(self, name), known)
            check_noise(self.eta, self.noise_family)
            if not self.boundary > 0 or not self.sigma_data > 0:
                raise UsageError(
                    f"method.boundary and method.sigma_data must be positive, got {self.boundary} and {self.sigma_data}."
                )
            if not 0.0 <= self.target_decay < 1.0:
                raise UsageError(f"method.target_decay must be in [0, 1), got {self.target_decay}.")
            if not self.adversarial_weight >= 0:
                raise UsageError(f"method.adversarial_weight must not be negative, got {self.adversarial_weight}.")
            if not 0.0 <= self.adversarial_time <= 1.0:
                raise UsageError(f"method.adversarial_time must be in [0, 1], got {self.adversarial_time}.")
            if self.student_start != 1.0:
                raise UsageError(
                    f"A consistency model starts from pure noise: method.student_start must be 1, got {self.student_start}."
                )
            if self.student_steps > self.grid_steps:
                raise UsageError(
                    f"method.student_steps {self.student_steps} is more than the {self.grid_steps} of method.grid_steps."
                )

    def __init__(self, task: Task, config: Config, seed: int = 0):
        super().__init__(task, config, seed)
        if self.data is None:
            raise UsageError(
                "Consistency distillation needs samples: give --data, teacher:2000 for such as the teacher draws, or a "
                "method without (dmd)."
            )
        self.intervals = self._times().unfold(0, config.substeps + 1, config.substeps)  # (N, h + 1), noisiest first
        self.target: NetworkDenoiser | None = None
        if config.target_decay > 0:
            self.target = self.roles["student"].clone().eval().requires_grad_(False)
        if config.adversarial_weight > 0:
            self.roles["discriminator"] = FeatureDiscriminator.of(self.teacher, self.conditions, seed)

    def student_schedule(self):
        config = self.config
        starts = self._times()[: -1 : config.substeps].tolist()
        steps = FewStep(tuple(starts), "fresh", config.boundary, config.sigma_data)
        return steps.fewer(config.student_steps)

    def _times(self) -> torch.Tensor:
        """(N·h + 1,) times of the sub-steps, from pure noise to the cleanest."""
        config, shift = self.config, self.task.scheduler_config.get("shift") or 1.0
        count = config.grid_steps * config.substeps
        grid = make_grid(self.schedule, count, config.grid, end="sigma_min", shift=shift)
        return torch.tensor(grid.times, dtype=torch.float64).clamp(min=self.schedule.t_min)

    def to(self, device):
        super().to(device)
        self.intervals = self.intervals.to(device)
        if self.target is not None:
            self.target.to(device)

    def frozen(self):
        return super().frozen() | ({} if self.target is None else {"target": self.target})

    def updates(self, steps):
        found, graph = [], {"student": 1}
        if "discriminator" in self.roles:
            found = [Update("discriminator", ("discriminator",), {"discriminator": 2}, {"student": 1})]
            graph |= {"teacher": 1}
        target = {"student" if self.target is None else "target": 1}
        return [
            *found,
            Update(
                "student", ("student",), graph, {}, {"teacher": (self.teacher_calls,) * self.config.substeps} | target
            ),
        ]

    def phases(self, step: int) -> list[Phase]:
        student = Phase("student", ("student",))
        return [Phase("discriminator", ("discriminator",)), student] if "discriminator" in self.roles else [student]

    def loss(self, phase: Phase, draw: Draw) -> Loss:
        real, condition = self.data.batch(draw)
        times = self.intervals[(draw.stratified("interval") * len(self.intervals)).long()]
        x_t = self.teacher.noised(real, times[:, 0], draw.normal("eps", self.teacher.sample_shape))
        if phase.name == "discriminator":
            return self._discriminator_loss(draw, real, x_t, times[:, 0], condition)
        x = self.clean(self.roles["student"], x_t, times[:, 0], condition)
        error = self._distance(x, self._target(draw, x_t, times, condition))
        metrics = self.health(x.detach()) | {"consistency": error.detach()}
        total = error
        if "discriminator" in self.roles:
            adversarial = -self._judged(draw, x, condition, "fake-eps").mean()
            metrics["adversarial"] = adversarial.detach()
            total = total + self.config.adversarial_weight * adversarial
        return Loss(total, metrics)

    def clean(self, model: NetworkDenoiser, x_t: torch.Tensor, t: torch.Tensor, condition: Condition | None):
        """f: the clean sample of states (B, …) at times (B,); the states themselves at the cleanest time."""
        return self.steps.consistency(self.schedule, x_t, model(x_t, t, condition), t)

    @torch.no_grad()
    def _target(self, draw: Draw, x_t: torch.Tensor, times: torch.Tensor, condition: Condition | None) -> torch.Tensor:
        def normal(step: int) -> torch.Tensor:
            return draw.normal(f"substep{step}", self.teacher.sample_shape)

        x_m = solve_between(self.real, x_t, times, condition, self.config.eta, self.config.noise_family, normal)
        model = self.roles["student"] if self.target is None else self.target
        return self.clean(model, x_m, times[:, -1], condition)

    def _distance(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.config.metric == "l2":
            return F.mse_loss(x, target)
        return (((x - target).square() + HUBER**2).sqrt() - HUBER).mean()

    def _discriminator_loss(self, draw: Draw, real, x_t, t, condition: Condition | None) -> Loss:
        with torch.no_grad():
            x = self.clean(self.roles["student"], x_t, t, condition)
        real_logit, fake_logit = (
            self._judged(draw, sample, condition, purpose) for sample, purpose in ((real, "real-eps"), (x, "fake-eps"))
        )
        right = 0.5 * ((real_logit > 0).float() + (fake_logit < 0).float())
        total = F.relu(1.0 - real_logit).mean() + F.relu(1.0 + fake_logit).mean()
        return Loss(total, {"accuracy": right.mean()})

    def _judged(self, draw: Draw, x: torch.Tensor, condition: Condition | None, purpose: str) -> torch.Tensor:
        """The discriminator's logits (B,) of clean samples."""
        t = self.schedule.time(torch.full((len(x),), self.config.adversarial_time, device=x.device))
        x_t = self.teacher.noised(x, t, draw.normal(purpose, self.teacher.sample_shape))
        _, features = self.teacher.forward_with_features(x_t, t, condition)
        return self.roles["discriminator"](features)

    @torch.no_grad()
    def end_step(self, step: int) -> None:
        if self.target is None:
            return
        for own, source in zip(self.target.parameters(), self.roles["student"].parameters(), strict=True):
            own.lerp_(source, 1.0 - self.config.target_decay)

    def extra_state(self) -> dict[str, torch.Tensor]:
        return {} if self.target is None else self.target.state_dict()

    def load_extra_state(self, state) -> None:
        if self.target is not None:
            self.target.load_state_dict(state)

    @torch.no_grad()
    def validate(self, model: NetworkDenoiser) -> dict[str, float]:
        """Spread of what one evaluation from pure noise gives, over that of real samples."""
        device = next(model.parameters()).device
        index = self.conditions.in_turn(0, ONE_STEP, device)
        noise = KeyedRandom(0).normal("one-step", 0, 0, ONE_STEP, model.sample_shape).to(device)
        x = self.generate(model, noise, self.conditions.at(index), evaluations=1)
        return {f"one_step_{name}": float(self.health(x)[name]) for name in ("std_ratio", "drift")}
