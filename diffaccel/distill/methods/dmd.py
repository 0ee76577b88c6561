"""Distribution matching distillation (Yin et al. 2024: DMD, DMD2) and its relatives VSD, Diff-Instruct and LADD.

The student is moved along w·(D_critic − D_teacher) at noised student samples, where the critic is a denoiser of the
student's own distribution: an estimate of the gradient of KL(student ‖ teacher) (DMD, equation 7).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ...core.errors import UsageError, unknown
from ...models.denoiser import Condition
from ...training.method import Draw, Loss, Phase
from ..base import Distillation
from ..discriminator import FeatureDiscriminator
from ..pairs import PairCache
from ..task import Task
from ..updates import Update

WEIGHTINGS = ("normalized", "uniform", "vsd", "score")
TIMES = ("uniform", "log-normal")
GAN_LOSSES = ("logistic", "hinge")


class DMD(Distillation):
    """Roles: student, critic (denoiser of the student's samples), discriminator where one is needed.

    Attributes:
        through: whether gradients reach the samples through teacher and critic.
    """

    through = False

    @dataclass
    class Config(Distillation.Config):
        """Attributes:
        guidance_scale: classifier-free guidance of the teacher, folded into the student.
        student_steps: network evaluations of the student; from two on it is trained on its own earlier states.
        student_start: fraction of the schedule at which the student is called first; it sees pure noise there.
        preset: name in `diffaccel list methods`, whose settings lie under those that are given.
        critic_steps: critic updates per student update.
        critic_warmup: training steps at the start in which only the critic (and the discriminator) learn.
        time_range: fractions of the schedule's index between which the distributions are matched.
        time_sampling: "uniform" in the index, or "log-normal" in σ/α (Diff-Instruct).
        time_mean, time_std: of log σ/α under "log-normal".
        weighting: of the score difference: "normalized" by each sample's distance to the teacher's (DMD, equation 8),
            "uniform" (Diff-Instruct), "vsd" (α·σ, ProlificDreamer), "score" (α²/σ², the difference of the scores).
        distribution_weight: weight of the distribution matching loss; 0 with a GAN is LADD without a critic.
        gan_weight: weight of the student's adversarial loss; 0 needs no real data.
        gan_loss: "logistic" (DMD2) or "hinge" (LADD).
        r1_weight: weight of the discriminator's approximate R1 penalty (f-distill, appendix).
        regression_weight: weight of DMD's regression on trajectories of the teacher from noise to image.
        regression_pairs: number of such pairs, made before training and kept in the run folder.
        regression_steps: network evaluations of the teacher for each.
        """

        resting: ClassVar[tuple[str, ...]] = ("critic_warmup",)

        critic_steps: int = 1
        critic_warmup: int = 0
        time_range: tuple[float, ...] = (0.02, 0.98)
        time_sampling: str = "uniform"
        time_mean: float = -1.2
        time_std: float = 1.2
        weighting: str = "normalized"
        distribution_weight: float = 1.0
        gan_weight: float = 0.0
        gan_loss: str = "logistic"
        r1_weight: float = 0.0
        regression_weight: float = 0.0
        regression_pairs: int = 1000
        regression_steps: int = 20

        def __post_init__(self):
            super().__post_init__()
            for name in ("critic_steps", "regression_pairs", "regression_steps"):
                if getattr(self, name) < 1:
                    raise UsageError(f"method.{name} must be at least 1, got {getattr(self, name)}.")
            if len(self.time_range) != 2 or not 0.0 <= self.time_range[0] < self.time_range[1] <= 1.0:
                raise UsageError(f"method.time_range must be two rising fractions in [0, 1], got {self.time_range}.")
            for name in ("critic_warmup", "distribution_weight", "gan_weight", "r1_weight", "regression_weight"):
                if getattr(self, name) < 0:
                    raise UsageError(f"method.{name} must not be negative, got {getattr(self, name)}.")
            for name, known in (("weighting", WEIGHTINGS), ("time_sampling", TIMES), ("gan_loss", GAN_LOSSES)):
                if getattr(self, name) not in known:
                    raise unknown(f"method.{name}", getattr(self, name), known)
            if not (self.distribution_weight or self.gan_weight or self.regression_weight):
                raise UsageError("Nothing trains the student: all of its losses have the weight 0.")

    def __init__(self, task: Task, config: Config, seed: int = 0):
        super().__init__(task, config, seed)
        self.pairs: PairCache | None = None
        if self.needs_discriminator():
            if self.data is None:
                raise UsageError("A discriminator needs real images: give --data, or a method without one (dmd).")
            self.roles["discriminator"] = FeatureDiscriminator.of(self.teacher, self.conditions, seed)

    def networks(self):
        return ("student", "critic") if self.config.distribution_weight else ("student",)

    def needs_discriminator(self) -> bool:
        """Whether any loss uses the discriminator."""
        return self.config.gan_weight > 0

    def begin(self, folder):
        super().begin(folder)
        config = self.config
        if config.regression_weight:
            self.pairs = PairCache(
                folder / "pairs", self.task, self.real, config.regression_pairs, config.regression_steps, self.seed
            )

    def phases(self, step: int) -> list[Phase]:
        trained = tuple(name for name in self.roles if name != "student")
        critic = [Phase("critic", trained, self.config.critic_steps)] if trained else []
        return critic if step < self.config.critic_warmup else [*critic, Phase("student", ("student",))]

    def loss(self, phase: Phase, draw: Draw) -> Loss:
        return self._critic_loss(draw) if phase.name == "critic" else self._student_loss(draw)

    def updates(self, steps):
        return [
            self._student_update() if phase.name == "student" else self._critic_update(phase)
            for phase in self.phases(steps - 1)
        ]

    def _critic_update(self, phase: Phase) -> Update:
        evaluated = {"critic": 1, "discriminator": 3 if self.config.r1_weight > 0 else 2}
        graph = {name: evaluated[name] for name in phase.trains}
        return Update(phase.name, phase.trains, graph, {"student": (*self.earlier_calls, 1)}, repeats=phase.repeats)

    def _student_update(self) -> Update:
        config, kept, seen = self.config, [], []  # calls of the teacher with gradients and without
        judged, matched = "discriminator" in self.roles, config.distribution_weight > 0
        if judged:
            (kept if config.gan_weight > 0 else seen).append(1)
        if matched and not (judged and self.teacher_calls == 1 and not self.through):  # where one call gives both
            (kept if self.through else seen).append(self.teacher_calls)
        critic = {"critic": 1} if matched else {}
        graph = {"student": 2 if config.regression_weight else 1, "teacher": tuple(kept)}
        graph, beside = (
            graph | (critic if self.through else {}),
            {"teacher": tuple(seen)} | ({} if self.through else critic),
        )
        return Update("student", ("student",), graph, {"student": self.earlier_calls}, beside)

    # Hooks by which other methods vary this one.

    def sample_weight(self, u: torch.Tensor, logit: torch.Tensor | None, metrics: dict) -> torch.Tensor:
        """(B,) weight of each sample's score difference; ``u`` is the quantile of its time within ``time_range``."""
        return torch.ones_like(u, dtype=torch.float32)

    def matching_loss(self, x, t, u, condition, draw: Draw, metrics: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss whose gradient on the samples x is the weighted score difference, and the discriminator's logit."""
        x_t = self.teacher.noised(x, t, draw.normal("eps", self.teacher.sample_shape))
        real, logit = self.judged(x_t, t, condition)
        if not self.config.distribution_weight:
            return x.new_zeros(()), logit
        with torch.no_grad():
            real = self.real(x_t, t, condition) if real is None else real
            fake = self.roles["critic"](x_t, t, condition)
            each = tuple(range(1, x.ndim))
            distance = (x - real).abs().mean(each, keepdim=True)
            weight = self.sample_weight(u, logit, metrics).reshape(-1, *[1] * len(each))
            gradient = weight * self._weighting(distance, t) * (fake - real)
            self.watch(metrics, fake, real, distance)
        # The gradient of this loss with respect to x is exactly `gradient` / numel.
        return 0.5 * F.mse_loss(x, (x - gradient).detach()), logit

    def judged(self, x_t, t, condition) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The teacher's clean samples, where the discriminator's evaluation gives them too, and its logits."""
        if "discriminator" not in self.roles:
            return None, None
        with torch.set_grad_enabled(self.config.gan_weight > 0):
            real, features = self.teacher.forward_with_features(x_t, t, condition)
            logit = self.roles["discriminator"](features)
        same = self.real.denoiser is self.teacher and self.real.scale == 1.0
        return (real if same else None), logit

    @staticmethod
    def watch(metrics: dict, fake: torch.Tensor, real: torch.Tensor, distance: torch.Tensor) -> None:
        """Health of the matching: how far critic and teacher are apart, and the samples from the teacher."""
        difference = (fake - real).abs().mean()
        metrics["score_difference"] = difference
        metrics["distance_to_teacher"] = distance.mean()
        metrics["disagreement"] = difference / (distance.mean() + 1e-6)

    def times(self, draw: Draw, purpose: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Stratified quantiles u of the matched times within ``time_range``, and the times."""
        config, (low, high) = self.config, self.config.time_range
        u = draw.stratified(purpose)
        if config.time_sampling == "uniform":
            return u, self.schedule.time(low + (high - low) * u)
        rho = torch.exp(config.time_mean + config.time_std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))
        ends = self.schedule.time(torch.tensor([low, high], device=u.device))
        return u, self.schedule.t_from_rho(rho).clamp(*ends.tolist())

    def _weighting(self, distance: torch.Tensor, t: torch.Tensor) -> torch.Tensor | float:
        if self.config.weighting == "normalized":
            return 1.0 / (distance + 1e-6)
        if self.config.weighting == "uniform":
            return 1.0
        alpha, sigma = self.teacher.level(t)
        return alpha * sigma if self.config.weighting == "vsd" else (alpha / sigma) ** 2

    # Losses.

    def _critic_loss(self, draw: Draw) -> Loss:
        x, condition = self.student_sample(draw, grad=False)
        metrics = self.health(x)
        total = x.new_zeros(())
        if "critic" in self.roles:
            t = self.schedule.time(draw.stratified("time"))
            eps = draw.normal("eps", self.teacher.sample_shape)
            total = self.roles["critic"].denoising_error(x, t, eps, condition).mean()
            metrics["denoising"] = total.detach()
        if "discriminator" in self.roles:
            total = total + self._discriminator_loss(draw, x, condition, metrics)
        return Loss(total, metrics)

    def _discriminator_loss(self, draw: Draw, x: torch.Tensor, condition: Condition | None, metrics: dict):
        """GAN loss on real and generated samples noised to the times that the student is matched at."""
        discriminator, shape = self.roles["discriminator"], self.teacher.sample_shape
        u, t = self.times(draw, "gan")
        real, real_condition = self.data.batch(draw)
        real_t = self.teacher.noised(real, t, draw.normal("real-eps", shape))
        fake_t = self.teacher.noised(x, t, draw.normal("fake-eps", shape))
        with torch.no_grad():
            _, real_features = self.teacher.forward_with_features(real_t, t, real_condition)
            _, fake_features = self.teacher.forward_with_features(fake_t, t, condition)
        real_logit, fake_logit = discriminator(real_features), discriminator(fake_features)
        right = 0.5 * ((real_logit > 0).float() + (fake_logit < 0).float()).detach()
        metrics["discriminator_accuracy"] = right.mean()
        # Near pure noise the two distributions coincide and 0.5 is right; what is learnt shows at the clean end.
        # Times are stratified over the whole batch, so a fifth of it is clean, however it is split.
        metrics["discriminator_accuracy_clean_fifth"] = (right * (u < 0.2).float()).mean() / 0.2
        if self.config.gan_loss == "hinge":
            total = F.relu(1.0 - real_logit).mean() + F.relu(1.0 + fake_logit).mean()
        else:
            total = F.softplus(-real_logit).mean() + F.softplus(fake_logit).mean()
        if self.config.r1_weight > 0:
            with torch.no_grad():
                near_t = real_t + 0.1 * draw.normal("r1", shape)
                _, near_features = self.teacher.forward_with_features(near_t, t, real_condition)
            total = total + self.config.r1_weight * F.mse_loss(discriminator(near_features), real_logit)
        return total

    def _student_loss(self, draw: Draw) -> Loss:
        config, metrics = self.config, {}
        x, condition = self.student_sample(draw, grad=True)
        u, t = self.times(draw, "time")
        matching, logit = self.matching_loss(x, t, u, condition, draw, metrics)
        total = config.distribution_weight * matching
        if config.gan_weight > 0:
            adversarial = -logit.mean() if config.gan_loss == "hinge" else F.softplus(-logit).mean()
            total = total + config.gan_weight * adversarial
            metrics["adversarial"] = adversarial.detach()
        if self.pairs is not None:
            noise, target, paired = self.pairs.batch(draw)
            x_paired = self.generate(
                self.roles["student"], noise, paired, lambda step: draw.normal(f"pair{step}", x.shape[1:])
            )
            regression = F.mse_loss(x_paired, target)
            total = total + config.regression_weight * regression
            metrics["regression"] = regression.detach()
        return Loss(total, metrics)
