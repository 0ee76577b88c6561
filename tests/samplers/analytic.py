"""The teachers and grids that the sampler tests share."""

import torch

from diffaccel.core.grids import Grid
from diffaccel.testing import GaussianMixtureTeacher


def two_modes(schedule) -> GaussianMixtureTeacher:
    """The 2-D mixture of the golden end points."""
    return GaussianMixtureTeacher([0.4, 0.6], [[-1, 0.5], [1, 0]], [[0.04, 0.09], [0.0625, 0.01]], schedule)


def grid_of(schedule, times) -> Grid:
    """The grid with exactly these nodes, the end included."""
    times = torch.as_tensor(times, dtype=torch.float64)
    alpha, sigma = schedule.level(times)
    return Grid(schedule, tuple(times.tolist()), tuple(alpha.tolist()), tuple(sigma.tolist()))
