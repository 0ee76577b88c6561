"""Searched schedules against the best hand-set ones, on noise that no search saw.

    python benchmarks/search.py mixture --nfe 5 6 8 10        # about two hours on one core
    python benchmarks/search.py digits --nfe 3 4 5 6

mixture: `testing.spectral_mixture` on the linear DDPM schedule, Fréchet objective (to the teacher's fine samples from the
same noise, whose distribution is the exact one) with the default budget; scores are Fréchet distances on three held-out draws of 10,000 samples. The baseline is the best hand-set schedule of
this package, all samplers on all grids, picked with hindsight on the same three draws.

digits: the embedded teacher, trajectory objective; scores are distances to the 1,000-step solution on 3 × 200 held-out
samples, and FD of 2,000 other images. Baselines: the best of diffusers' schedulers on their best grids (those of
benchmarks/samplers.py), and the best hand-set one of this package, both picked with hindsight.

Every search has another seed. Ratios below 1 favour the search.
"""

import argparse
import json
import math
import statistics
import time

import torch
from samplers import drive, theirs

from diffaccel.cli.output import table
from diffaccel.core.grids import make_grid
from diffaccel.core.images import to_uint8
from diffaccel.core.rng import KeyedRandom
from diffaccel.core.schedule import from_diffusers
from diffaccel.evaluate.metrics.frechet import Gaussian, distance
from diffaccel.evaluate.monitor import Monitor
from diffaccel.models.teachers import load_denoiser, load_pipeline
from diffaccel.samplers.deis import deis_plan
from diffaccel.samplers.sample import sample
from diffaccel.search.seeds import hand_set
from diffaccel.search.subjects import DenoiserSubject
from diffaccel.solver_search import search_schedule
from diffaccel.testing import spectral_mixture

HELD_OUT = (9001, 9002, 9003)


class Mixture:
    """Fréchet distance to the exact moments."""

    objectives = ("fd",)

    def __init__(self):
        self.model = spectral_mixture(from_diffusers({}))
        weights, means = self.model.log_weights.exp()[:, None], self.model.means
        mean = (weights * means).sum(0)
        spread = (means - mean).T @ (weights * (means - mean)) + torch.diag((weights * self.model.variances).sum(0))
        self.exact, self.subject = Gaussian(mean, spread), DenoiserSubject(self.model, {})

    def objective(self, samples: torch.Tensor) -> float:
        samples = samples.double()
        return distance(self.exact, Gaussian(samples.mean(0), torch.cov(samples.T)))

    def search(self, nfe: int, **settings):
        return search_schedule(self.model, nfe, objective="fd-teacher", **settings)

    def held_out(self, file, count: int = 10_000) -> dict[str, float]:
        return {"fd": statistics.fmean(self.objective(self.subject.draw(file, seed, count)) for seed in HELD_OUT)}

    def baselines(self, nfe: int) -> dict[str, tuple[str, dict]]:
        files = dict(hand_set(self.subject, nfe))
        rough = {label: self.objective(self.subject.draw(file, HELD_OUT[0], 2000)) for label, file in files.items()}
        best = sorted(files, key=rough.get)[:15]
        scores = {label: self.held_out(files[label]) for label in best}
        label = min(scores, key=lambda one: scores[one]["fd"])
        return {"hand-set": (label, scores[label])}


