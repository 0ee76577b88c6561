"""Fréchet distance against closed forms, invariances and torchmetrics."""

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from diffaccel.core.errors import DataError, NumericalError
from diffaccel.evaluate.metrics.frechet import frechet_distance
from diffaccel.evaluate.moments import Moments


def _normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _covariance(seed, d):
    root = _normal(seed, d, d)
    return root @ root.T / d


@pytest.mark.parametrize("d", [1, 7, 64, 513])
def test_commuting_covariances_have_a_closed_form(d):
    q = torch.linalg.qr(_normal(0, d, d)).Q
    a, b = _normal(1, d).square(), _normal(2, d).square()
    mu1, mu2 = _normal(3, d), _normal(4, d)
    expected = (mu1 - mu2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    value = frechet_distance(mu1, q * a @ q.T, mu2, q * b @ q.T)
    assert value == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.parametrize("d", [2, 7, 64])
def test_general_covariances_match_the_matrix_square_root(d):
    linalg = pytest.importorskip("scipy.linalg")
    s1, s2 = _covariance(5, d), _covariance(6, d)
    cross = linalg.sqrtm((s1 @ s2).numpy()).real.trace()
    expected = float(s1.trace() + s2.trace()) - 2 * cross
    assert frechet_distance(torch.zeros(d), s1, torch.zeros(d), s2) == pytest.approx(expected, rel=1e-7)


def test_symmetric_rotation_invariant_and_quadratic_in_scale():
    d = 33
    mu1, mu2, s1, s2 = _normal(1, d), _normal(2, d), _covariance(3, d), _covariance(4, d)
    q = torch.linalg.qr(_normal(5, d, d)).Q
    value = frechet_distance(mu1, s1, mu2, s2)
    assert frechet_distance(mu2, s2, mu1, s1) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(q @ mu1, q @ s1 @ q.T, q @ mu2, q @ s2 @ q.T) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(3 * mu1, 9 * s1, 3 * mu2, 9 * s2) == pytest.approx(9 * value, rel=1e-10)


@pytest.mark.parametrize(("d", "n"), [(7, 50), (64, 40), (64, 1000), (513, 60)])
def test_a_set_against_itself_is_zero(d, n):
    moments = Moments(d).update(_normal(0, n, d))
    value = frechet_distance(moments.mean, moments.covariance, moments.mean, moments.covariance)
    assert 0.0 <= value <= 1e-6


@pytest.mark.parametrize(("d", "n"), [(7, 100), (64, 30), (64, 500), (128, 100)])
def test_agrees_with_torchmetrics_on_the_same_features(d, n):
    features = nn.Identity()
    features.num_features = d
    metric = FrechetInceptionDistance(feature=features, normalize=True).set_dtype(torch.float64)
    real, fake = _normal(0, n, d), 1.2 * _normal(1, n + 3, d) + 0.3
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours = [Moments(d).update(side) for side in (fake, real)]
    value = frechet_distance(ours[0].mean, ours[0].covariance, ours[1].mean, ours[1].covariance)
    assert value == pytest.approx(float(metric.compute()), rel=1e-6)


def test_refusals():
    eye = torch.eye(3)
    with pytest.raises(DataError, match="needs"):
        frechet_distance(torch.zeros(3), eye, torch.zeros(2), eye)
    with pytest.raises(NumericalError, match="NaN"):
        frechet_distance(torch.full((3,), float("nan")), eye, torch.zeros(3), eye)
    with pytest.raises(NumericalError, match="semidefinite"):
        frechet_distance(torch.zeros(3), eye - 2 * torch.diag(torch.tensor([0.0, 0, 1])), torch.zeros(3), eye)
