"""Does DisBack come sooner to the data than the method it wraps? Eight Gaussians on a ring, small networks.

    python benchmarks/disback_ring.py            # three seeds, about 2 minutes on one core
    python benchmarks/disback_ring.py --help     # learning rates, critic updates, nodes

A network with EDM preconditioning first learns the exact denoiser of the ring. From this teacher a one-step student is
distilled by dmd, by dmd whose critic learns first for as long as DisBack records, and by DisBack. Printed is the sliced
Wasserstein-2 distance between student and data by student updates; recording comes on top.

On this ring it does not: from the update on at which the teacher takes over DisBack needs fewer than dmd needs from its
start, but no fewer than it lost under the nodes. All three end alike.
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from torch import nn

from diffaccel.cli.output import table
from diffaccel.core.rng import KeyedRandom, seeded
from diffaccel.core.schedule import EDM
from diffaccel.distill.methods.disback import DisBack
from diffaccel.distill.methods.dmd import DMD
from diffaccel.distill.task import Task
from diffaccel.models.conditions import NoConditions
from diffaccel.models.denoiser import NetworkDenoiser
from diffaccel.testing.teachers import GaussianMixtureTeacher
from diffaccel.training.config import OptimizerConfig, TrainerConfig
from diffaccel.training.rundir import RunDirectory
from diffaccel.training.trainer import Trainer

MODES, RADIUS, SPREAD = 8, 2.5, 0.15
SCHEDULE = EDM(sigma_data=RADIUS / math.sqrt(2))
START = 10.0  # noise-to-signal ratio at which the student is called


class Layers(nn.Module):
    """A perceptron on a point and Fourier features of the time."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(2 + 16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip
        self.register_buffer("frequencies", 2.0 ** torch.arange(-2, 6))

    def forward(self, x, t):
        phase = t.float()[:, None] * self.frequencies
        return self.body(torch.cat([x, phase.sin(), phase.cos()], 1))


class Points(NetworkDenoiser):
    """Points of the plane."""

    sample_shape = (2,)

    def predict(self, x_t, t, condition):
        return self.net(x_t, t)

    def feature_modules(self):
        return []


def ring() -> GaussianMixtureTeacher:
    angles = 2 * math.pi * torch.arange(MODES) / MODES
    means = RADIUS * torch.stack([angles.cos(), angles.sin()], 1)
    return GaussianMixtureTeacher([1.0] * MODES, means, [SPREAD**2], SCHEDULE)


def taught(exact: GaussianMixtureTeacher, steps: int = 4000, batch: int = 512) -> Points:
    """A network that has learnt the exact denoiser."""
    with seeded(0):
        teacher = Points(Layers(), SCHEDULE, "edm")
    optimizer = torch.optim.Adam(teacher.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        x0 = exact.draw(batch, generator).float()
        t = SCHEDULE.time(torch.rand(batch, generator=generator, dtype=torch.float64))
        x_t = teacher.noised(x0, t, torch.randn(batch, 2, generator=generator))
        rho = SCHEDULE.rho(t).float()[:, None]
        weight = 1 / rho**2 + 1 / SCHEDULE.sigma_data**2
        loss = (weight * (teacher(x_t, t) - exact(x_t, t)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return teacher


def sliced(x: torch.Tensor, y: torch.Tensor) -> float:
    """Sliced Wasserstein-2 distance of point sets of one size, over 64 directions."""
    angles = math.pi * torch.arange(64) / 64
    directions = torch.stack([angles.cos(), angles.sin()])
    difference = (x @ directions).sort(0).values - (y @ directions).sort(0).values
    return difference.square().mean().sqrt().item()


@torch.no_grad()
def distance(method, exact) -> float:
    """Of the student itself, not of its moving average, which would hide a lead."""
    z = KeyedRandom(1).normal("points", 0, 0, 4000, (2,))
    data = exact.draw(4000, torch.Generator().manual_seed(1)).float()
    return sliced(method.generate(method.roles["student"], z, None), data)


def curve(method, arguments, seed: int, exact) -> dict[int, float]:
    """Distance by student updates."""
    rates = {"student": arguments.lr, "critic": arguments.critic_lr}
    plain = {"betas": (0.0, 0.99), "weight_decay": 0.0, "clip": 1e9}
    optimizers = {name: OptimizerConfig(lr=rate, **plain) for name, rate in rates.items()}
    rest = method.config.resting_steps()
    steps = rest + max(arguments.at)
    settings = TrainerConfig(steps=steps, batch_size=arguments.batch, seed=seed, optimizers=optimizers, device="cpu")
    found = {}
    with tempfile.TemporaryDirectory() as folder, RunDirectory(Path(folder) / "run", {}) as run:
        trainer = Trainer(method, settings, run, progress=False)
        method.begin(run.path)
        for step in range(steps):
            if step - rest in arguments.at:
                found[step - rest] = distance(method, exact)
            trainer._train_step()
            trainer.step += 1
    return found | {steps - rest: distance(method, exact)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--at", type=int, nargs="+", default=[0, 10, 25, 50, 75, 100, 150, 200, 300])
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--critic-lr", type=float, default=1e-3)
    parser.add_argument("--critic-steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--record-steps", type=int, default=40, help="of --critic-steps updates each")
    parser.add_argument("--node-interval", type=int, default=10)
    parser.add_argument("--switch-interval", type=int, default=20)
    parser.add_argument("--weighting", default="normalized")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    exact = ring()
    teacher = taught(exact)
    low, start, high = (rho ** (1 / 7) for rho in (SCHEDULE.sigma_min, START, SCHEDULE.sigma_max))
    shared = {
        "student_start": (start - low) / (high - low), "critic_steps": arguments.critic_steps,
        "weighting": arguments.weighting,
    }  # fmt: skip
    path = {
        "record_steps": arguments.record_steps, "node_interval": arguments.node_interval,
        "switch_interval": arguments.switch_interval,
    }  # fmt: skip
    rows = []
    for seed in arguments.seeds:
        warm = {"critic_warmup": arguments.record_steps}
        for label, method_class, settings in (
            ("dmd", DMD, shared),
            ("dmd, critic first", DMD, shared | warm),
            ("disback", DisBack.variant({}), shared | path),
        ):
            method = method_class(Task(teacher.clone(), NoConditions()), method_class.Config(**settings), seed)
            found = curve(method, arguments, seed, exact)
            rows.append([label, seed, *(f"{found[n]:.2f}" for n in arguments.at)])
            print(rows[-1], flush=True)
    print(table(["method", "seed", *map(str, arguments.at)], rows))


if __name__ == "__main__":
    main()
