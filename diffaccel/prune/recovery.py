"""Recovery of a pruned model: it learns what the whole one predicts, and what goes on inside it, at states of that model.

The losses are those of LAPTOP-Diff (Zhang et al. 2024, arXiv 2404.11098) on BK-SDM's blocks (Kim et al. 2024,
arXiv 2305.15798): of the output, of the features at the end of every block, and of the task itself if wanted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..core.errors import UsageError, unknown
from ..core.prediction import coefficients
from ..core.rng import KeyedRandom
from ..models.data import RealImages
from ..models.denoiser import Condition, NetworkDenoiser
from ..training.checks import check_at_least, check_shares
from ..training.method import Draw, Loss, Method, Phase
from .replacements import Replacement
from .states import DrawnStates

FEATURES = {
    "normalized": "squared error of every block's features over their mean square in the whole model",
    "plain": "mean squared error of every block's features, as BK-SDM",
    "none": "no features, the output alone",
}
"""What is asked of the features, in words."""
_CHECKED = 64  # states of the validation loss


class Recovery(Method):
    """Output and feature distillation from the whole network to the pruned one. Role: student.

    Args:
        student: the pruned model; trained in place.
        teacher: the whole model; frozen.
        conditions: of the samples, see `states.recoverable`.
        data: real images in place of samples that the teacher draws.
        config: settings.
        seed: of the samples.
        show: draws the pictures of a run with a network: (N, C, H, W) in [−1, 1]; None for none.
        save: writes a network's pipeline into an empty folder.
        batch_size: samples that the teacher draws, and is compared on, at once.

    Raises:
        UsageError: models with features of different number.
    """

    main_role = "student"

    @dataclass
    class Config:
        """Attributes:
        features: what is asked of them, one of `FEATURES`.
        output_weight: of the mean squared difference of both predictions.
        feature_weight: of the sum of the feature losses of all blocks.
        denoising_weight: of the loss that the model was trained with in the first place; its target is the teacher's
            prediction plus noise where the states are the teacher's own, so 0 unless there are real images.
        guidance_scale: of the samples that the teacher draws.
        null_probability: share of samples with the null condition, which guidance needs.
        pool: samples that the teacher draws once; 0 with real images.
        pool_steps: network calls of the solver that draws them.
        """

        features: str = "normalized"
        output_weight: float = 1.0
        feature_weight: float = 1.0
        denoising_weight: float = 0.0
        guidance_scale: float = 1.0
        null_probability: float = 0.1
        pool: int = 1024
        pool_steps: int = 20

        def __post_init__(self):
            if self.features not in FEATURES:
                raise unknown("method.features", self.features, FEATURES)
            check_at_least(
                0,
                output_weight=self.output_weight,
                feature_weight=self.feature_weight,
                denoising_weight=self.denoising_weight,
            )
            check_at_least(1, pool=self.pool)
            check_at_least(2, pool_steps=self.pool_steps)
            check_shares(null_probability=self.null_probability)
            if not self.output_weight + self.feature_weight + self.denoising_weight:
                raise UsageError("All weights of the recovery's losses are 0; set method.output_weight=1.")

    def __init__(
        self,
        student: NetworkDenoiser,
        teacher: NetworkDenoiser,
        conditions: Condition | None,
        data: RealImages | None,
        config: Config,
        seed: int,
        show: Callable[[nn.Module], torch.Tensor | None],
        save: Callable[[nn.Module, Path], None],
        batch_size: int = 64,
    ):
        self.config, self._show, self._save, self.batch_size = config, show, save, batch_size
        self.teacher = teacher.eval().requires_grad_(False)
        self.roles = {"student": student.requires_grad_(True)}
        modules = student.feature_modules()
        if len(modules) != len(teacher.feature_modules()):
            raise UsageError(
                f"A pruned model recovers from the one it was made of; {len(modules)} blocks of the one do not correspond "
                f"to {len(teacher.feature_modules())} of the other."
            )
        # What goes on in a block that is gone is nobody's to learn.
        self.blocks = [index for index, module in enumerate(modules) if not isinstance(module, Replacement)]
        self.data = data or DrawnStates(
            self.teacher, conditions, config.pool, config.pool_steps, config.guidance_scale, seed, batch_size
        )

    def to(self, device):
        self.teacher.to(device)

    def phases(self, step: int) -> list[Phase]:
        return [Phase("recover", ("student",))]

    def loss(self, phase: Phase, draw: Draw) -> Loss:
        x0, condition = self.data.batch(draw)
        condition = self._dropped(condition, draw.uniform("null") < self.config.null_probability)
        t = self.teacher.schedule.time(draw.stratified("time"))
        return self._loss(self.roles["student"], x0, t, draw.normal("eps", self.teacher.sample_shape), condition)

    def _loss(self, student: NetworkDenoiser, x0, t, eps, condition: Condition | None) -> Loss:
        config = self.config
        x_t = self.teacher.noised(x0, t, eps)
        wanted = config.features != "none" and config.feature_weight > 0
        with torch.no_grad():
            target, theirs = _evaluated(self.teacher, wanted, x_t, t, condition)
        prediction, ours = _evaluated(student, wanted, x_t, t, condition)
        output = (prediction - target).square().mean()
        total, metrics = config.output_weight * output, {"output": output.detach()}
        if wanted:
            distance = normalized_distance if config.features == "normalized" else plain_distance
            parts = torch.stack([distance(ours[index], theirs[index]) for index in self.blocks])
            total = total + config.feature_weight * parts.sum()
            metrics["features"] = parts.sum().detach()
        if config.denoising_weight:
            p, r = coefficients("sample", student.prediction_type, *student.level(t))
            denoising = (prediction - (p * x_t + r * x0)).square().mean()
            total = total + config.denoising_weight * denoising
            metrics["denoising"] = denoising.detach()
        return Loss(total, metrics)

    def _dropped(self, condition: Condition | None, drop: torch.Tensor) -> Condition | None:
        null = self.teacher.null_condition(len(drop))
        if condition is None or null is None:
            return condition
        return {
            name: torch.where(drop.reshape(-1, *[1] * (rows.ndim - 1)), null[name].to(rows), rows)
            for name, rows in condition.items()
        }

    @torch.no_grad()
    def validate(self, model: NetworkDenoiser) -> dict[str, float]:
        """Mean squared difference of both predictions at states that are always the same."""
        device, total = next(model.parameters()).device, 0.0
        for start in range(0, _CHECKED, self.batch_size):
            count = min(self.batch_size, _CHECKED - start)
            draw = Draw(KeyedRandom(0), "validation", 0, start, count, _CHECKED, device)
            x0, condition = self.data.batch(draw)
            t = self.teacher.schedule.time(draw.stratified("time"))
            x_t = self.teacher.noised(x0, t, draw.normal("eps", self.teacher.sample_shape))
            ours, theirs = (one.predict(x_t, t, condition).float() for one in (model, self.teacher))
            total += float((ours - theirs).square().mean()) * count
        return {"output": total / _CHECKED}

    def samples(self, model: NetworkDenoiser, random: KeyedRandom) -> torch.Tensor | None:
        return self._show(model.net)

    def export(self, model: NetworkDenoiser, folder: Path) -> None:
        self._save(model.net, folder)


def plain_distance(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of features (B, C, h, w)."""
    return (ours - theirs).square().mean()


def normalized_distance(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Mean over samples of ‖ours − theirs‖² / ‖theirs‖², for features (B, C, h, w).

    Features of different blocks differ by orders of magnitude, so that plain losses learn those of few blocks; relative to
    the whole model's own squared norm all count alike (Zhang et al. 2024). 1 where ours are zero.
    """
    squares = theirs.square().flatten(1).sum(1)
    return ((ours - theirs).square().flatten(1).sum(1) / squares.clamp_min(torch.finfo(squares.dtype).tiny)).mean()


def _evaluated(model: NetworkDenoiser, features: bool, *arguments) -> tuple[torch.Tensor, list[torch.Tensor]]:
    if features:
        prediction, found = model.predict_with_features(*arguments)
        return prediction.float(), found
    return model.predict(*arguments).float(), []
