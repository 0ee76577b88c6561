"""The figures behind the README: floor, teacher and one-step students on the embedded digits, three seeds each.

    python benchmarks/digits.py            # about 10 minutes on one core
    python benchmarks/digits.py --seeds 0  # one seed

All distances are plug-in values of FD-digits64 against the real training digits. The floor is what real digits score:
the held-out fifth (355 images) against the training split, and its spread that of 60 other stratified splits of the same
sizes. The teacher is scored at the same number of images, averaged over disjoint groups; gains are scored at 1,065.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from diffaccel.cli.output import table
from diffaccel.core.rng import KeyedRandom
from diffaccel.distill.run import resolve_distillation
from diffaccel.distillation import run_distillation
from diffaccel.evaluate.classes import class_report
from diffaccel.evaluate.features import get_features
from diffaccel.evaluate.metrics.frechet import distance
from diffaccel.evaluate.moments import Moments
from diffaccel.generation import generate
from diffaccel.models.data import load_digits

FLOOR, GROUPS = 355, 3
RUNS = [("dmd", {"name": "dmd"}), ("f-distill js", {"name": "f-distill"})]


def gaussian(features: torch.Tensor):
    return Moments(features.shape[1]).update(features).gaussian()


def drawn(model, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*generate(model, FLOOR * GROUPS, **settings), strict=True)
    return torch.cat(images), torch.cat(labels)


def floor(extractor, reference) -> tuple[float, float]:
    """Distance of the held-out digits, and the standard deviation over stratified splits of the same sizes."""
    images, labels = load_digits("all")
    features = extractor(images)
    values = []
    for repeat in range(60):
        mask = torch.zeros(len(labels), dtype=torch.bool)
        for digit in range(10):
            members = torch.nonzero(labels == digit)[:, 0]
            order = KeyedRandom(1).permutation(f"floor/{digit}", repeat, len(members))
            mask[members[order[: len(members) // 5]]] = True
        values.append(distance(gaussian(features[~mask]), gaussian(features[mask])))
    held_out = distance(reference, gaussian(extractor(load_digits("heldout")[0])))
    return held_out, float(torch.tensor(values).std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    extractor = get_features("digits64")
    reference = gaussian(extractor(load_digits("train")[0]))

    def fd(images: torch.Tensor) -> float:
        return distance(reference, gaussian(extractor(images)))

    held_out, spread = floor(extractor, reference)
    print(
        f"floor: held-out digits {held_out:.3f}, spread over splits {spread:.3f}, so at most {held_out + spread:.3f}\n"
    )

    rows, whole = [], {}
    for steps in (50, 20, 10, 5, 1):
        for seed in arguments.seeds:
            images, labels = drawn("digits", steps=steps, seed=seed)
            whole[steps, seed] = fd(images)
            groups = sum(fd(part) for part in images.split(FLOOR)) / GROUPS
            accuracy = class_report(images, labels, load_digits())["accuracy"]
            rows.append(
                [f"teacher, {steps} steps", seed, f"{groups:.3f}", f"{whole[steps, seed]:.3f}", f"{accuracy:.3f}"]
            )
    print(table(["model", "seed", f"FD N={FLOOR}", f"FD N={FLOOR * GROUPS}", "accuracy"], rows), "\n")

    students, facts = [], []
    for label, method in RUNS:
        for seed in arguments.seeds:
            settings = resolve_distillation({"teacher": "digits", "method": method, "trainer": {"seed": seed}})
            with tempfile.TemporaryDirectory() as folder:
                started = time.process_time()
                final = run_distillation(settings, Path(folder) / "run")
                seconds = time.process_time() - started
                images, labels = drawn(final, seed=seed)
                log = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
            report = class_report(images, labels, load_digits())
            value = fd(images)
            gain = (whole[1, seed] - value) / (whole[1, seed] - whole[50, seed])
            worst = min(row["accuracy"] for row in report["classes"])
            diversity = sum(row["diversity"] for row in report["classes"]) / 10
            real = sum(row["diversity_real"] for row in report["classes"]) / 10
            cells = [f"{value:.3f}", f"{gain:.3f}", f"{report['accuracy']:.3f}", f"{worst:.3f}"]
            students.append([label, seed, *cells, f"{diversity:.1f} / {real:.1f}", f"{seconds:.0f}"])
            clean = [
                row["critic/discriminator_accuracy_clean_fifth"]
                for row in log
                if "critic/discriminator_accuracy_clean_fifth" in row
            ]
            facts.append({"method": label, "seed": seed, "fd": value, "gain": gain, "discriminator_clean_fifth": clean})
    header = ["student, 1 step", "seed", "FD", "gain", "accuracy", "worst class", "diversity / real", "cpu s"]
    print(table(header, students))
    for entry in facts:
        if entry["discriminator_clean_fifth"]:
            curve = entry["discriminator_clean_fifth"]
            print(f"{entry['method']} seed {entry['seed']}: discriminator accuracy at the clean fifth, max {max(curve):.2f}, "
                  f"mean {sum(curve) / len(curve):.2f}, last {curve[-1]:.2f}")  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps({"floor": held_out, "spread": spread, "students": facts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
