import math

import pytest
import torch
from analytic import two_modes

from diffaccel.core.errors import UsageError
from diffaccel.core.grids import make_grid
from diffaccel.core.schedule import Flow, VPLinear, from_diffusers
from diffaccel.samplers.ddim import ddim_plan
from diffaccel.samplers.sample import sample
from diffaccel.testing import GaussianTeacher


def test_variance_is_that_of_the_paper():
    schedule = from_diffusers({})
    grid = make_grid(schedule, 10)
    plan = ddim_plan(grid, eta=0.7)
    for i, row in enumerate(plan.rows):
        now, after = grid.alpha[i] ** 2, grid.alpha[i + 1] ** 2
        expected = 0.7 * math.sqrt((1 - after) / (1 - now) * (1 - now / after))
        assert row.noise == pytest.approx(expected, abs=1e-12)
    assert plan.rows[-1].noise == 0.0


@pytest.mark.parametrize("schedule", [VPLinear(), Flow()], ids=["VP", "flow"])
def test_ancestral_sampling_of_a_gaussian_reaches_its_spread(schedule):
    teacher = GaussianTeacher([1.0, -2.0], [0.5, 0.2], schedule)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 2, dtype=torch.float64, generator=generator)
    plan = ddim_plan(make_grid(schedule, 150, "quadratic"), eta=1.0)
    draws = sample(teacher, x, plan, noise=lambda _, shape: torch.randn(shape, generator=generator))
    torch.testing.assert_close(draws.mean(0), teacher.means[0], rtol=0.03, atol=0.03)
    torch.testing.assert_close(draws.std(0), torch.tensor([0.5, 0.2], dtype=torch.float64), rtol=0.08, atol=0)


def test_one_step_from_pure_noise_is_the_mean_prediction():
    schedule = Flow()
    teacher = two_modes(schedule)
    x = torch.randn(3, 2, dtype=torch.float64)
    one = sample(teacher, x, ddim_plan(make_grid(schedule, 1)))
    torch.testing.assert_close(one, teacher(x, torch.full((3,), 1000.0)))
    torch.testing.assert_close(one[0], torch.tensor([0.2, 0.2], dtype=torch.float64))


def test_errors():
    grid = make_grid(Flow(), 4)
    with pytest.raises(UsageError, match="eta"):
        ddim_plan(grid, 1.5)
    with pytest.raises(UsageError, match="noise="):
        sample(two_modes(Flow()), torch.zeros(1, 2), ddim_plan(grid, 1.0))
