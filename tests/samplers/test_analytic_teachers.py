import math

import pytest
import torch
from analytic import two_modes

from diffaccel.core.schedule import VE, Flow, VPLinear
from diffaccel.testing import GaussianTeacher, reference_solution

SCHEDULES = pytest.mark.parametrize("schedule", [VPLinear(), VE(), Flow()], ids=["VP", "VE", "flow"])


@SCHEDULES
def test_mixture_is_the_minimum_mean_square_estimate(schedule):
    """Against the posterior mean by brute force: weights over many draws of the data."""
    teacher = two_modes(schedule)
    data = teacher.draw(400_000, torch.Generator().manual_seed(0))
    t = schedule.time(0.6).reshape(1)
    alpha, sigma = (float(value) for value in schedule.level(t))
    x_t = torch.tensor([[0.4 * alpha, 0.3 * sigma]], dtype=torch.float64)
    weight = torch.softmax(-((x_t - alpha * data) ** 2).sum(1) / (2 * sigma**2), 0)
    torch.testing.assert_close(teacher(x_t, t)[0], weight @ data, rtol=0.03, atol=0.03)


@SCHEDULES
def test_reference_solution_equals_the_closed_form(schedule):
    teacher = GaussianTeacher([1.0, -2.0], [0.5, 0.2], schedule)
    x = schedule.initial_scale * torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start, stop = float(schedule.rho(schedule.t_max)), float(schedule.rho(schedule.t_min))
    levels = [tuple(map(float, schedule.level(t))) for t in (schedule.t_max, schedule.t_min)]
    torch.testing.assert_close(
        reference_solution(teacher, x, start, stop, 500), teacher.transport(x, *levels), rtol=1e-6, atol=1e-6
    )


def test_pure_noise_clean_end_labels_and_dtypes():
    teacher = two_modes(Flow())
    x = torch.randn(2, 2)
    torch.testing.assert_close(teacher(x, torch.full((2,), 1000.0)), torch.tensor([[0.2, 0.2]] * 2))
    torch.testing.assert_close(teacher(x, torch.zeros(2)), x)
    labels = {"class_labels": torch.tensor([0, 2])}
    conditional = teacher(x, torch.full((2,), 1000.0), labels)
    torch.testing.assert_close(conditional, torch.tensor([[-1.0, 0.5], [0.2, 0.2]]))
    torch.testing.assert_close(teacher(x, torch.ones(2), teacher.null_condition(2)), teacher(x, torch.ones(2)))
    assert teacher(x.double(), torch.ones(2)).dtype == torch.float64 and teacher(x, torch.ones(2)).dtype == x.dtype


def test_flow_map_from_pure_noise_to_the_clean_image():
    schedule = Flow()
    teacher = GaussianTeacher([1.0, -2.0], [0.5, 0.2], schedule)
    x = torch.randn(4, 2, dtype=torch.float64)
    exact = teacher.transport(x, (0.0, 1.0), (1.0, 0.0))
    torch.testing.assert_close(exact, teacher.means[0] + x * teacher.variances[0].sqrt())
    torch.testing.assert_close(reference_solution(teacher, x, math.inf, 0.0, 400), exact, rtol=1e-7, atol=1e-7)