class Digits:
    """Root mean square distance to the solution of 1,000 steps, and FD."""

    objectives = ("rmse", "fd")

    def __init__(self):
        self.model, self.monitor = load_denoiser("digits").eval(), Monitor("digits")
        self.subject = DenoiserSubject(self.model, {}, lambda start, count: self._labels(start, count))
        self.x = torch.cat([KeyedRandom(seed).normal("x", 0, 0, 200, self.model.sample_shape) for seed in HELD_OUT])
        self.other = KeyedRandom(77).normal("x", 0, 0, 2000, self.model.sample_shape)
        fine = deis_plan(make_grid(self.model.schedule, 1000, "quadratic"), 2)
        self.exact = self._run(lambda x, c: sample(self.model, x, fine, c), self.x)

    @staticmethod
    def _labels(start: int, count: int) -> dict:
        return {"class_labels": torch.arange(start, start + count) % 10}

    def _run(self, run, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([run(part, self._labels(200 * i, len(part))) for i, part in enumerate(x.split(200))])

    def _gap(self, run, draws: int = len(HELD_OUT)) -> torch.Tensor:
        return self._run(run, self.x[: 200 * draws]) - self.exact[: 200 * draws]

    def _scores(self, run, fd: bool = True) -> dict[str, float]:
        gap = self._gap(run)
        found = {"rmse": statistics.fmean(float(part.square().mean().sqrt()) for part in gap.split(200))}
        return found | ({"fd": self.monitor.distance(to_uint8(self._run(run, self.other)))} if fd else {})

    def search(self, nfe: int, **settings):
        return search_schedule(load_pipeline("digits"), nfe, objective="trajectory", **settings)

    def _planned(self, file):
        return lambda x, c: sample(self.model, x * file.plan.initial, file.plan, c)

    def held_out(self, file) -> dict[str, float]:
        return self._scores(self._planned(file))

    def baselines(self, nfe: int) -> dict[str, tuple[str, dict]]:
        def stock(make):
            return lambda x, c: drive(make, lambda *a: self.model(*a), x, c, nfe)

        def best(runs: dict) -> tuple[str, dict]:
            rough = {label: float(self._gap(run, 1).square().mean()) for label, run in runs.items()}
            finalists = sorted((label for label in rough if math.isfinite(rough[label])), key=rough.get)[:10]
            rmse = {label: self._scores(runs[label], False)["rmse"] for label in finalists}
            label = min(rmse, key=rmse.get)
            return label, self._scores(runs[label])

        files = hand_set(self.subject, nfe)
        return {
            "diffusers": best({label: stock(make) for label, make in theirs()}),
            "hand-set": best({label: self._planned(file) for label, file in files}),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", choices=("mixture", "digits"))
    parser.add_argument("--nfe", type=int, nargs="+", default=[5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--budget", default=1000, type=lambda text: int(text) if text.isdigit() else text)
    parser.add_argument("--strategy", default="evolution")
    parser.add_argument("--log", metavar="FILE", help="append one JSON object per search")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench, rows = {"mixture": Mixture, "digits": Digits}[arguments.teacher](), []
    for nfe in arguments.nfe:
        baselines = bench.baselines(nfe)
        for name, (label, scores) in baselines.items():
            print(f"NFE {nfe}, best of {name}: {label}: {scores}", flush=True)
        found = []
        for seed in arguments.seeds:
            began = time.monotonic()
            outcome = bench.search(nfe, budget=arguments.budget, strategy=arguments.strategy, seed=seed)
            scores = bench.held_out(outcome.file)
            entry = {
                "teacher": arguments.teacher,
                "nfe": nfe,
                "seed": seed,
                "seconds": round(time.monotonic() - began, 1),
                "improved": outcome.improved,
                "scores": scores,
                "facts": outcome.file.record["facts"],
                "baselines": {name: pair[1] for name, pair in baselines.items()},
            }
            found.append(scores)
            print(json.dumps(entry), flush=True)
            if arguments.log:
                with open(arguments.log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
        for name, (_, base) in baselines.items():
            for measure in bench.objectives:
                ratios = sorted(scores[measure] / base[measure] for scores in found)
                rows.append(
                    [
                        nfe,
                        measure,
                        name,
                        f"{base[measure]:.4g}",
                        f"{statistics.median(ratios):.2f}",
                        f"{ratios[-1]:.2f}",
                    ]
                )
    print(table(["NFE", "measure", "against best of", "its score", "median ratio", "worst"], rows))


if __name__ == "__main__":
    main()
