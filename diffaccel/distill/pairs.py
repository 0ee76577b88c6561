"""Pairs of noise and the image that the teacher's probability flow makes of it, drawn once and kept in the run folder."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..core.files import atomic_directory, verify_manifest
from ..core.grids import make_grid
from ..core.processes import is_main_process
from ..core.rng import KeyedRandom
from ..models.denoiser import Condition, Denoiser
from ..samplers.log_snr import dpm_solver_plan
from ..samplers.sample import sample
from .task import Task

_BATCH = 64


@torch.no_grad()
def solve(
    real: Denoiser, noise: torch.Tensor, condition: Condition | None, steps: int, shift: float = 1.0
) -> torch.Tensor:
    """The clean end of the teacher's probability flow from standard normal noise (B, …), by DPM-Solver++ 2M."""
    grid = make_grid(real.schedule, steps, shift=shift)
    return sample(real, noise * real.schedule.initial_scale, dpm_solver_plan(grid), condition)


class PairCache:
    """Pairs (noise, clean sample) of all conditions of a task in turn.

    Args:
        folder: where they are kept; made if it is not there or not intact.
        task: what is distilled.
        real: the guided teacher.
        count: number of pairs.
        steps: network evaluations of the teacher for each, twice that under guidance.
        seed: of the noise.
        say: takes one line before they are made.
    """

    def __init__(
        self,
        folder: Path,
        task: Task,
        real: Denoiser,
        count: int,
        steps: int,
        seed: int,
        say: Callable[[str], None] | None = None,
    ):
        self.conditions = task.conditions
        if not folder.is_dir() or verify_manifest(folder):
            if say:
                say(f"Drawing {count} pairs of noise and image from the teacher, {steps} steps each")
            tensors = self._draw(task, real, count, steps, KeyedRandom(seed))
            if is_main_process():
                shutil.rmtree(folder, ignore_errors=True)  # a damaged one
                with atomic_directory(folder) as temporary:
                    save_file(tensors, temporary / "pairs.safetensors")
        else:
            tensors = load_file(folder / "pairs.safetensors")
        self.noise, self.x0, self.index = tensors["noise"], tensors["x0"], tensors["index"]

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, draw) -> tuple[torch.Tensor, torch.Tensor, Condition | None]:
        """(noise, clean sample, condition) of one micro-batch (a `training.method.Draw`)."""
        chosen = draw.integers("pairs", len(self)).cpu()
        noise, x0, index = (value[chosen].to(draw.device) for value in (self.noise, self.x0, self.index))
        return noise, x0, self.conditions.at(index)

    def _draw(self, task: Task, real: Denoiser, count: int, steps: int, random: KeyedRandom) -> dict:
        device = next(task.teacher.parameters()).device
        everything = torch.arange(count) % self.conditions.count
        noise = random.normal("pairs", 0, 0, count, task.teacher.sample_shape)
        shift = task.scheduler_config.get("shift") or 1.0
        x0 = [
            solve(real, part.to(device), self.conditions.at(index.to(device)), steps, shift).cpu()
            for part, index in zip(noise.split(_BATCH), everything.split(_BATCH), strict=True)
        ]
        return {"noise": noise, "x0": torch.cat(x0), "index": everything}
