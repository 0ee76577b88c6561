"""Distribution matching distillation of a one-step student (Yin et al. 2024: DMD, DMD2).

The student is moved along w·(D_critic − D_teacher) at noised student samples, where the critic is a denoiser of the
student's own distribution: an estimate of the gradient of KL(student ‖ teacher) (DMD, equation 7).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ...core.errors import UsageError
from ...core.rng import KeyedRandom, seeded
from ...models.data import RealImages
from ...models.denoiser import Condition, Guided, NetworkDenoiser
from ...models.pipeline import ClassConditionalPipeline
from ...samplers.scheduler import DDIMScheduler
from ...training.method import Draw, Loss, Method, Phase
from ..discriminator import FeatureDiscriminator


class DMD(Method):
    """Roles: student, critic (denoiser of the student's samples), discriminator where one is needed.

    Args:
        teacher: frozen model; student and critic start as its copies.
        scheduler_config: diffusers configuration of the teacher's scheduler, carried into the exported student.
        data: real images, for the discriminator only.
        config: settings.
        seed: of initial weights that are not the teacher's.
    """

    main_role = "student"

    @dataclass
    class Config:
        """Attributes:
        guidance_scale: classifier-free guidance of the teacher, folded into the student.
        critic_steps: critic updates per student update.
        critic_warmup: training steps at the start in which only the critic (and the discriminator) learn.
        time_range: fractions of the schedule's index between which the distributions are matched.
        gan_weight: weight of the student's adversarial loss; 0 needs no real data.
        r1_weight: weight of the discriminator's approximate R1 penalty (f-distill, appendix).
        """

        guidance_scale: float = 1.0
        critic_steps: int = 1
        critic_warmup: int = 0
        time_range: tuple[float, ...] = (0.02, 0.98)
        gan_weight: float = 0.0
        r1_weight: float = 0.0

        def __post_init__(self):
            if self.critic_steps < 1:
                raise UsageError(f"method.critic_steps must be at least 1, got {self.critic_steps}.")
            if len(self.time_range) != 2 or not 0.0 <= self.time_range[0] < self.time_range[1] <= 1.0:
                raise UsageError(f"method.time_range must be two rising fractions in [0, 1], got {self.time_range}.")
            for name in ("critic_warmup", "gan_weight", "r1_weight"):
                if getattr(self, name) < 0:
                    raise UsageError(f"method.{name} must not be negative, got {getattr(self, name)}.")

    def __init__(
        self,
        teacher: NetworkDenoiser,
        scheduler_config: dict,
        data: RealImages | None,
        config: Config,
        seed: int = 0,
    ):
        self.config, self.data = config, data
        # One step from the noisiest time to the clean end, whatever else the teacher's scheduler was set to.
        self.scheduler = DDIMScheduler.from_config(
            scheduler_config,
            timestep_spacing="trailing",
            grid=None,
            use_karras_sigmas=False,
            use_exponential_sigmas=False,
            final_sigmas_type="zero",
            set_alpha_to_one=True,
            clip_sample=False,
            thresholding=False,
            eta=0.0,
        )
        if config.guidance_scale != 1.0 and teacher.null_condition(1) is None:
            raise UsageError("method.guidance_scale needs a teacher with classes and a null class.")
        self.teacher = teacher.eval().requires_grad_(False)
        self.real = Guided(self.teacher, config.guidance_scale)
        self.schedule = teacher.schedule
        self.roles: dict[str, nn.Module] = {
            name: teacher.clone().requires_grad_(True) for name in ("student", "critic")
        }
        if self.needs_discriminator():
            if data is None:
                raise UsageError("A discriminator needs real images: give --data, or a method without one (dmd).")
            self.roles["discriminator"] = self._new_discriminator(seed)

    def needs_discriminator(self) -> bool:
        """Whether any loss uses the discriminator."""
        return self.config.gan_weight > 0

    def to(self, device):
        self.teacher.to(device)

    def phases(self, step: int) -> list[Phase]:
        trained = tuple(name for name in self.roles if name != "student")
        critic = Phase("critic", trained, self.config.critic_steps)
        return [critic] if step < self.config.critic_warmup else [critic, Phase("student", ("student",))]

    def loss(self, phase: Phase, draw: Draw) -> Loss:
        return self._critic_loss(draw) if phase.name == "critic" else self._student_loss(draw)

    # Hooks by which other methods vary this one.

    def conditions(self, draw: Draw) -> Condition | None:
        """Conditions of one micro-batch of student samples; uniform over the classes."""
        if self.teacher.num_classes is None:
            return None
        return {"class_labels": draw.integers("labels", self.teacher.num_classes)}

    def sample_weight(self, u: torch.Tensor, logit: torch.Tensor | None, metrics: dict) -> torch.Tensor:
        """(B,) weight of each sample's score difference; ``u`` is the time as a fraction of the schedule."""
        return torch.ones_like(u, dtype=torch.float32)

    # Sampling and export.

    def generate(self, model: NetworkDenoiser, noise: torch.Tensor, condition: Condition | None) -> torch.Tensor:
        """One network evaluation at the noisiest time: (B, …) standard normal noise → (B, …) samples."""
        t = torch.full((len(noise),), self.schedule.t_max, device=noise.device)
        return model(noise * self.schedule.initial_scale, t, condition)

    def samples(self, model: NetworkDenoiser, random: KeyedRandom) -> torch.Tensor:
        """A fixed 10 × 10 sheet; one class a row where there are classes."""
        device = next(model.parameters()).device
        noise = random.normal("picture", 0, 0, 100, model.sample_shape).to(device)
        classes = self.teacher.num_classes
        labels = torch.arange(100, device=device) // 10
        return self.generate(model, noise, {"class_labels": labels % classes} if classes else None)

    def export(self, model: NetworkDenoiser, folder: Path) -> None:
        ClassConditionalPipeline.of(model.net, self.scheduler, num_inference_steps=1).save_pretrained(folder)

    # Losses.

    def _times(self, draw: Draw, purpose: str, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Fractions u of the schedule, stratified over the batch, and their times."""
        u = low + (high - low) * draw.stratified(purpose)
        return u, self.schedule.time(u)

    def _critic_loss(self, draw: Draw) -> Loss:
        condition = self.conditions(draw)
        with torch.no_grad():
            x = self.generate(self.roles["student"], draw.normal("latent", self.teacher.sample_shape), condition)
        _, t = self._times(draw, "time", 0.0, 1.0)
        eps = draw.normal("eps", self.teacher.sample_shape)
        total = denoising = self.roles["critic"].denoising_error(x, t, eps, condition).mean()
        metrics = {"denoising": denoising.detach(), "sample_std": x.std(correction=0)}
        if "discriminator" in self.roles:
            total = total + self._discriminator_loss(draw, x, condition, metrics)
        return Loss(total, metrics)

    def _discriminator_loss(self, draw: Draw, x: torch.Tensor, condition: Condition | None, metrics: dict):
        """Logistic loss on real and generated samples noised to the times that the student is matched at."""
        discriminator, shape = self.roles["discriminator"], self.teacher.sample_shape
        low, high = self.config.time_range
        u, t = self._times(draw, "gan", low, high)
        real, real_condition = self.data.batch(draw)
        real_t = self.teacher.noised(real, t, draw.normal("real-eps", shape))
        fake_t = self.teacher.noised(x, t, draw.normal("fake-eps", shape))
        with torch.no_grad():
            _, real_features = self.teacher.forward_with_features(real_t, t, real_condition)
            _, fake_features = self.teacher.forward_with_features(fake_t, t, condition)
        real_logit, fake_logit = discriminator(real_features), discriminator(fake_features)
        right = 0.5 * ((real_logit > 0).float() + (fake_logit < 0).float()).detach()
        metrics["discriminator_accuracy"] = right.mean()
        clean = (u < low + 0.2 * (high - low)).float()
        # Near pure noise the two distributions coincide and 0.5 is right; what is learnt shows at the clean end.
        # Times are stratified over the whole batch, so a fifth of it is clean, however it is split.
        metrics["discriminator_accuracy_clean_fifth"] = (right * clean).mean() / 0.2
        total = F.softplus(-real_logit).mean() + F.softplus(fake_logit).mean()
        if self.config.r1_weight > 0:
            with torch.no_grad():
                near_t = real_t + 0.1 * draw.normal("r1", shape)
                _, near_features = self.teacher.forward_with_features(near_t, t, real_condition)
            total = total + self.config.r1_weight * F.mse_loss(discriminator(near_features), real_logit)
        return total

    def _student_loss(self, draw: Draw) -> Loss:
        condition, config = self.conditions(draw), self.config
        x = self.generate(self.roles["student"], draw.normal("latent", self.teacher.sample_shape), condition)
        u, t = self._times(draw, "time", *config.time_range)
        x_t = self.teacher.noised(x, t, draw.normal("eps", self.teacher.sample_shape))
        logit = real = None
        if "discriminator" in self.roles:
            with torch.set_grad_enabled(config.gan_weight > 0):
                real, features = self.teacher.forward_with_features(x_t, t, condition)
                logit = self.roles["discriminator"](features)
        metrics: dict[str, torch.Tensor | float] = {}
        with torch.no_grad():
            if real is None or config.guidance_scale != 1.0:
                real = self.real(x_t, t, condition)
            fake = self.roles["critic"](x_t, t, condition)
            each = tuple(range(1, x.ndim))
            normalizer = (x - real).abs().mean(each, keepdim=True) + 1e-6  # DMD, equation 8
            weight = self.sample_weight(u, logit, metrics).reshape(-1, *[1] * len(each))
            gradient = weight * (fake - real) / normalizer
            metrics["score_difference"] = (fake - real).abs().mean()
            metrics["distance_to_teacher"] = normalizer.mean()
        # The gradient of this loss with respect to x is exactly `gradient` / numel.
        total = 0.5 * F.mse_loss(x, (x - gradient).detach())
        if config.gan_weight > 0:
            adversarial = F.softplus(-logit).mean()
            total = total + config.gan_weight * adversarial
            metrics["adversarial"] = adversarial.detach()
        return Loss(total, metrics)

    def _new_discriminator(self, seed: int) -> FeatureDiscriminator:
        parameter = next(self.teacher.parameters())
        x = torch.zeros(1, *self.teacher.sample_shape, device=parameter.device)
        with torch.no_grad():
            _, features = self.teacher.forward_with_features(
                x, torch.ones(1, device=x.device), self.teacher.null_condition(1)
            )
        with seeded(seed):
            return FeatureDiscriminator([f.shape[1] for f in features])
