"""MSD (Song et al. 2025): several students, each for its part of the conditions, and students that are smaller.

Every student is distilled by the base method (dmd, f-distill, sid) on the conditions it owns; at inference only the owner of a
condition runs. The filter applies to what the student is matched on; regression pairs are those of all conditions, without
which modes are lost. A smaller student first learns to denoise as the teacher does (teacher score matching, TSM); an
adversarial loss may set in later (ADM). `distill/student_runs.py` trains all students and assembles them.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from ...core.errors import UsageError
from ...core.processes import is_main_process
from ...models.denoiser import NetworkDenoiser
from ...models.partition import FILE, read_partition
from ...training.method import Draw, Loss, Phase
from ..partition import choose_partition, members
from ..samples import DrawnSamples
from ..students import narrower, opened, shallower
from .around import Around


@dataclass
class MultiStudentConfig:
    """Attributes:
    base: method that is wrapped, whose settings these come on top of: "dmd", "f-distill" or "sid".
    students: how many; 1 is the base itself.
    student: the one that this run trains, 0 … students − 1; none for all of them, one after the other.
    partition: how conditions are divided: "blocks" of classes, "quadrants" or "kmeans" of prompts, "auto", or a file with
        students: [[0, 1], [2, 3, 4]], the classes of each.
    channels: widths of a smaller U-Net; () for the teacher's.
    layers: of a smaller transformer; 0 for the teacher's.
    start: folder of the pipeline in which the student starts, such as one that `diffaccel prune` made; "" for the teacher.
    matching_steps: training steps at the start in which the student learns to denoise as the teacher does, on real samples;
        without any on regression_pairs of the teacher's.
    adversarial_from: training step from which gan_weight counts.
    """

    resting: ClassVar[tuple[str, ...]] = ("matching_steps", "critic_warmup")

    base: str = "dmd"
    students: int = 4
    student: int | None = None
    partition: str = "auto"
    channels: tuple[int, ...] = ()
    layers: int = 0
    start: str = ""
    matching_steps: int = 0
    adversarial_from: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.students < 1:
            raise UsageError(f"method.students must be at least 1, got {self.students}.")
        if self.student is not None and not 0 <= self.student < self.students:
            raise UsageError(f"method.student must be in 0 … {self.students - 1}, or left out; got {self.student}.")
        for name in ("layers", "matching_steps", "adversarial_from"):
            if getattr(self, name) < 0:
                raise UsageError(f"method.{name} must not be negative, got {getattr(self, name)}.")
        given = [name for name in ("channels", "layers", "start") if getattr(self, name)]
        if len(given) > 1:
            raise UsageError(
                f"One of method.{' and method.'.join(given)} says what the student is; leave the others out."
            )
        if self.adversarial_from and not self.gan_weight:
            raise UsageError("method.adversarial_from says when method.gan_weight counts, which is 0; set it, too.")
        if self.adversarial_from > self.resting_steps() and not (self.distribution_weight or self.regression_weight):
            raise UsageError(
                "Before method.adversarial_from nothing trains the student: its other losses have the weight 0."
            )


class MultiStudent(Around):
    """What makes dmd, f-distill or sid train one of several students.

    Attributes:
        partition: which student owns a condition.

    Raises:
        UsageError, DataError: see `partition.choose_partition` and `students`.
    """

    title, Settings = "multi-student", MultiStudentConfig

    def __init__(self, task, config, seed: int = 0):
        index = config.student or 0
        self.partition = choose_partition(config.partition, task.conditions, config.students)
        own, data = members(self.partition, task.conditions, index), task.data
        if data is not None and config.students > 1:
            # Captions of images are not always the prompts that the student is trained for.
            data = data.only(members(self.partition, getattr(data, "captions", task.conditions), index))
        super().__init__(replace(task, conditions=task.conditions.only(own), data=data), config, seed)
        student = self._smaller(seed)
        if student is not None:
            self.roles["student"] = student
        drawn = config.matching_steps and data is None
        self._drawn = DrawnSamples(config.regression_pairs, own) if drawn else None
        # Before the adversary sets in, with a discriminator only where the base needs one for something else.
        self._whole, self._early = config, replace(config, gan_weight=0.0, adversarial_from=0)
        self._without = False
        self.config = self._early
        self._judged_early = self.needs_discriminator()
        self.config = config

    def _smaller(self, seed: int) -> NetworkDenoiser | None:
        config, teacher = self.config, self.teacher
        if config.channels:
            return narrower(teacher, config.channels, seed)
        if config.layers:
            return shallower(teacher, config.layers, seed)
        return opened(config.start, teacher) if config.start else None

    def begin(self, folder: Path) -> None:
        config = self.config
        if config.student is None and config.students > 1:
            raise UsageError(
                "A run trains one of several students; set method.student, or use student_runs.train_students."
            )
        super().begin(folder)
        if not (folder / FILE).exists():
            if is_main_process():
                self.partition.save(folder)
        elif not self.partition.agrees(read_partition(folder)):
            raise UsageError(f"{folder} was started with another partition; restore its file, or start a new run.")
        if self._drawn is not None:
            self._drawn.begin(self, folder)

    def phases(self, step: int) -> list[Phase]:
        if step < self.config.matching_steps:
            return [Phase("matching", ("student",))]
        phases = super().phases(step - self.config.matching_steps)
        if not self._rests(step):
            return phases
        phases = [replace(phase, trains=tuple(r for r in phase.trains if r != "discriminator")) for phase in phases]
        return [phase for phase in phases if phase.trains]

    def loss(self, phase: Phase, draw: Draw) -> Loss:
        if phase.name == "matching":
            return self._matching_loss(draw)
        self.config = self._early if draw.step < self._whole.adversarial_from else self._whole
        self._without = self._rests(draw.step)
        return super().loss(phase, draw)

    def judged(self, x_t, t, condition):
        return (None, None) if self._without else super().judged(x_t, t, condition)

    def _discriminator_loss(self, draw, x, condition, metrics):
        return x.new_zeros(()) if self._without else super()._discriminator_loss(draw, x, condition, metrics)

    def _rests(self, step: int) -> bool:
        """Whether there is no use yet for the discriminator."""
        return step < self._whole.adversarial_from and not self._judged_early

    def _matching_loss(self, draw: Draw) -> Loss:
        """E_t λ_t‖D_student(x_t) − D_teacher(x_t)‖², λ_t the weight of the denoising loss (teacher score matching).

        With that weight it is the squared difference of what the networks predict. Guidance comes with distillation.
        """
        x0, condition = (self.data if self._drawn is None else self._drawn).batch(draw)
        t = self.schedule.time(draw.stratified("time"))
        x_t = self.teacher.noised(x0, t, draw.normal("eps", self.teacher.sample_shape))
        with torch.no_grad():
            target = self.teacher.predict(x_t, t, condition).float()
        error = (self.roles["student"].predict(x_t, t, condition).float() - target).square().mean()
        return Loss(error, {"relative_error": error.detach() / target.square().mean()})
