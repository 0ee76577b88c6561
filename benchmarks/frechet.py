"""Time of a Fréchet distance against torchmetrics' `_compute_fid`, measured alternately, and what the interval costs.

    python benchmarks/frechet.py     # about three minutes on one core; OMP_NUM_THREADS sets the cores
    python benchmarks/frechet.py 64 512

The ratio is the median over rounds of (their time)/(our time) for the same moments, nothing reused between rounds.
"""

import statistics
import sys
import time

import torch
from torchmetrics.image.fid import _compute_fid

from diffaccel.cli.output import table
from diffaccel.evaluate.groups import assign_groups
from diffaccel.evaluate.metrics.frechet import Gaussian, distance, frechet_distance, frechet_estimate
from diffaccel.evaluate.moments import GroupedMoments

ROUNDS = {64: 50, 512: 9, 2048: 5}


def timed(function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def once(fake: Gaussian, real: Gaussian) -> float:
    """A distance without what an earlier one left behind."""
    return distance(Gaussian(real.mu, real.sigma, real.rank), fake)


def features(count: int, d: int, generator: torch.Generator, tilt: float) -> torch.Tensor:
    """Float32 features that are correlated, with a spectrum that falls over three decades."""
    scale = torch.logspace(0.0, -1.5, d) ** tilt
    mixing = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    return (scale * torch.randn(count, d, generator=generator)) @ mixing + 0.05 * tilt


def main() -> None:
    generator, rows = torch.Generator().manual_seed(0), []
    for d in [int(argument) for argument in sys.argv[1:]] or ROUNDS:
        for count in (d // 2, 3 * d):
            samples = [features(count, d, generator, tilt) for tilt in (1.0, 0.8)]
            accumulate, sides = timed(
                lambda d, *samples: [GroupedMoments(d).update(x, assign_groups(None, len(x))) for x in samples],
                d,
                *samples,
            )
            fake, real = (side.total().gaussian() for side in sides)
            plain = (real.mu, real.sigma, fake.mu, fake.sigma)
            ratios, times = [], []
            for _ in range(ROUNDS.get(d, 5)):
                ours, value = timed(once, fake, real)
                from_matrices, again = timed(frechet_distance, *plain)
                theirs, reference = timed(_compute_fid, *plain)
                times.append((ours, from_matrices, theirs))
                ratios.append((theirs / ours, theirs / from_matrices))
            seconds, result = timed(frechet_estimate, *sides)
            assert abs(result.value / value - 1) < 1e-8
            worst = max(abs(x / float(reference) - 1) for x in (value, again))
            rows.append(
                [
                    d,
                    count,
                    *(f"{1e3 * statistics.median(column):.1f} ms" for column in zip(*times, strict=True)),
                    *(f"{statistics.median(column):.1f}×" for column in zip(*ratios, strict=True)),
                    f"{worst:.0e}",
                    f"{accumulate:.2f} s",
                    f"{seconds:.2f} s",
                ]
            )
    heads = ["d", "N", "distance", "frechet_distance", "_compute_fid", "faster", "faster (matrices)", "difference"]
    print(f"{torch.get_num_threads()} thread(s)")
    print(table([*heads, "both sides' moments", "with interval"], rows))


if __name__ == "__main__":
    main()
