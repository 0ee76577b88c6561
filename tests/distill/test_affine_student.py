"""The one student whose optimum under every divergence is known: x = μ + s·z against two modes, without network error.

Teacher ½N(−3, 0.7²) + ½N(3, 0.7²), student from μ = 2, s = 0.8; scores and density ratio are exact. Matching under reverse
KL stays in the near mode; forward KL has the teacher's moments, 0 and 3.0806, whatever the weights of the noise levels.
"""

import math

import pytest
import torch
from distilling import draw
from torch import nn

from diffaccel.core.schedule import VE
from diffaccel.distill.methods.f_distill import FDistill
from diffaccel.distill.task import Task
from diffaccel.models.conditions import NoConditions
from diffaccel.testing.teachers import GaussianMixtureTeacher

SCHEDULE = VE(0.002, 80.0)
LEVELS = torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)
MEANS, STD = (-3.0, 3.0), 0.7


class Affine(nn.Module):
    """x = μ + s·z in the student's role, and the exact denoiser of its samples in the critic's."""

    sample_shape = (1, 1, 1)

    def __init__(self):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(0.8))

    def forward(self, x_t, t, condition=None):
        return self.mean + self.std * x_t / SCHEDULE.t_max

    def denoised(self, x_t, t, condition=None):
        share = self.std**2 / (self.std**2 + t.float().reshape(-1, 1, 1, 1) ** 2)
        return self.mean + share * (x_t - self.mean)


class ExactFDistill(FDistill):
    """f-distill with exact scores and an exact density ratio, at three noise levels in turn."""

    def needs_discriminator(self):
        return False

    def times(self, draw, purpose):
        return torch.arange(draw.count) % 3 / 3.0 + 0.1, LEVELS[torch.arange(draw.count) % 3]

    def judged(self, x_t, t, condition):
        student, sigma = self.roles["student"], t.float()
        x = x_t.detach().flatten()
        p = sum(0.5 * normal(x, mean, (STD**2 + sigma**2).sqrt()) for mean in MEANS)
        q = normal(x, student.mean.detach(), (student.std.detach() ** 2 + sigma**2).sqrt())
        return None, torch.log(p / q)


def normal(x, mean, std):
    return torch.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


def optimum(divergence: str) -> tuple[float, float]:
    student, critic = Affine(), nn.Identity()
    critic.forward = student.denoised
    roles = {"student": student, "critic": critic}
    teacher = GaussianMixtureTeacher([0.5, 0.5], torch.tensor(MEANS).reshape(2, 1, 1, 1), STD**2, SCHEDULE)
    task = Task(teacher, NoConditions())
    task.trainable = roles.__getitem__
    config = FDistill.Config(divergence=divergence, weighting="score", ratio_range=(1e-6, 1e6), normalizer_decay=0.9)
    method = ExactFDistill(task, config)
    optimizer = torch.optim.Adam(student.parameters(), betas=(0.5, 0.99))
    phase, steps = method.phases(0)[-1], 500
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.2 * (1.0 - step / steps) + 1e-4
        optimizer.zero_grad()
        method.loss(phase, draw(count=1536, step=step)).total.backward()
        method.end_phase(phase, lambda value: value)
        optimizer.step()
    return student.mean.item(), student.std.item()


@pytest.mark.parametrize(
    ("divergence", "mean", "std"),
    [
        ("reverse-kl", 2.92, 0.73),
        ("softened-rkl", 2.95, 0.72),
        ("js", 0.01, 3.04),
        ("squared-hellinger", 0.07, 2.98),
        ("forward-kl", 0.0, 3.0806),
        ("jeffreys", 0.0, 2.71),
    ],
)
def test_the_student_ends_where_its_divergence_is_least(divergence, mean, std):
    found = optimum(divergence)
    assert found == pytest.approx((mean, std), abs=0.1)
