"""DisBack (Zhang et al. 2025): distribution backtracking, teachers that are easier first and the real one in the end.

While the student rests, the critic, a copy of the teacher, learns the samples of the untrained student, and so the
teacher's distribution degrades to the student's (Degradation Recording). What the critic was on the way are the nodes, kept
in the run folder. The student is then taught by the nodes in reverse order and at last by the teacher, while the critic goes
on from where it is (Distribution Backtracking). Everything else is the base's: dmd, f-distill or sid.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file

from ...core.errors import DataError, UsageError, unknown
from ...core.files import atomic_directory, verify_manifest
from ...core.processes import is_main_process
from ...training.checkpoint import load_module
from ...training.method import Draw, Loss, Phase
from .around import Around

SWITCHES = ("interval", "mismatch")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NULL_FRACTION = 0.1


@dataclass
class BacktrackingConfig:
    """Attributes:
    base: method that is wrapped, whose settings these come on top of: "dmd", "f-distill" or "sid".
    record_steps: training steps at the start in which the student rests and the critic degrades, before those of
        critic_warmup; 0 is the base itself.
    node_interval: training steps between nodes; record_steps / node_interval teachers follow each other, the real one last.
    switch: when the next teacher takes over: after an "interval", or when the "mismatch" mean|D_critic − D_node| /
        mean|x − D_node| at the student's noised samples is small, for then the student has come to the node.
    switch_interval: student updates under each node, for "interval".
    switch_threshold: of the mismatch.
    switch_decay: of the moving average of the mismatch, in student updates; it starts at 1 under each node.
    node_precision: of nodes in the run folder, "float32" or "bfloat16".
    """

    resting: ClassVar[tuple[str, ...]] = ("record_steps", "critic_warmup")

    base: str = "dmd"
    record_steps: int = 100
    node_interval: int = 25
    switch: str = "interval"
    switch_interval: int = 25
    switch_threshold: float = 0.3
    switch_decay: float = 0.9
    node_precision: str = "float32"

    @property
    def teachers(self) -> int:
        """How many teachers follow each other, the real one included."""
        return max(1, self.record_steps // self.node_interval)

    def __post_init__(self):
        super().__post_init__()
        for name in ("node_interval", "switch_interval"):
            if getattr(self, name) < 1:
                raise UsageError(f"method.{name} must be at least 1, got {getattr(self, name)}.")
        if self.record_steps < 0 or self.record_steps % self.node_interval:
            raise UsageError(
                f"method.record_steps must be a multiple of method.node_interval {self.node_interval}, or 0; "
                f"got {self.record_steps}."
            )
        for name, valid in (("switch", SWITCHES), ("node_precision", PRECISIONS)):
            if getattr(self, name) not in valid:
                raise unknown(f"method.{name}", getattr(self, name), valid)
        if not self.switch_threshold > 0.0:
            raise UsageError(f"method.switch_threshold must be positive, got {self.switch_threshold}.")
        if not 0.0 <= self.switch_decay < 1.0:
            raise UsageError(f"method.switch_decay must be in [0, 1), got {self.switch_decay}.")
        if self.record_steps and not self.distribution_weight:
            raise UsageError("disback degrades the critic, which method.distribution_weight 0 leaves out.")


class DisBack(Around):
    """What makes dmd, f-distill or sid a DisBack.

    The critic's optimiser carries over from recording to backtracking. Weights of f-distill and a discriminator's features
    are the real teacher's throughout.
    """

    title, Settings = "disback", BacktrackingConfig

    def __init__(self, task, config, seed: int = 0):
        super().__init__(task, config, seed)
        self.nodes: Path | None = None
        self._node = self._resident = None  # a network for nodes, and the number of the one in it
        self._passed = torch.zeros((), dtype=torch.long)  # teachers that were left behind, for "mismatch"
        self._mismatch = torch.ones(())
        self._distances = torch.zeros(2)  # this update's sums of the mismatch's two parts

    def to(self, device):
        super().to(device)
        for name in ("_passed", "_mismatch", "_distances"):
            setattr(self, name, getattr(self, name).to(device))

    def begin(self, folder: Path) -> None:
        super().begin(folder)
        self.nodes = folder / "nodes"

    def frozen(self):
        if self.config.teachers == 1:
            return super().frozen()
        shared = self.task.shared
        return super().frozen() | {"node": self.teacher if shared is None else shared.adapter("node")}

    def phases(self, step: int) -> list[Phase]:
        recorded = step - self.config.record_steps
        phases = super().phases(max(recorded, 0))
        return [phase for phase in phases if phase.name == "critic"] if recorded < 0 else phases

    def node_at(self, step: int) -> int:
        """Number of the node that teaches at training step ``step``; 0 is the real teacher, and n was recorded n-th."""
        if self.config.switch == "interval":
            passed = max(0, step - self.config.resting_steps()) // self.config.switch_interval
        else:
            passed = int(self._passed)
        return max(0, self.config.teachers - 1 - passed)

    def loss(self, phase: Phase, draw: Draw) -> Loss:
        if phase.name == "student":
            self._be_taught_by(self.node_at(draw.step))
        return super().loss(phase, draw)

    def student_sample(self, draw, grad):
        x, condition = super().student_sample(draw, grad)
        if draw.step < self.config.record_steps and self.config.guidance_scale != 1.0 and condition is not None:
            # A guided node needs its empty condition degraded too.
            null = self.teacher.null_condition(len(x))
            empty = draw.uniform("empty") < NULL_FRACTION
            condition = {
                key: torch.where(empty.reshape(-1, *[1] * (value.ndim - 1)), null[key].to(value), value)
                for key, value in condition.items()
            }
        return x, condition

    def watch(self, metrics, fake, real, distance):
        super().watch(metrics, fake, real, distance)
        self._distances += torch.stack([(fake - real).abs().mean(), distance.mean()]) * len(fake)
        metrics["node"], metrics["mismatch"] = float(self._resident or 0), self._mismatch

    def end_phase(self, phase: Phase, total) -> None:
        super().end_phase(phase, total)
        if phase.name != "student":
            return
        both, self._distances = total(self._distances), torch.zeros_like(self._distances)
        mismatch = torch.lerp(both[0] / both[1].clamp_min(1e-12), self._mismatch, self.config.switch_decay)
        arrived = (mismatch < self.config.switch_threshold) & (self._passed < self.config.teachers - 1)
        self._passed = self._passed + arrived
        self._mismatch = torch.where(arrived, torch.ones_like(mismatch), mismatch)

    def end_step(self, step: int) -> None:
        super().end_step(step)
        number, rest = divmod(step + 1, self.config.node_interval)
        # The last node is what the critic is when backtracking begins; it teaches nobody.
        if not rest and number < self.config.teachers and is_main_process():
            dtype = PRECISIONS[self.config.node_precision]
            state = {name: value.to(dtype).contiguous() if value.is_floating_point() else value
                     for name, value in self.roles["critic"].state_dict().items()}  # fmt: skip
            shutil.rmtree(self._folder(number), ignore_errors=True)  # of the same step, before a kill
            with atomic_directory(self._folder(number)) as temporary:
                save_file(state, temporary / "critic.safetensors")

    def extra_state(self):
        return {**super().extra_state(), "passed": self._passed, "mismatch": self._mismatch}

    def load_extra_state(self, state):
        super().load_extra_state(state)
        device = self._passed.device
        self._passed, self._mismatch = state["passed"].to(device), state["mismatch"].to(device)

    def _folder(self, number: int) -> Path:
        return self.nodes / f"node-{number:04d}"

    def _be_taught_by(self, number: int) -> None:
        """Put a node, or for 0 the teacher, in the place of the real side.

        Raises:
            DataError: it is not in the run folder as it was written, or one that follows is not.
        """
        if number == (self._resident or 0):
            return
        if not number:
            self._node, self._resident, self.real = None, None, self.guided(self.teacher)
            return
        first = self._resident is None
        for needed in range(number, 0, -1) if first else (number,):
            if problems := verify_manifest(self._folder(needed)):
                raise DataError(
                    f"{self._folder(needed)} cannot teach: {problems[0]} Restore it from a copy, or start a new run."
                )
        if first:
            shared = self.task.shared
            node = shared.adapter("node") if shared is not None else self.teacher.clone()
            self._node = node.eval().requires_grad_(False)
        load_module(self._node, load_file(self._folder(number) / "critic.safetensors"), str(self._folder(number)))
        self._resident, self.real = number, self.guided(self._node)
