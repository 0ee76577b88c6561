"""Folder throughput beside the loop people write around torchmetrics, and peak memory for ten times the images.

    python benchmarks/evaluation.py

Both sides use the same extractor and read the same PNG files, alternately, in one run; ratios count, not seconds. The
loop decodes with Pillow, stacks batches and calls FrechetInceptionDistance.update.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance

from diffaccel.cli.output import table
from diffaccel.core.images import save_png
from diffaccel.core.rng import KeyedRandom
from diffaccel.evaluate.features import get_features
from diffaccel.evaluate.run import evaluate_fid, write_statistics

SIZES, ROUNDS = {32: 4000, 128: 1000, 512: 300}, 5


def pictures(folder: Path, count: int, size: int) -> None:
    """Smooth random pictures, which compress about as photographs do."""
    folder.mkdir()
    for index in range(count):
        coarse = KeyedRandom(0).uniform("picture", index, 0, 1, (3, 8, 8))
        fine = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")[0]
        fine = fine + 0.03 * KeyedRandom(0).normal("grain", index, 0, 1, (3, size, size))[0]
        save_png((255 * fine).round().clamp(0, 255).to(torch.uint8), folder / f"{index:06d}.png")


def loop(files: list[Path], extractor, batch_size: int) -> float:
    """Seconds of the usual loop, one side."""
    metric = FrechetInceptionDistance(feature=extractor)
    started = time.perf_counter()
    for start in range(0, len(files), batch_size):
        batch = [np.array(Image.open(path).convert("RGB")) for path in files[start : start + batch_size]]
        metric.update(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2), real=False)
    return time.perf_counter() - started


def ours(folder: Path, reference: Path, **settings) -> float:
    """Seconds of one evaluation of the folder, distance and interval included."""
    started = time.perf_counter()
    evaluate_fid(folder, reference, **settings)
    return time.perf_counter() - started


def throughput(folder: Path, size: int) -> None:
    """Print images per second of both, and the ratio."""
    extractor, files = get_features("random-conv"), sorted(folder.iterdir())
    reference = folder.parent / f"ref-{size}.npz"
    write_statistics(folder, reference, "random-conv")
    ways = {
        "torchmetrics, one by one": lambda: loop(files, extractor, 1),
        "torchmetrics, batches of 64": lambda: loop(files, extractor, 64),
        "diffaccel, no workers": lambda: ours(folder, reference, workers=0),
        "diffaccel, 1 worker": lambda: ours(folder, reference, workers=1),
        "diffaccel, 2 workers": lambda: ours(folder, reference, workers=2),
    }
    seconds = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            seconds[name].append(way())
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        [name, f"{len(files) / value:.0f}", *(f"{middle[loop] / value:.2f}" for loop in list(middle)[:2])]
        for name, value in middle.items()
    ]
    print(f"{len(files)} PNG files of {size}×{size}, features random-conv, median of {ROUNDS} alternating rounds")
    print(table(["", "images/s", "× one by one", "× batches"], rows), "\n")


def memory(parent: Path) -> None:
    """Print the peak memory of fresh processes that evaluate 2,000 and 20,000 files."""
    rows = []
    for count in (2000, 20_000):
        folder = parent / f"small-{count}"
        pictures(folder, count, 16)
        command = [sys.executable, __file__, "--peak", str(folder)]
        peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        rows.append([f"{count} files", peak])
    print(table(["", "peak MiB"], rows))


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        evaluate_fid(sys.argv[2], sys.argv[2], "random-conv", workers=0)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
        return
    with tempfile.TemporaryDirectory() as scratch:
        for size, count in SIZES.items():
            pictures(Path(scratch) / f"pictures-{size}", count, size)
            throughput(Path(scratch) / f"pictures-{size}", size)
        memory(Path(scratch))


if __name__ == "__main__":
    main()
