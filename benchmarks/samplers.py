"""Samplers and grids on an exact teacher and on the digits teacher: distance to the exact or fine trajectory.

    python benchmarks/samplers.py     # about a minute on one core

The exact teacher is a mixture of 8 Gaussians in 32 dimensions on the linear DDPM schedule; all samplers start from the same
noise, and the distance is the root mean square over samples and dimensions.
"""

import torch

from diffaccel.cli.output import table
from diffaccel.core.grids import make_grid
from diffaccel.core.rng import KeyedRandom
from diffaccel.core.schedule import from_diffusers
from diffaccel.models.teachers import load_denoiser
from diffaccel.samplers.ddim import ddim_plan
from diffaccel.samplers.deis import deis_plan
from diffaccel.samplers.sample import sample
from diffaccel.testing import GaussianMixtureTeacher

STEPS = (5, 8, 10, 20)
RULES = [
    ("DDIM", "trailing", lambda grid: ddim_plan(grid)),
    ("DDIM", "quadratic", lambda grid: ddim_plan(grid)),
    *(
        (f"DEIS {variable}, solver_order {order + 1}", kind, lambda grid, o=order, v=variable: deis_plan(grid, o, v))
        for variable in ("t", "rho", "log-rho")
        for order in (1, 2)
        for kind in ("trailing", "quadratic", "karras", "log-snr")
    ),
]


def mixture() -> GaussianMixtureTeacher:
    random = KeyedRandom(0)
    means = 0.8 * random.normal("means", 0, 0, 8, (32,)).double()
    variances = (0.05 + 0.2 * random.uniform("variances", 0, 0, 8, (32,))) ** 2
    return GaussianMixtureTeacher([1 / 8] * 8, means, variances, from_diffusers({}))


@torch.no_grad()
def distances(denoiser, x, condition=None) -> list[list[str]]:
    def run(plan):
        return sample(denoiser, x, plan, condition)

    fine = run(deis_plan(make_grid(denoiser.schedule, 500, "quadratic"), 2))
    rows = []
    for label, kind, plan in RULES:
        errors = [
            (run(plan(make_grid(denoiser.schedule, steps, kind))) - fine).square().mean().sqrt() for steps in STEPS
        ]
        rows.append([label, kind, *(f"{float(error):.4f}" for error in errors)])
    return rows


def main() -> None:
    torch.set_num_threads(1)
    header = ["rule", "grid", *(f"{steps} steps" for steps in STEPS)]
    x = KeyedRandom(0).normal("x", 0, 0, 1000, (32,)).double()
    print("exact mixture, 1,000 samples, against 500 steps\n" + table(header, distances(mixture(), x)), "\n")
    digits = load_denoiser("digits").eval()
    x = KeyedRandom(0).normal("x", 0, 0, 100, digits.sample_shape)
    labels = {"class_labels": torch.arange(100) % 10}
    print("digits, 100 samples, against 500 steps\n" + table(header, distances(digits, x, labels)))


if __name__ == "__main__":
    main()
