"""Pruning measured: scores against baselines, recovery, additivity, feature losses, and what a large U-Net saves.

    python benchmarks/pruning.py recovery digits            # about 20 minutes on one core
    python benchmarks/pruning.py recovery mnist digits-flow --ratios 0.35 --seeds 0
    python benchmarks/pruning.py features digits            # normalised, plain and no feature loss at equal steps
    python benchmarks/pruning.py additivity digits mnist digits-flow tiny-sd
    python benchmarks/pruning.py latency                    # a random U-Net of Stable Diffusion 1.5's size

recovery: the share `ratio` of the parameters goes, chosen by each method as its paper does (ld-pruner by lowest scores,
laptop by a knapsack), magnitude and random by lowest scores; random is the mean over five draws, which the seeds share
out among them. FD of N = 1,000 images
at the teacher's own number of steps, before and after the same recovery, whose steps, states and learning rates are the
same for all. A seed is that of calibration, recovery and images alike.

additivity: Spearman's correlation of summed single losses with joint losses on 40 random sets of up to a third of all layers.

latency: networks take turns in one process; peak memory is that of a process that builds the network, calls it once and
does nothing else, above what its imports need, two processes each.

Every figure is appended to --log as soon as it is known, one JSON object a line, and is not computed again.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from released import released

from diffaccel.cli.output import table
from diffaccel.evaluate.prune_judge import Judge
from diffaccel.models.teachers import load_pipeline
from diffaccel.prune.additivity import check_additivity
from diffaccel.prune.calibration import Calibration, calibrate
from diffaccel.prune.classes import prune
from diffaccel.prune.criteria import Laptop
from diffaccel.prune.pipelines import PipelineRecovery, call_of, prompts_for
from diffaccel.prune.plan import measure_alternately
from diffaccel.prune.scores import Remembered, get_criterion, score
from diffaccel.prune.selection import select
from diffaccel.prune.settings import PruningConfig, resolve_pruning
from diffaccel.prune.survey import survey_network
from diffaccel.search.layers import network_of
from diffaccel.training.recipes import complete
from diffaccel.training.rundir import RunDirectory

METHODS = ("ld-pruner", "laptop", "magnitude", "random")
DRAWS = 5
SETTINGS = {"tiny-sd": {"guidance_scale": 3.0, "samples": 4, "steps": 5}}
# No pictures and one checkpoint at the end, states of a cheaper solver: all that a recovery computes besides its steps.
QUICK = ("trainer.sample_every=0", "trainer.checkpoint_every=0", "method.pool=512", "method.pool_steps=10")


class Log:
    """Figures by key, kept in a file of JSON lines."""

    def __init__(self, path: Path):
        self.path, self.entries = path, {}
        for line in path.read_text().splitlines() if path.exists() else ():
            entry = json.loads(line)
            self.entries[json.dumps(entry["key"])] = entry

    def get(self, key: list, compute) -> dict:
        name = json.dumps(key)
        if name not in self.entries:
            began = time.monotonic()
            entry = {"key": key, **compute()}
            entry["took"] = round(time.monotonic() - began, 1)
            self.entries[name] = entry
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            print(json.dumps(entry), flush=True)
        return self.entries[name]


class Bench:
    """One teacher: its scores, sets and distances for one seed."""

    def __init__(self, teacher: str, seed: int, num: int):
        more = {**SETTINGS.get(teacher, {}), "seed": seed, "num": num, "curve": ()}
        self.config = PruningConfig(teacher, **more)
        self.prompts = prompts_for(self.config)
        self.pipe = load_pipeline(teacher)
        self.judge = Judge(self.config, self.pipe, self.prompts)
        self._calibration, self._survey, self._scores = None, None, {}

    @property
    def calibration(self) -> Calibration:
        if self._calibration is None:
            config, conditions = self.config, self.prompts and [{"prompt": one} for one in self.prompts]
            more = {"count": config.samples, "steps": config.steps, "seed": config.seed}
            self._calibration = calibrate(self.pipe, conditions, call_of(config), **more)
        return self._calibration

    @property
    def survey(self):
        if self._survey is None:
            self._survey = survey_network(self.calibration.network, self.calibration.one_call())
        return self._survey

    def chosen(self, method: str, ratio: float, draw: int) -> tuple[str, ...]:
        if (method, draw) not in self._scores:
            kind = get_criterion(method).load()
            criterion = kind(self.calibration, seed=draw) if method == "random" else kind(self.calibration)
            self._scores[method, draw] = score(criterion, self.survey.names)
        return select(self.survey, self._scores[method, draw], ratio, solver=get_criterion(method).solver).names

    def pruned(self, names):
        pipe = load_pipeline(self.config.model)
        whole = load_pipeline(self.config.model)
        return prune(pipe, names), network_of(whole)

    def before(self, names) -> dict:
        pipe, _ = self.pruned(names)
        left = sum(weight.numel() for weight in network_of(pipe).parameters())
        return {"fd": finite(self.judge(pipe)), "left": left / self.survey.parameters}

    def after(self, names, steps: int, features: str) -> dict:
        given = {"model": self.config.model, "seed": self.config.seed}
        _, recovery = resolve_pruning(given, steps, {"method": {"features": features}}, QUICK)
        pipe, teacher = self.pruned(names)
        trained = PipelineRecovery(self.config, recovery, pipe)
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            with RunDirectory(Path(folder) / "run", complete(recovery, ["student"])) as run:
                trained.fit(pipe, teacher, run, False, progress=False)
            seconds = time.process_time() - began
            return {"fd": finite(self.judge(load_pipeline(f"{folder}/run/final"))), "cpu": round(seconds, 1)}


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def mean(values) -> float:
    values = [math.inf if value is None else value for value in values]
    return statistics.mean(values) if values else math.nan


def recovery_table(log: Log, teachers, ratios, seeds, draws: int, steps: int, num: int) -> None:
    """Distances by method, before and after."""
    for teacher in teachers:
        found: dict = {}
        for turn, seed in enumerate(seeds):
            bench = Bench(teacher, seed, num)
            whole = log.get([teacher, seed, num, "whole"], lambda bench=bench: bench.before(()))
            for ratio in ratios:
                for method in METHODS:
                    for draw in range(turn, draws, len(seeds)) if method == "random" else [0]:
                        names = [*bench.chosen(method, ratio, draw)]
                        keys = [teacher, seed, num, names], [teacher, seed, num, names, steps, "normalized"]
                        before = log.get(keys[0], lambda b=bench, names=names: b.before(names))
                        after = log.get(keys[1], lambda b=bench, names=names: b.after(names, steps, "normalized"))
                        found.setdefault((ratio, method), []).append(
                            (before["fd"], after["fd"], before["left"], whole["fd"], seed)
                        )
        rows = []
        for (ratio, method), cells in found.items():
            by_seed = [mean(cell[1] for cell in cells if cell[4] == seed) for seed in seeds]
            teachers_own = mean(cell[3] for cell in cells)
            columns = [mean(cell[index] for cell in cells) for index in range(3)]
            each = " / ".join(f"{one:.3g}" for one in by_seed)
            cells = [f"{columns[2]:.3f}", f"{columns[0]:.3f}", f"{columns[1]:.3f}", each]
            rows.append([f"{ratio:g}", method, *cells, f"{columns[1] / teachers_own:.2f}"])
        print(
            f"\n{teacher}: FD of the whole model {teachers_own:.3f} (N = {num}, seeds {seeds}); {steps} steps of recovery"
        )
        header = ["ratio", "method", "parameters left", "FD before", "FD after", "by seed", "after / whole"]
        print(table(header, rows), flush=True)


def features_table(log: Log, teachers, ratios, seeds, steps: int, num: int) -> None:
    """Distances after recovery with each feature loss, of what laptop leaves."""
    for teacher in teachers:
        found: dict = {}
        for seed in seeds:
            bench = Bench(teacher, seed, num)
            for ratio in ratios:
                names = [*bench.chosen("laptop", ratio, 0)]
                for features in ("normalized", "plain", "none"):
                    key = [teacher, seed, num, names, steps, features]
                    after = log.get(key, lambda b=bench, n=names, f=features: b.after(n, steps, f))
                    found.setdefault((ratio, features), []).append(after["fd"])
        rows = [[f"{ratio:g}", what, f"{mean(fds):.3f}", *map(cell, fds)] for (ratio, what), fds in found.items()]
        print(f"\n{teacher}: FD (N = {num}) after {steps} steps of recovery from what laptop leaves")
        print(table(["ratio", "features", "mean", *(f"seed {seed}" for seed in seeds)], rows), flush=True)


def cell(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def additivity_table(log: Log, teachers, seeds, count: int) -> None:
    """Rank correlation of summed with joint losses."""
    rows = []
    for teacher in teachers:
        for seed in seeds:

            def compute(teacher=teacher, seed=seed) -> dict:
                bench = Bench(teacher, seed, 2)
                criterion = Remembered(Laptop(bench.calibration))
                found = check_additivity(criterion, score(criterion, bench.survey.names), count, seed=seed)
                pairs = sorted(joint / total for total, joint in zip(found.sums, found.joints, strict=True))
                share = {"median": statistics.median(pairs), "low": pairs[0], "high": pairs[-1]}
                return {"correlation": found.correlation, "layers": len(bench.survey.names), "joint / sum": share}

            entry = log.get([teacher, seed, count, "additivity"], compute)
            share = entry["joint / sum"]
            told = f"{share['median']:.2f} ({share['low']:.2f} … {share['high']:.2f})"
            rows.append([teacher, seed, entry["layers"], f"{entry['correlation']:.3f}", told])
    print(f"\nlaptop: summed single losses against joint losses, {count} random sets")
    print(table(["teacher", "seed", "layers", "rank correlation", "joint / sum, median (range)"], rows), flush=True)


def call(network, edge: int):
    x, states = torch.randn(1, 4, edge, edge), torch.randn(1, 77, 768)
    return (x, torch.tensor([500.0]), states), {}


def latency_table(log: Log, ratio: float, edge: int, rounds: int) -> None:
    """Time in turns and peak memory of the whole and of pruned networks."""

    def compute() -> dict:
        survey, chosen, seconds = timed(ratio, edge, rounds)
        found = {"whole": {"seconds": seconds[0], "parameters": survey.parameters, "names": []}}
        for (cost, one), taken in zip(chosen.items(), seconds[1:], strict=True):
            left = survey.parameters - sum(survey[name].parameters for name in one.names)
            found[cost] = {"seconds": taken, "parameters": left, "names": one.names}
        return found

    entry = log.get(["sd15", ratio, edge, rounds, "latency"], compute)
    rows, whole = [], entry["whole"]
    peak = {
        name: log.get(["sd15", edge, one["names"], "peak"], lambda names=one["names"]: {"MiB": peaks(names, edge)})
        for name, one in entry.items()
        if isinstance(one, dict)
    }
    for name in ("whole", "parameters", "seconds"):
        one = entry[name]
        label = name if name == "whole" else f"{ratio:g} of {'latency' if name == 'seconds' else name}"
        memory = [statistics.mean(peak[side]["MiB"]) for side in (name, "whole")]
        rows.append([
            label, f"{one['parameters'] / 1e6:.0f} M", f"{one['seconds']:.3f}", f"{1 - one['seconds'] / whole['seconds']:.1%}",
            f"{memory[0]:.0f}", f"{1 - memory[0] / memory[1]:.1%}", len(one["names"]),
        ])  # fmt: skip
    print(
        f"\nU-Net of Stable Diffusion 1.5's size, random weights, one sample of {edge}×{edge} latents, {rounds} rounds in turns"
    )
    header = ["saves", "parameters", "seconds", "less time", "peak MiB", "less memory", "layers removed"]
    print(table(header, rows), flush=True)


def timed(ratio: float, edge: int, rounds: int):
    """What the large U-Net could lose, what laptop chooses by either cost, and the seconds of all in turns."""
    network = released("sd15")
    args, kwargs = call(network, edge)

    def run():
        network(*args, **kwargs)

    survey = survey_network(network, run, repeats=2)
    scores = score(Laptop(Given(network, [call(network, 8)])), survey.names)
    chosen = {cost: select(survey, scores, ratio, cost) for cost in ("parameters", "seconds")}
    return survey, chosen, measure_alternately(network, run, [(), *(one.names for one in chosen.values())], rounds)


class Given:
    """What `Laptop` needs of a calibration, for a network without a pipeline."""

    def __init__(self, network, calls):
        self.network, self.calls = network, calls

    @torch.no_grad()
    def outputs(self):
        for args, kwargs in self.calls:
            yield self.network(*args, **kwargs)[0].float()


def peaks(names, edge: int) -> list[float]:
    """Peak memory in MiB of two processes of their own."""
    command = [sys.executable, __file__, "peak", "--edge", str(edge), "--layers", json.dumps([*names])]
    return [float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(2)]


def print_peak(names, edge: int) -> None:
    import diffusers.models.unets.unet_2d_condition  # noqa: F401  its memory is not the network's

    before = _peak_of_this_process()
    network = released("sd15", pruned=names)
    args, kwargs = call(network, edge)
    with torch.no_grad():
        network(*args, **kwargs)
    print(_peak_of_this_process() - before)


def _peak_of_this_process() -> float:
    """MiB, on Linux; resource's ru_maxrss begins with that of the parent."""
    return float(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("recovery", "features", "additivity", "latency", "peak"))
    parser.add_argument("teachers", nargs="*", default=["digits"])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.35, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--steps", type=int, default=150, help="of recovery")
    parser.add_argument("--num", type=int, default=1000, help="images of a distance")
    parser.add_argument("--count", type=int, default=40, help="random sets of layers")
    parser.add_argument("--edge", type=int, default=32, help="latents of the large U-Net")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=json.loads, default=[], help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, default=Path("pruning.jsonl"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "peak":
        return print_peak(given.layers, given.edge)
    log = Log(given.log)
    if given.what == "recovery":
        recovery_table(log, given.teachers, given.ratios, given.seeds, given.draws, given.steps, given.num)
    elif given.what == "features":
        features_table(log, given.teachers, given.ratios, given.seeds, given.steps, given.num)
    elif given.what == "additivity":
        additivity_table(log, given.teachers, given.seeds, given.count)
    else:
        latency_table(log, given.ratios[len(given.ratios) // 2], given.edge, given.rounds)
    return None


if __name__ == "__main__":
    main()
