"""The teachers and grids that the sampler tests share."""

import torch

from diffaccel.core.grids import Grid
from diffaccel.core.prediction import convert
from diffaccel.core.schedule import from_diffusers
from diffaccel.testing import GaussianMixtureTeacher


def two_modes(schedule) -> GaussianMixtureTeacher:
    """The 2-D mixture of the golden end points."""
    return GaussianMixtureTeacher([0.4, 0.6], [[-1, 0.5], [1, 0]], [[0.04, 0.09], [0.0625, 0.01]], schedule)


def grid_of(schedule, times) -> Grid:
    """The grid with exactly these nodes, the end included."""
    times = torch.as_tensor(times, dtype=torch.float64)
    alpha, sigma = schedule.level(times)
    return Grid(schedule, tuple(times.tolist()), tuple(alpha.tolist()), tuple(sigma.tolist()))


def exact_run(scheduler, x: torch.Tensor) -> torch.Tensor:
    """A prepared VP or flow scheduler driven by the exact posterior mean of `two_modes`.

    Args:
        scheduler: after `set_timesteps`; its ``prediction_type`` decides what it is fed.
        x: (B, 2) initial state, float64 for comparisons.
    """
    schedule = from_diffusers(scheduler)
    teacher = two_modes(schedule)
    for t in scheduler.timesteps:
        times = t.double().expand(len(x))
        alpha, sigma = (value.unsqueeze(1).to(x) for value in schedule.level(times))
        output = convert(teacher(x, times), x, "sample", scheduler.config.prediction_type, alpha, sigma)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x
