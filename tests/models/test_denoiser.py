"""Every parametrisation of one exact model gives the same x0; guidance; features."""

import pytest
import torch
from networks import tiny_unet
from torch import nn

from diffaccel.core.prediction import PREDICTION_TYPES, convert
from diffaccel.core.schedule import VE, Flow, VPDiscrete, VPLinear
from diffaccel.models.denoiser import Guided, NetworkDenoiser
from diffaccel.models.pixel import PixelDenoiser
from diffaccel.testing import GaussianTeacher

SCHEDULES = [VPDiscrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)), VPLinear(), VE(), Flow()]


class ExactNetwork(NetworkDenoiser):
    """A network that predicts what an exact Gaussian teacher implies, in any parametrisation."""

    def __init__(self, teacher: GaussianTeacher, prediction_type: str):
        super().__init__(nn.Identity(), teacher.schedule, prediction_type)
        self.teacher, self.sample_shape = teacher, teacher.sample_shape

    def predict(self, x_t, t, condition):
        alpha, sigma = self.level(t)
        return convert(self.teacher(x_t, t), x_t, "sample", self.prediction_type, alpha, sigma)

    def feature_modules(self):
        return []


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_parametrisation_of_a_gaussian_gives_the_same_x0(schedule, prediction_type):
    teacher = GaussianTeacher([0.3, -0.2], [0.5, 1.5], schedule)
    t = schedule.time(torch.tensor([0.1, 0.4, 0.7, 0.9]))
    x0 = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    x_t = teacher.noised(x0, t, torch.randn(4, 2, generator=torch.Generator().manual_seed(2)))
    expected = teacher(x_t, t)
    # A float32 ε near pure noise keeps few digits of x0: the error is amplified by σ/α.
    tolerance = 1e-5 * max(1.0, float(schedule.rho(t).max())) if prediction_type == "epsilon" else 1e-5
    assert torch.allclose(ExactNetwork(teacher, prediction_type)(x_t, t), expected, atol=tolerance, rtol=1e-4)


def test_denoising_error_vanishes_for_the_true_clean_sample():
    schedule = SCHEDULES[0]
    teacher = GaussianTeacher([0.3, -0.2], [1e-6, 1e-6], schedule)
    net = ExactNetwork(teacher, "v_prediction")
    x0 = torch.tensor([[0.3, -0.2]]).expand(5, 2)
    t = schedule.time(torch.linspace(0.1, 0.9, 5))
    assert net.denoising_error(x0, t, torch.randn(5, 2)).max() < 1e-8


def test_guidance_extrapolates_from_the_null_branch():
    model = PixelDenoiser(tiny_unet(), SCHEDULES[0], "v_prediction").eval()
    x, t, labels = torch.randn(3, 1, 8, 8), torch.full((3,), 500.0), {"class_labels": torch.tensor([0, 1, 2])}
    with torch.no_grad():
        null, cond = model(x, t, model.null_condition(3)), model(x, t, labels)
        assert torch.allclose(Guided(model, 3.0)(x, t, labels), null + 3.0 * (cond - null), atol=1e-5)
        assert torch.equal(Guided(model, 1.0)(x, t, labels), cond)


def test_features_come_with_the_same_prediction_and_leave_no_hooks():
    model = PixelDenoiser(tiny_unet(None), SCHEDULES[0], "epsilon").eval()
    x, t = torch.randn(2, 1, 8, 8), torch.full((2,), 300.0)
    with torch.no_grad():
        x0, features = model.forward_with_features(x, t)
        assert torch.equal(x0, model(x, t))
    assert [len(f) for f in features] == [2] * len(model.feature_modules())
    assert all(f.is_contiguous() and f.ndim == 4 for f in features)
    assert not any(module._forward_hooks for module in model.modules())
    assert model.null_condition(2) is None


def test_a_clone_has_its_own_weights():
    model = PixelDenoiser(tiny_unet(), SCHEDULES[0], "epsilon")
    clone = model.clone()
    with torch.no_grad():
        next(clone.parameters()).add_(1.0)
    assert not torch.equal(next(clone.parameters()), next(model.parameters()))
