"""Our samplers against diffusers' at few evaluations: distance to the exact trajectory from the same noise.

    python benchmarks/samplers.py                      # both teachers, five seeds; about 15 minutes on one core
    python benchmarks/samplers.py --teachers mixture --plot samplers.png     # the plot needs matplotlib

Teachers: the embedded digits (100 samples, against 1,000 steps) and `testing.spectral_mixture` (500 samples in 64
dimensions, against its exact probability flow), both on the linear DDPM schedule. Every scheduler runs through its own
`set_timesteps` and `step`. Figures are root mean squares over samples and dimensions, averaged over the seeds.
Diffusers' side: DDIM, DEIS 2/3, DPM-Solver++ 2M/3M and UniPC 2/3, each on all its grids and with its options for the
last steps, the best picked for every number of evaluations. Ours: the best picked likewise, and the default, unchanged.
"""

import argparse
import itertools
import math
import warnings

import diffusers
import torch

from diffaccel.cli.output import table
from diffaccel.core.grids import make_grid
from diffaccel.core.rng import KeyedRandom
from diffaccel.core.schedule import from_diffusers
from diffaccel.models.teachers import load_denoiser
from diffaccel.samplers.deis import deis_plan
from diffaccel.samplers.registry import get_sampler
from diffaccel.samplers.sample import sample
from diffaccel.testing import reference_solution, spectral_mixture

NFE = (5, 6, 8, 10)
CONFIG = {"prediction_type": "sample"}  # of the linear DDPM schedule
SPACINGS = [{"timestep_spacing": "linspace"}, {"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"}]
SIGMAS = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]


def theirs():
    """(label, maker) of every diffusers scheduler in the comparison."""
    for spacing in SPACINGS:
        yield _label("DDIM", spacing), lambda s=spacing: diffusers.DDIMScheduler(**CONFIG, **s, clip_sample=False)
    for order, lower in itertools.product((2, 3), (True, False)):
        more = {"solver_order": order, "lower_order_final": lower}
        for grid in SPACINGS + SIGMAS:
            settings = {**CONFIG, **grid, **more}
            yield _label("DEIS", grid, more), lambda s=settings: diffusers.DEISMultistepScheduler(**s)
            for kind in ("bh1", "bh2"):
                yield (
                    _label(f"UniPC {kind}", grid, more),
                    lambda s=settings, kind=kind: diffusers.UniPCMultistepScheduler(**s, solver_type=kind),
                )
        for grid, euler in itertools.product([*SPACINGS, *SIGMAS, {"use_lu_lambdas": True}], (True, False)):
            settings = {**CONFIG, **grid, **more, "euler_at_final": euler}
            yield _label("DPM++", grid, more), lambda s=settings: diffusers.DPMSolverMultistepScheduler(**s)


def ours():
    """(label, maker) of our side; the first is the default."""
    rules = [
        ("flow-adams", {}),
        ("flow-adams", {"corrector": False, "momentum": None}),
        ("flow-adams", {"momentum": None}),
        ("flow-adams", {"solver_order": 3}),
        ("deis", {"solver_order": 3}),
        ("deis", {"variable": "angle", "solver_order": 3}),
        ("deis", {"variable": "angle", "core": "data", "solver_order": 2, "corrector": True}),
        ("ipndm", {"solver_order": 3}),
        ("ghvb", {"ghvb_order": 2.5}),
        ("unipc", {"solver_order": 3}),
    ]
    grids = [{"grid": "fast", "grid_power": power} for power in (1.5, 1.75, 2.0)]
    grids += [{"grid": "fast", "grid_start": 18.0, "grid_power": power} for power in (1.75, 2.0)]
    grids += [{"grid": "quadratic", "grid_power": power} for power in (1.5, 2.0)]
    grids += [{"timestep_spacing": "trailing"}, {"timestep_spacing": "leading"}, {"grid": "ays-sd15"}]
    yield "default", lambda: get_sampler("flow-adams").build(CONFIG)
    for (name, more), grid in itertools.product(rules, grids):
        yield _label(name, grid, more), lambda n=name, s={**more, **grid}: get_sampler(n).build(CONFIG, **s)


def _label(name: str, *settings: dict) -> str:
    settings = {key: value for part in reversed(settings) for key, value in part.items()}
    return " ".join([name, *(f"{key}={value}" for key, value in settings.items())])


