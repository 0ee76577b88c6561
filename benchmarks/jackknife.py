"""Bias and coverage of the Fréchet distance's jackknife on Gaussians whose distance is known.

python benchmarks/jackknife.py     # about a minute on one core
"""

import torch

from diffaccel.cli.output import table
from diffaccel.evaluate.metrics.frechet import frechet_distance
from diffaccel.evaluate.jackknife import GroupedMoments, estimate

DIMENSIONS, REPETITIONS = 32, 200


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-0.1, 0.1, DIMENSIONS, dtype=torch.float64)
    eye = torch.eye(DIMENSIONS, dtype=torch.float64)
    truth = frechet_distance(torch.zeros(DIMENSIONS), torch.diag(scale**2), torch.full((DIMENSIONS,), 0.1), eye)

    def sampled(count: int, mean: float, std) -> GroupedMoments:
        normal = torch.randn(count, DIMENSIONS, dtype=torch.float64, generator=generator)
        return GroupedMoments(DIMENSIONS).update(mean + std * normal)

    rows = []
    for count in (100, 200, 500, 1000):
        results = [estimate(sampled(count, 0.0, scale), sampled(count, 0.1, 1.0)) for _ in range(REPETITIONS)]
        plug_in = sum(result.value for result in results) / REPETITIONS
        corrected = sum(result.bias_corrected for result in results) / REPETITIONS
        covered = sum(result.ci95[0] <= truth <= result.ci95[1] for result in results) / REPETITIONS
        rows.append([count, f"{plug_in:.3f}", f"{corrected:.3f}", f"{covered:.3f}"])
    print(f"d = {DIMENSIONS}, truth {truth:.3f}, both sides sampled, {REPETITIONS} repetitions")
    print(table(["N", "plug-in mean", "corrected mean", "coverage of 95 %"], rows))


if __name__ == "__main__":
    main()
