"""The same teacher behind ε, v, x0 and flow networks gives the same update of the student, and so do parts of a batch."""

import pytest
import torch
from distilling import CPU, tiny_task, trained, weights
from torch import nn

from diffaccel.core.prediction import convert
from diffaccel.core.rng import KeyedRandom
from diffaccel.core.schedule import Flow, VPDiscrete
from diffaccel.distill.methods.dmd import DMD
from diffaccel.distill.methods.f_distill import FDistill
from diffaccel.distill.methods.sid import SiD
from diffaccel.distill.task import Task
from diffaccel.models.conditions import NoConditions
from diffaccel.models.denoiser import NetworkDenoiser
from diffaccel.testing.teachers import GaussianTeacher
from diffaccel.training.method import Draw

SHAPE = (1, 4, 4)
MEAN, STD = torch.linspace(-0.5, 0.5, 16).reshape(SHAPE), torch.linspace(0.3, 0.9, 16).reshape(SHAPE)
VP = VPDiscrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0))


class Analytic(nn.Module):
    """A network whose output, in one parametrisation, is the exact prediction for Gaussian data, moved by a parameter."""

    def __init__(self, schedule, prediction_type):
        super().__init__()
        self.teacher = GaussianTeacher(MEAN, STD, schedule)
        self.prediction_type, self.shift = prediction_type, nn.Parameter(torch.zeros(SHAPE))

    def forward(self, x_t, t):
        x0 = self.teacher(x_t, t) + self.shift  # the parameter is of the clean sample, whatever is predicted
        return convert(x0, x_t, "sample", self.prediction_type, *self.teacher.level(t))


class AnalyticDenoiser(NetworkDenoiser):
    sample_shape = SHAPE

    def __init__(self, schedule, prediction_type):
        super().__init__(Analytic(schedule, prediction_type), schedule, prediction_type)

    def predict(self, x_t, t, condition):
        return self.net(x_t, t.float())

    def feature_modules(self):
        return []


def student_update(method_class, schedule, prediction_type) -> torch.Tensor:
    method = method_class(Task(AnalyticDenoiser(schedule, prediction_type), NoConditions()), method_class.Config())
    with torch.no_grad():
        method.roles["critic"].net.shift += 0.2
        method.roles["student"].net.shift -= 0.1
    method.roles["critic"].requires_grad_(False)
    draw = Draw(KeyedRandom(0), "student/0", 0, 0, 16, 16, CPU)
    method.loss(method.phases(0)[-1], draw).total.backward()
    return method.roles["student"].net.shift.grad


@pytest.mark.parametrize("method_class", [DMD, SiD])
@pytest.mark.parametrize("schedule", [VP, Flow()], ids=["vp", "flow"])
def test_every_parametrisation_of_a_teacher_gives_the_same_update(method_class, schedule):
    kinds = ["sample", "v_prediction", "flow_prediction"] + (
        ["epsilon"] if schedule is VP else []
    )  # ε says nothing at α = 0
    updates = [student_update(method_class, schedule, kind) for kind in kinds]
    assert updates[0].abs().max() > 1e-3
    for kind, update in zip(kinds[1:], updates[1:], strict=True):
        # At the last time ε carries σ/α = 157 times the rounding of float32.
        assert torch.allclose(update, updates[0], atol=1e-4 * float(updates[0].abs().max())), kind


def test_a_batch_in_eight_parts_is_one_in_four_parts(tmp_path):
    """Sixteen samples as 8 × 2 and 4 × 4: the running means too; AdamW turns rounding of small gradients into steps."""
    config = FDistill.Config(divergence="js", gan_weight=0.01, r1_weight=0.5)
    parts = [
        trained(FDistill(tiny_task(data=True), config), tmp_path / str(n), steps=1, batch_size=16, micro_batches=n)
        for n in (8, 4)
    ]
    assert torch.allclose(parts[0].ratio_means, parts[1].ratio_means, atol=1e-6)
    assert (weights(parts[0]) - weights(parts[1])).abs().mean() < 1e-6
