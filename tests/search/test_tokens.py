"""What predictors see: where a plan leads on Gaussian data, against the denoiser of such data."""

import numpy as np
import pytest
import torch

from diffaccel.core.errors import UsageError
from diffaccel.core.schedule import EDM, Flow, from_diffusers
from diffaccel.samplers.sample import sample
from diffaccel.samplers.usf import Decision, SolverSchedule
from diffaccel.search.space import SolverSpace
from diffaccel.search.tokens import _WIDTHS, gaussian_errors, tokens
from diffaccel.testing import GaussianMixtureTeacher

SCHEDULES = {"vp": from_diffusers({}), "edm": EDM(), "flow": Flow()}


def errors(candidate, schedule):
    plan, grid = candidate.compile(schedule), candidate.grid(schedule)
    levels = [(row.alpha, row.sigma) for row in plan.rows] + [(grid.alpha[-1], grid.sigma[-1])]
    return gaussian_errors(plan, levels[1:], schedule)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_last_error_is_that_of_sampling(name):
    """A sampler with the exact denoiser of N(0, w²) ends that much away from the probability flow."""
    schedule, random = SCHEDULES[name], np.random.default_rng(0)
    for _ in range(5):
        candidate = SolverSpace(schedule, 5).draw(random)
        plan = candidate.compile(schedule)
        top = [float(level) for level in schedule.level(torch.tensor(schedule.t_max, dtype=torch.float64))]
        for width, error in zip(_WIDTHS.tolist(), errors(candidate, schedule)[-1].tolist(), strict=True):
            data = GaussianMixtureTeacher([1.0], [[0.0]], [[width**2]], schedule)
            x = torch.full((1, 1), schedule.initial_scale, dtype=torch.float64)
            end = float(candidate.grid(schedule).sigma[-1]), float(candidate.grid(schedule).alpha[-1])
            scale = ((end[1] * width) ** 2 + end[0] ** 2) ** 0.5 / ((top[0] * width) ** 2 + top[1] ** 2) ** 0.5
            assert float(sample(data, x * plan.initial, plan)) == pytest.approx(
                float(x) * scale * (1 + error), rel=1e-9
            )


@pytest.mark.parametrize("name", SCHEDULES)
def test_errors_vanish_in_the_second_order(name):
    found = []
    for steps in (40, 80):
        axis = SolverSpace(SCHEDULES[name], steps).axis
        times = axis.times(np.linspace(axis.top, 0.0, steps, endpoint=False))
        step = Decision(order=2, core="velocity", variable="angle")
        found.append(errors(SolverSchedule(times, (step,) * steps), SCHEDULES[name]).abs().amax(dim=0))
    ratios = (found[0] / found[1])[1:]  # the narrowest data is not resolved by 40 steps
    assert ((ratios > 3.5) & (ratios < 4.6)).all() and found[1].max() < 0.06


def test_tokens_are_finite_whatever_the_schedule():
    random = np.random.default_rng(3)
    for schedule in SCHEDULES.values():
        space = SolverSpace(schedule, 6)
        shapes = {tokens(space.draw(random), schedule).shape[1] for _ in range(50)}
        assert len(shapes) == 1
    with pytest.raises(UsageError):
        tokens(SolverSchedule((5000.0,), (Decision(),)), SCHEDULES["vp"])
