"""Pairs of noise and the sample that the teacher's probability flow makes of it, drawn once and kept in the run folder."""

import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..core.files import atomic_directory, verify_manifest
from ..core.grids import make_grid
from ..core.processes import Processes, is_main_process
from ..core.rng import KeyedRandom
from ..models.denoiser import Condition, Denoiser
from ..samplers.log_snr import dpm_solver_plan
from ..samplers.sample import sample
from .task import Task

PART = 256  # pairs that are written at once: no more are lost by a kill
_NUMBERS = 2**18  # in a batch of samples: 64 of 4096 or fewer, 16 latents of 4×64×64


@torch.no_grad()
def solve(
    real: Denoiser, noise: torch.Tensor, condition: Condition | None, steps: int, shift: float = 1.0
) -> torch.Tensor:
    """The clean end of the teacher's probability flow from standard normal noise (B, …), by DPM-Solver++ 2M."""
    grid = make_grid(real.schedule, steps, shift=shift)
    return sample(real, noise * real.schedule.initial_scale, dpm_solver_plan(grid), condition)


class PairCache:
    """Pairs (noise, clean sample) of all conditions of a task in turn; drawing them is shared by all processes.

    The noise is a function of the seed and the pair's number, so only clean samples are stored: folders part-XXXX of `PART`
    each. What is there and intact is not drawn again.

    Args:
        folder: where they are kept.
        task: what is distilled.
        real: the guided teacher.
        count: number of pairs.
        steps: network evaluations of the teacher for each, twice that under guidance.
        seed: of the noise.
    """

    def __init__(self, folder: Path, task: Task, real: Denoiser, count: int, steps: int, seed: int):
        self.conditions, self.shape, self.random = task.conditions, task.teacher.sample_shape, KeyedRandom(seed)
        self.real, self.steps, self.shift = real, steps, task.scheduler_config.get("shift") or 1.0
        device = next(task.teacher.parameters()).device
        starts = range(0, count, PART)
        folders = [folder / f"part-{number:04d}" for number in range(len(starts))]
        processes = Processes(str(device))
        missing = [number for number, path in enumerate(folders) if verify_manifest(path)]
        missing = processes.gather_json(missing)[0]  # all draw what the main process misses
        parts = {n: load_file(path / "samples.safetensors")["x0"] for n, path in enumerate(folders) if n not in missing}
        turns = range(0, len(missing), processes.world)
        for turn in tqdm(
            turns, "Drawing pairs of the teacher", disable=None if is_main_process() else True, leave=False
        ):
            own = missing[turn + processes.rank : turn + processes.rank + 1]
            drawn = [self._draw(starts[n], min(PART, count - starts[n]), device) for n in own]
            x0 = drawn[0] if drawn else torch.empty(0, *self.shape)
            for number, found in zip(missing[turn:], processes.each({"x0": x0}), strict=False):
                parts[number] = found["x0"]
                if is_main_process():
                    shutil.rmtree(folders[number], ignore_errors=True)  # a damaged one
                    with atomic_directory(folders[number]) as temporary:
                        save_file(found, temporary / "samples.safetensors")
        self.x0 = torch.cat([parts[number] for number in range(len(starts))])

    def __len__(self) -> int:
        return len(self.x0)

    def batch(self, draw) -> tuple[torch.Tensor, torch.Tensor, Condition | None]:
        """(noise, clean sample, condition) of one micro-batch (a `training.method.Draw`)."""
        chosen = draw.integers("pairs", len(self)).cpu()
        noise = torch.cat([self._noise(number, 1) for number in chosen.tolist()])
        index = (chosen % self.conditions.count).to(draw.device)
        return noise.to(draw.device), self.x0[chosen].to(draw.device), self.conditions.at(index)

    def _noise(self, start: int, count: int) -> torch.Tensor:
        return self.random.normal("pairs", 0, start, count, self.shape)

    def _draw(self, start: int, count: int, device: torch.device) -> torch.Tensor:
        """Clean samples (count, …) of the pairs from ``start`` on."""
        size = max(1, min(64, _NUMBERS // math.prod(self.shape)))
        index = (torch.arange(start, start + count) % self.conditions.count).to(device)
        parts = zip(self._noise(start, count).to(device).split(size), index.split(size), strict=True)
        return torch.cat([solve(self.real, z, self.conditions.at(i), self.steps, self.shift).cpu() for z, i in parts])
