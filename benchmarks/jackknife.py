"""Bias and coverage of the jackknife on Gaussians whose distances are known, both sides sampled.

python benchmarks/jackknife.py     # about a minute on one core
"""

import torch

from diffaccel.cli.output import table
from diffaccel.evaluate.groups import assign_groups
from diffaccel.evaluate.jackknife import Estimate
from diffaccel.evaluate.metrics.frechet import fd_infinity, frechet_distance, frechet_estimate
from diffaccel.evaluate.metrics.kernel import kid
from diffaccel.evaluate.moments import GroupedMoments, Moments

DIMENSIONS, REPETITIONS = 32, 200


def summary(results: list[Estimate], truth: float) -> list[str]:
    """Mean value, mean and deviation of what the interval is centred on, and how often the interval is right."""
    centres = torch.tensor([sum(result.ci95) / 2 for result in results], dtype=torch.float64)
    covered = sum(result.ci95[0] <= truth <= result.ci95[1] for result in results) / len(results)
    value = sum(result.value for result in results) / len(results)
    return [f"{value:.4f}", f"{float(centres.mean()):.4f}", f"{float(centres.std()):.4f}", f"{covered:.3f}"]


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-0.1, 0.1, DIMENSIONS, dtype=torch.float64)
    eye = torch.eye(DIMENSIONS, dtype=torch.float64)
    truth = frechet_distance(torch.zeros(DIMENSIONS), torch.diag(scale**2), torch.full((DIMENSIONS,), 0.1), eye)

    def sample(count: int, mean: float, std) -> torch.Tensor:
        return mean + std * torch.randn(count, DIMENSIONS, dtype=torch.float64, generator=generator)

    def grouped(features: torch.Tensor) -> GroupedMoments:
        return GroupedMoments(DIMENSIONS).update(features, assign_groups(None, len(features)))

    # The kernel distance has no bias: the mean of many values is its truth.
    kernel_truth = sum(kid(sample(2000, 0.0, scale), sample(2000, 0.1, 1.0)).value for _ in range(40)) / 40
    exact = Moments(DIMENSIONS).update(sample(2_000_000, 0.1, 1.0)).gaussian()
    rows = []
    for count in (100, 200, 500, 1000):
        pairs = [(sample(count, 0.0, scale), sample(count, 0.1, 1.0)) for _ in range(REPETITIONS)]
        distances = [frechet_estimate(grouped(fake), grouped(real)) for fake, real in pairs]
        rows.append(["FD", count, f"{truth:.4f}", *summary(distances, truth)])
        lines = [fd_infinity(fake, exact) for fake, _ in pairs[: REPETITIONS // 4]]
        rows.append(["FD∞, real exact", count, f"{truth:.4f}", *summary(lines, truth)])
        kernels = [kid(fake, real) for fake, real in pairs]
        rows.append(["KID", count, f"{kernel_truth:.4f}", *summary(kernels, kernel_truth)])
    print(f"d = {DIMENSIONS}, {REPETITIONS} repetitions (FD∞: {REPETITIONS // 4})")
    print(table(["", "N", "truth", "mean value", "mean centre", "its deviation", "coverage of 95 %"], rows))


if __name__ == "__main__":
    main()
