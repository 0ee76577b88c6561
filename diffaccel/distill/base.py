"""What all distillation methods share: teacher and guidance, the student's steps, its samples and its export."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from ..core.errors import UsageError
from ..core.rng import KeyedRandom
from ..models.conditions import PromptConditions
from ..models.denoiser import Condition, Guided, NetworkDenoiser
from ..models.prompts import save_prompts
from ..samplers.few_step import FewStep, FewStepScheduler
from ..training.method import Draw, Method
from .pairs import solve
from .task import Task
from .updates import Update

PICTURES = 100  # of a sheet
REFERENCES, REFERENCE_STEPS = 32, 10  # samples of the teacher whose spread a student's is compared with


class Distillation(Method):
    """Base of the methods: a student that needs a few network evaluations, taught by a frozen teacher.

    Args:
        task: what is distilled.
        config: settings.
        seed: of initial weights that are not the teacher's.

    Raises:
        UsageError: guidance of a teacher that has no null condition.
    """

    main_role = "student"

    @dataclass
    class Config:
        """Attributes:
        guidance_scale: classifier-free guidance of the teacher, folded into the student.
        student_steps: network evaluations of the student.
        student_start: fraction of the schedule at which the student is called first; it sees pure noise there.
        preset: name in `diffaccel list methods`, whose settings lie under those that are given.
        """

        resting: ClassVar[tuple[str, ...]] = ()  # settings that count steps at the start in which the student rests

        guidance_scale: float = 1.0
        student_steps: int = 1
        student_start: float = 1.0
        preset: str = ""

        def resting_steps(self) -> int:
            """Training steps at the start in which the student does not learn."""
            return sum(getattr(self, name) for name in self.resting)

        def __post_init__(self):
            if self.student_steps < 1:
                raise UsageError(f"method.student_steps must be at least 1, got {self.student_steps}.")
            if not 0.0 < self.student_start <= 1.0:
                raise UsageError(f"method.student_start must be in (0, 1], got {self.student_start}.")

    def __init__(self, task: Task, config: Config, seed: int = 0):
        self.task, self.config, self.seed = task, config, seed
        self.teacher = task.teacher.eval().requires_grad_(False)
        if config.guidance_scale != 1.0 and self.teacher.null_condition(1) is None:
            raise UsageError("method.guidance_scale needs a teacher that knows an empty condition; set it to 1.")
        self.schedule, self.conditions, self.data = self.teacher.schedule, task.conditions, task.data
        self.real = self.guided(self.teacher)
        self.steps = self.student_schedule()
        self._real_moments: tuple[float, float] | None = None
        self.roles: dict[str, nn.Module] = {name: task.trainable(name) for name in self.networks()}

    def networks(self) -> tuple[str, ...]:
        """Roles that start as the teacher."""
        return ("student",)

    def student_schedule(self) -> FewStep:
        """The times at which the student is called and what happens between them."""
        config, shift = self.config, self.task.scheduler_config.get("shift") or 1.0
        return FewStep.trailing(self.schedule, config.student_steps, shift=shift, start=config.student_start)

    def frozen(self) -> dict[str, NetworkDenoiser]:
        """Networks beside the roles that are evaluated but not trained, by name, the teacher among them."""
        return {"teacher": self.teacher}

    def guided(self, denoiser: NetworkDenoiser) -> Guided:
        """A teacher under the guidance that is folded into the student."""
        return Guided(denoiser, self.config.guidance_scale)

    def to(self, device):
        self.teacher.to(device)

    def begin(self, folder: Path) -> None:
        if hasattr(self.data, "begin"):  # the teacher's own samples, drawn now
            self.data.begin(self, folder)
        self._real_moments = self._reference_moments()

    def health(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of the student's samples beside real ones, or the teacher's: spread, its ratio, and drift of the mean."""
        std = x.std(correction=0)
        metrics = {"sample_std": std}
        if self._real_moments is not None:
            mean, scale = self._real_moments
            metrics |= {"std_ratio": std / scale, "drift": (x.mean() - mean).abs() / scale}
        return metrics

    @torch.no_grad()
    def _reference_moments(self) -> tuple[float, float]:
        """Mean and standard deviation of real samples, or of a few that the teacher draws."""
        device = next(self.teacher.parameters()).device
        if self.data is not None:
            draw = Draw(KeyedRandom(0), "moments", 0, 0, REFERENCES, REFERENCES, device)
            x0 = self.data.batch(draw)[0]
        else:
            shift = self.task.scheduler_config.get("shift") or 1.0
            noise = KeyedRandom(0).normal("moments", 0, 0, REFERENCES, self.teacher.sample_shape).to(device)
            condition = self.conditions.at(self.conditions.in_turn(0, REFERENCES, device))
            x0 = solve(self.real, noise, condition, REFERENCE_STEPS, shift)
        return float(x0.mean()), float(x0.std(correction=0))

    def updates(self, steps: int) -> list[Update]:
        """What a training step evaluates when all phases of a run of ``steps`` have begun, for its plan.

        Unless a method says it, each role that a phase trains is taken to be called once, and the teacher beside the student.
        """
        found = []
        for phase in self.phases(steps - 1):
            student = "student" in phase.trains
            drawn, judged = ({}, {"teacher": self.teacher_calls}) if student else ({"student": 1}, {})
            found.append(Update(phase.name, phase.trains, dict.fromkeys(phase.trains, 1), drawn, judged, phase.repeats))
        return found

    @property
    def teacher_calls(self) -> int:
        """Network evaluations of one of the guided teacher, in one call."""
        return 1 if self.real.scale == 1.0 else 2

    @property
    def earlier_calls(self) -> tuple[int, ...]:
        """Of the student, before the one that `student_sample` returns; their mean number, rounded up."""
        return (1,) * (len(self.steps.times) // 2)

    # Sampling.

    def predict(self, model: NetworkDenoiser, x_t: torch.Tensor, t: float, condition: Condition | None):
        """The student's clean sample at one time of its list."""
        times = torch.full((len(x_t),), t, device=x_t.device)
        return self.steps.consistency(self.schedule, x_t, model(x_t, times, condition), t)

    def generate(
        self,
        model: NetworkDenoiser,
        noise: torch.Tensor,
        condition: Condition | None,
        fresh: Callable[[int], torch.Tensor] | None = None,
        evaluations: int | None = None,
    ) -> torch.Tensor:
        """Samples of the student.

        Args:
            model: a network in the student's role.
            noise: (B, *sample_shape) standard normal.
            condition: of its network.
            fresh: from a step to the standard normal noise added after it; needed from two evaluations on.
            evaluations: stop after so many; default all.

        Returns:
            (B, *sample_shape) clean samples; only the last evaluation carries gradients.
        """
        x_t = self.steps.start(self.schedule, noise)
        times = self.steps.times[: evaluations or None]
        for step, t in enumerate(times[:-1]):
            with torch.no_grad():
                x0 = self.predict(model, x_t, t, condition)
                x_t = self.steps.renoise(self.schedule, x0, x_t, step, fresh(step))
        return self.predict(model, x_t, times[-1], condition)

    def generate_keyed(
        self, model: NetworkDenoiser, random: KeyedRandom, purpose: str, start: int, index: torch.Tensor
    ) -> torch.Tensor:
        """Samples start … start + B − 1 of a fixed series, for conditions ``index`` (B,), independent of batches."""
        count, shape = len(index), model.sample_shape

        def normal(step: int) -> torch.Tensor:
            return random.normal(purpose, step, start, count, shape).to(index.device)

        return self.generate(model, normal(0), self.conditions.at(index), lambda step: normal(step + 1))

    def student_sample(self, draw: Draw, grad: bool) -> tuple[torch.Tensor, Condition | None]:
        """What the student makes in training, with its condition: its clean sample at a random one of its times.

        The states before are the student's own, as in sampling (backward simulation, DMD2, section 4.5).
        """
        shape, count = self.teacher.sample_shape, len(self.steps.times)
        condition = self.conditions.at(self.conditions.draw(draw))
        evaluations = 1 + int(draw.random.integers(f"{draw.stream}/evaluations", draw.step, 0, 1, count))
        with torch.set_grad_enabled(grad):
            noise = draw.normal("latent", shape)
            x = self.generate(
                self.roles["student"], noise, condition, lambda step: draw.normal(f"renoise{step}", shape), evaluations
            )
        return x, condition

    def samples(self, model, random):
        device = next(model.parameters()).device
        index = self.picture_index().to(device)
        parts = index.split(25)
        starts = range(0, len(index), 25)
        drawn = [self.generate_keyed(model, random, "picture", *pair) for pair in zip(starts, parts, strict=True)]
        return torch.cat([self.task.decode(x0) for x0 in drawn])

    def picture_index(self) -> torch.Tensor:
        """Conditions (N,) of the sheet: a row each of up to ten, or a picture of each where there are more."""
        members = self.conditions.members
        if len(members) <= 10:
            return members[torch.arange(PICTURES) // 10 % len(members)]
        return members[:PICTURES]

    # Export.

    def scheduler(self) -> FewStepScheduler:
        """The scheduler that draws from the student as `generate` does."""
        return FewStepScheduler.carrying(self.steps, self.task.scheduler_config)

    def export(self, model: NetworkDenoiser, folder: Path) -> None:
        from .export import save_student  # not needed before the end

        save_student(self.task, model, self.scheduler(), folder)
        if isinstance(self.conditions, PromptConditions):
            save_prompts([self.conditions.names[index] for index in self.conditions.members.tolist()], folder)
