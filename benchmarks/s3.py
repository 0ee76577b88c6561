"""Search guided by a predictor (S³) against plain evolution: true evaluations needed for the same quality.

    python benchmarks/s3.py                              # five seeds, 5 network calls; about 10 minutes on one core
    python benchmarks/s3.py --nfe 8 --objective frechet

The teacher is `testing.spectral_mixture` on the linear DDPM schedule, 100 samples per evaluation. Objectives: root mean
square distance to its exact probability flow, or the Fréchet distance between the samples and the exact end points of the
same noise. Both strategies start from the hand-set schedules of all samplers on all grids, which are not counted. Evolution
gets 600 evaluations, S³ half of them.

The last table is of the predictor alone: Kendall's τ on schedules it has not seen, random ones (a third) and mutants of
the hundred best of an evolution, by the number of those it has.
"""

import argparse
import math
import statistics
import time

import numpy as np
import torch

from diffaccel.cli.output import table
from diffaccel.core.schedule import from_diffusers
from diffaccel.evaluate.metrics.frechet import frechet_distance
from diffaccel.samplers.sample import sample
from diffaccel.search.engine import Search
from diffaccel.search.evolution import evolution
from diffaccel.search.predictor import RankingPredictor, kendall_tau
from diffaccel.search.s3 import s3
from diffaccel.search.seeds import hand_set
from diffaccel.search.space import SolverSpace
from diffaccel.search.subjects import DenoiserSubject
from diffaccel.testing import reference_solution, spectral_mixture

SAMPLES, EXAMPLES, HELD_OUT = 100, (50, 100, 200, 400), 250


class Bench:
    """Scores of schedules on one draw of noise."""

    def __init__(self, nfe: int, objective: str):
        self.schedule = from_diffusers({})
        self.denoiser, self.objective = spectral_mixture(self.schedule), objective
        self.space = SolverSpace(self.schedule, nfe)
        self.x = torch.randn(SAMPLES, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        start = float(self.schedule.rho(self.schedule.t_max))
        self.exact = reference_solution(self.denoiser, self.x, start, 0.0, 200)
        files = [file for _, file in hand_set(DenoiserSubject(self.denoiser, {}), nfe)]
        self.seeds = [file.decisions for file in files if file.decisions is not None]

    def score(self, candidates) -> list[float]:
        return [self._score(sample(self.denoiser, self.x, one.compile(self.schedule))) for one in candidates]

    def _score(self, found: torch.Tensor) -> float:
        if not found.isfinite().all():
            return math.inf
        if self.objective == "rmse":
            return float((found - self.exact).square().mean().sqrt())
        one, other = ((part.mean(0).numpy(), torch.cov(part.T).numpy()) for part in (found, self.exact))
        return frechet_distance(*one, *other)

    def search(self, strategy, evaluations: int, seed: int) -> tuple[Search, list[float]]:
        """(the search, best scores after each of its evaluations)."""
        search = Search(self.space, self.score, len(self.seeds) + evaluations, seed)
        search.evaluate(self.seeds, "seeds")
        free, search.budget = len(search.archive), len(search.archive) + evaluations
        strategy(search, evaluations)
        return search, np.minimum.accumulate([one.score for one in search.archive])[free:].tolist()


def compare(bench: Bench, evaluations: int, seed: int) -> dict:
    """One seed: the scores of both, and when one has caught up with the other."""
    plain, evolved = bench.search(evolution, evaluations, seed)
    start = time.perf_counter()
    guided, found = bench.search(s3, evaluations // 2, seed)
    seconds = (time.perf_counter() - start) / len(found)
    return {
        "scores": [evolved[evaluations // 2 - 1], evolved[-1], found[-1]],
        "caught up": [_when(found, evolved[-1]), _when(evolved, found[-1])],
        "facts": [f"{guided.facts['kendall_tau_ahead']:.2f}", f"{seconds:.2f}"],
        "best": plain.best(100),
    }


def _when(scores: list[float], target: float) -> int | str:
    return next((index for index, score in enumerate(scores, 1) if score <= target), f"> {len(scores)}")


def taus(bench: Bench, parents) -> list[float]:
    """τ on unseen schedules by number of examples."""
    random, candidates = np.random.default_rng(1), []
    for index in range(max(EXAMPLES) + HELD_OUT):
        one = bench.space.draw(random) if index % 3 == 0 else parents[int(random.integers(len(parents)))].candidate
        for _ in range(int(random.integers(1, 4)) if index % 3 else 0):
            one = bench.space.mutate(one, random)
        candidates.append(one)
    tokens, scores = [bench.space.tokens(one) for one in candidates], np.array(bench.score(candidates))
    held = slice(max(EXAMPLES), None)
    return [
        kendall_tau(RankingPredictor().fit(tokens[:count], scores[:count]).predict(tokens[held]), scores[held])
        for count in EXAMPLES
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--objective", choices=("rmse", "frechet"), default="rmse")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=600)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(arguments.nfe, arguments.objective)
    rows, scores, best = [], [], []
    for seed in range(arguments.seeds):
        found = compare(bench, arguments.evaluations, seed)
        best = best or found["best"]
        scores.append(found["scores"])
        rows.append([seed, *(f"{score:.4f}" for score in scores[-1]), *found["caught up"], *found["facts"]])
        print(" ".join(map(str, rows[-1])), flush=True)
    mean = [statistics.mean(column) for column in zip(*scores, strict=True)]
    rows.append(["mean", *(f"{score:.4f}" for score in mean), *[""] * 4])
    half, every = arguments.evaluations // 2, arguments.evaluations
    print(f"\n{arguments.nfe} calls, {arguments.objective}, after {len(bench.seeds)} hand-set schedules")
    header = ["seed", f"evolution {half}", f"evolution {every}", f"S³ {half}", f"S³ as evolution {every}",
              f"evolution as S³ {half}", "τ ahead", "s each"]  # fmt: skip
    print(table(header, rows))
    print(table(["examples", *map(str, EXAMPLES)], [["τ held out", *(f"{tau:.2f}" for tau in taus(bench, best))]]))


if __name__ == "__main__":
    main()
