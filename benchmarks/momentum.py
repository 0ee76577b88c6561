"""Momentum under strong guidance: magnitude score and error over β, against the same rule without momentum.

    python benchmarks/momentum.py                                # about 5 minutes on one core
    python benchmarks/momentum.py --plot docs/images/momentum.png      # needs matplotlib

Class-conditional digits teacher, classifier-free guidance, 10 steps on the quadratic grid, 40 samples. The error is the
root mean square distance to the guided trajectory of 1,000 steps from the same noise; the magnitude score counts pixels
beyond 3 standard deviations of the real digits (`evaluate.metrics.magnitude`). β = 1 is the plain rule.
"""

import argparse

import torch

from diffaccel.cli.output import table
from diffaccel.core.grids import make_grid
from diffaccel.core.images import to_unit_range
from diffaccel.core.rng import KeyedRandom
from diffaccel.evaluate.metrics.magnitude import magnitude_score
from diffaccel.models.data import load_digits
from diffaccel.models.denoiser import Guided
from diffaccel.models.teachers import load_denoiser
from diffaccel.samplers.adams import ghvb_plan, ipndm_plan
from diffaccel.samplers.deis import deis_plan
from diffaccel.samplers.log_snr import dpm_solver_plan, unipc_plan
from diffaccel.samplers.registry import get_sampler
from diffaccel.samplers.sample import sample

BETAS = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0)
SCALES = (7.5, 15.0)
RULES = {
    "iPNDM 4 + heavy ball": lambda grid, beta: ipndm_plan(grid, 4, momentum="heavy-ball", beta=beta),
    "iPNDM 4 + Nesterov": lambda grid, beta: ipndm_plan(grid, 4, momentum="nesterov", beta=beta),
    "GHVB 3 + β": lambda grid, beta: ghvb_plan(grid, 3 + beta),
    "GHVB 2 + β": lambda grid, beta: ghvb_plan(grid, 2 + beta),
    "GHVB 1 + β": lambda grid, beta: ghvb_plan(grid, 1 + beta),
    "DEIS t 3 + heavy ball": lambda grid, beta: deis_plan(grid, 2, momentum="heavy-ball", beta=beta),
    "FlowAdams + heavy ball": lambda grid, beta: deis_plan(
        grid, 1, "angle", core="velocity", corrector=True, momentum="heavy-ball", beta=beta
    ),
    "DPM++ 2M + heavy ball": lambda grid, beta: dpm_solver_plan(grid, 2, momentum="heavy-ball", beta=beta),
    "UniPC 2 + heavy ball": lambda grid, beta: unipc_plan(grid, 2, momentum="heavy-ball", beta=beta),
}

DROP_IN_STEPS = (5, 6, 8, 10)
_FAST = {"grid": "fast"}
DROP_INS = [
    ("DDIM, fast", "ddim", _FAST),
    ("DPM++ 2M, trailing", "dpm-solver", {"timestep_spacing": "trailing"}),
    ("DPM++ 2M, fast", "dpm-solver", _FAST),
    ("UniPC 2, trailing", "unipc", {"timestep_spacing": "trailing"}),
    ("UniPC 2, fast", "unipc", _FAST),
    ("iPNDM 4, fast", "ipndm", {**_FAST, "solver_order": 4}),
    ("GHVB 1.8, fast", "ghvb", {**_FAST, "ghvb_order": 1.8}),
    ("FlowAdams", "flow-adams", {}),
    ("FlowAdams, guidance told", "flow-adams", {}),
]


class Setting:
    """The guided teacher at one scale, its noise, and where the fine trajectory ends."""

    @torch.no_grad()
    def __init__(self, scale: float, count: int):
        teacher = load_denoiser("digits").eval()
        real = to_unit_range(load_digits("train")[0])
        self.scale, self.schedule, self.guided = scale, teacher.schedule, Guided(teacher, scale)
        self.mean, self.std = [float(real.mean())], [float(real.std())]
        self.x = KeyedRandom(0).normal("x", 0, 0, count, teacher.sample_shape)
        self.condition = {"class_labels": torch.arange(count) % 10}
        self.fine = self.run(deis_plan(make_grid(self.schedule, 1000, "quadratic"), 1))

    @torch.no_grad()
    def run(self, plan) -> torch.Tensor:
        return sample(self.guided, self.x, plan, self.condition)

    def score(self, images: torch.Tensor) -> float:
        return float(magnitude_score(images, self.mean, self.std, cell=2).mean())

    def error(self, images: torch.Tensor) -> float:
        return float((images - self.fine).square().mean().sqrt())


def curves(setting: Setting, steps: int) -> dict[str, list[tuple[float, float]]]:
    """(magnitude score, error) by rule, one per entry of `BETAS`; the reference's score under "reference"."""
    grid = make_grid(setting.schedule, steps, "quadratic")
    found = {"reference": [(setting.score(setting.fine), 0.0)]}
    for name, rule in RULES.items():
        images = [setting.run(rule(grid, beta)) for beta in BETAS]
        found[name] = [(setting.score(image), setting.error(image)) for image in images]
    return found


def drop_in(setting: Setting) -> list[list[str]]:
    """Error by number of steps of schedulers as they come, the guidance pair's calls counted once."""
    rows = []
    for label, name, options in DROP_INS:
        told = {"guidance_scale": setting.scale} if label.endswith("told") else {}
        scheduler, cells = get_sampler(name).build({}, **told, **options), []
        for steps in DROP_IN_STEPS:
            scheduler.set_timesteps(steps)
            cells.append(f"{setting.error(setting.run(scheduler.current_plan)):.3f}")
        rows.append([label, *cells])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--plot", metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = [Setting(scale, arguments.count) for scale in SCALES]
    results = {setting.scale: curves(setting, arguments.steps) for setting in settings}
    for scale, found in results.items():
        for index, what in enumerate(("magnitude score", "error")):
            print(
                f"\nguidance {scale:g}, {arguments.steps} steps: {what} (reference {found['reference'][0][index]:.3f})"
            )
            rows = [[name, *(f"{point[index]:.3f}" for point in found[name])] for name in RULES]
            print(table(["rule", *(f"β = {beta:g}" for beta in BETAS)], rows))
    for setting in settings:
        print(f"\nguidance {setting.scale:g}: error of schedulers as they come")
        print(table(["scheduler", *(f"{steps} steps" for steps in DROP_IN_STEPS)], drop_in(setting)))
    if arguments.plot:
        plot(results, arguments.plot)


def plot(results: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(results), figsize=(9, 6), sharex=True, constrained_layout=True)
    for column, (scale, found) in enumerate(results.items()):
        for row, what in enumerate(("magnitude score", "error")):
            axis = axes[row][column]
            for name in RULES:
                axis.plot(BETAS, [point[row] for point in found[name]], "o-", markersize=3, label=name)
            axis.set(title=f"guidance {scale:g}" if row == 0 else "", ylabel=what, xlabel="β" if row else "")
    axes[0][0].legend(fontsize=6)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
