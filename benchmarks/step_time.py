"""Time of one scheduler step against diffusers' DPMSolverMultistepScheduler (second order), measured alternately.

    python benchmarks/step_time.py     # about a minute; on the GPU where there is one

The ratio is the median over rounds of (our time)/(its time), both on the same random tensors of one round.
"""

import statistics
import time
import warnings

import diffusers
import torch

from diffaccel.cli.output import table
from diffaccel.samplers.registry import SAMPLERS

SHAPES = ((1, 4, 64, 64), (1, 16, 128, 128))
STEPS, ROUNDS = 20, 25
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def seconds_per_step(scheduler, x: torch.Tensor, output: torch.Tensor) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scheduler.set_timesteps(STEPS, device=x.device)
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for t in scheduler.timesteps:
        x = scheduler.step(output, t, x, return_dict=False)[0]
    if x.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(scheduler.timesteps)


def main() -> None:
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name, sampler in SAMPLERS.items():
        ours, stock = sampler.build(SD), diffusers.DPMSolverMultistepScheduler(**SD)
        cells = []
        for shape in SHAPES:
            x, output = torch.randn(2, *shape, device=device)
            pairs = [(seconds_per_step(ours, x, output), seconds_per_step(stock, x, output)) for _ in range(ROUNDS)]
            cells.append(f"{statistics.median(a / b for a, b in pairs):.2f}")
        rows.append([name, *cells])
    print(f"time per step, as a fraction of DPMSolverMultistepScheduler's, on {device}")
    print(table(["sampler", *("×".join(map(str, shape)) for shape in SHAPES)], rows))


if __name__ == "__main__":
    main()