def drive(make, denoiser, x: torch.Tensor, condition, calls: int) -> torch.Tensor:
    """A scheduler's own sampling loop; not finite where it does not run with this many calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = make()
        try:
            scheduler.set_timesteps(calls)
            if len(scheduler.timesteps) != calls:
                return torch.full_like(x, torch.nan)
            for t in scheduler.timesteps:
                x0 = denoiser(x, t.double().expand(len(x)), condition).to(x.dtype)
                x = scheduler.step(x0, t, x, return_dict=False)[0]
        except (RuntimeError, IndexError):  # singular systems of UniPC without lower_order_final
            return torch.full_like(x, torch.nan)
    return x


def mixture_bench(seeds: int):
    denoiser = spectral_mixture(from_diffusers({}))
    draws = [
        torch.randn(100, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(seeds)
    ]
    x = torch.cat(draws)
    exact = reference_solution(denoiser, x, float(denoiser.schedule.rho(denoiser.schedule.t_max)), 0.0, 400)
    return denoiser, x, None, exact


def digits_bench(seeds: int):
    denoiser = load_denoiser("digits").eval()
    x = torch.cat([KeyedRandom(seed).normal("x", 0, 0, 20, denoiser.sample_shape) for seed in range(seeds)])
    labels = {"class_labels": torch.arange(len(x)) % 10}
    fine = deis_plan(make_grid(denoiser.schedule, 1000, "quadratic"), 2)
    return denoiser, x, labels, sample(denoiser, x, fine, labels)


BENCHES = {"mixture": mixture_bench, "digits": digits_bench}


@torch.no_grad()
def errors(makers, bench, seeds: int) -> dict[str, list[float]]:
    """Mean error over seeds by label, one per entry of `NFE`."""
    denoiser, x, condition, exact = bench
    found = {}
    for label, make in makers:
        gaps = [drive(make, denoiser, x, condition, calls) - exact for calls in NFE]
        found[label] = [
            float(torch.stack([part.square().mean().sqrt() for part in gap.chunk(seeds)]).mean()) for gap in gaps
        ]
    return found


def best(found: dict[str, list[float]], index: int) -> str:
    finite = {label: values[index] for label, values in found.items() if math.isfinite(values[index])}
    return min(finite, key=finite.get)


def report(name: str, stock: dict, own: dict) -> None:
    rows = []
    for index, calls in enumerate(NFE):
        left, right = best(stock, index), best(own, index)
        base = stock[left][index]
        rows.append(
            [calls, f"{base:.4f}", left, f"{own['default'][index]:.4f}", f"{own['default'][index] / base:.2f}",
             f"{own[right][index]:.4f}", f"{own[right][index] / base:.2f}", right]
        )  # fmt: skip
    print(f"\n{name}: distance to the exact trajectory")
    print(table(["NFE", "diffusers", "its best", "default", "ratio", "ours", "ratio", "our best"], rows))
    chosen = [label for label in own if label.endswith("grid=fast grid_power=1.75") or label == "default"]
    print(table(["ours, as they come and on the grid fast", *map(str, NFE)],
                [[label, *(f"{value:.4f}" for value in own[label])] for label in chosen]))  # fmt: skip


def plot(results: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(4.6 * len(results), 3.6), constrained_layout=True)
    families = ("DDIM", "DEIS", "DPM++", "UniPC")
    for axis, (name, (stock, own)) in zip(axes if len(results) > 1 else [axes], results.items(), strict=True):
        for family in families:
            members = [values for label, values in stock.items() if label.startswith(family)]
            lowest = [min(filter(math.isfinite, column)) for column in zip(*members, strict=True)]
            axis.plot(NFE, lowest, "o--", linewidth=1, markersize=3, label=f"diffusers {family}, best grid")
        axis.plot(NFE, own["default"], "ko-", linewidth=2, label="FlowAdamsScheduler, as it comes")
        axis.set(title=name, xlabel="network evaluations", ylabel="distance to the exact image", yscale="log")
        axis.set_xticks(NFE)
    axes.flat[0].legend(fontsize=7) if len(results) > 1 else axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--plot", metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in arguments.teachers:
        with torch.no_grad():
            bench = BENCHES[name](arguments.seeds)
        results[name] = errors(theirs(), bench, arguments.seeds), errors(ours(), bench, arguments.seeds)
        report(name, *results[name])
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
