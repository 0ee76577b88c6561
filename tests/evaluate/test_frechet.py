"""Fréchet distance against closed forms, invariances and torchmetrics, and extrapolated to infinite samples."""

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from diffaccel.core.errors import DataError, NumericalError, UsageError
from diffaccel.evaluate.groups import assign_groups
from diffaccel.evaluate.metrics.frechet import Gaussian, distance, fd_infinity, frechet_distance, frechet_estimate
from diffaccel.evaluate.moments import GroupedMoments, Moments


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


@pytest.mark.parametrize("d", [7, 64, 513])
@pytest.mark.parametrize("below", [True, False])
def test_samples_have_a_closed_form_in_singular_values(d, below):
    """Of X and Y, centred and divided by √(N−1), Tr (Σ₁Σ₂)^½ is the sum of the singular values of X·Yᵀ, for every N."""
    sides = [_normal(0, d // 2 + 1 if below else 2 * d, d), 1.3 * _normal(1, 2 * d, d) + 0.2]
    x, y = ((s - s.mean(0)) / (len(s) - 1) ** 0.5 for s in sides)
    means = (sides[0].mean(0) - sides[1].mean(0)).square().sum()
    expected = float(means + x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum())
    a, b = (Moments(d).update(side).gaussian() for side in sides)
    assert distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert distance(b, a) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a.mu, a.sigma, b.mu, b.sigma) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b.mu, b.sigma, a.mu, a.sigma) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("d", [8, 300])
def test_constant_and_repeated_features_change_nothing(d):
    """Covariances that are singular although N > d, with their zeros where a Cholesky factorisation meets them first."""
    sides = [_normal(0, 2 * d, d), 1.3 * _normal(1, 2 * d, d) + 0.2]
    plain, dead, double = (
        frechet_distance(*(part for x in map(change, sides) for part in (x.mean(0), torch.cov(x.T))))
        for change in (
            lambda x: x,
            lambda x: torch.cat([torch.full((2 * d, 3), 0.7, dtype=torch.float64), x], dim=1),
            lambda x: torch.cat([x, x], dim=1).reshape(2 * d, 2, d).transpose(1, 2).reshape(2 * d, 2 * d),
        )
    )
    assert dead == pytest.approx(plain, rel=1e-8) and double == pytest.approx(2 * plain, rel=1e-8)


@pytest.mark.parametrize(("d", "n"), [(7, 4), (33, 200), (513, 40), (513, 600)])
def test_factors(d, n):
    gaussian = Moments(d).update(_normal(0, n, d)).gaussian()
    for told in (gaussian, Gaussian(gaussian.mu, gaussian.sigma)):
        assert told.factor.shape == (d, min(d, n - 1))
        assert torch.allclose(told.factor @ told.factor.T, gaussian.sigma, atol=1e-12)


def test_symmetric_rotation_invariant_and_quadratic_in_scale():
    for d in (33, 300):
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
    assert 0.0 <= value <= 1e-8
    assert distance(moments.gaussian(), moments.gaussian()) <= 1e-8


@pytest.mark.parametrize("d", [5, 300])
def test_points_have_the_distance_of_their_means(d):
    """A collapsed set has covariance 0: what remains is the mean term and the other side's trace."""
    point = Gaussian(torch.ones(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64))
    other = Gaussian(torch.zeros(d, dtype=torch.float64), _covariance(0, d))
    expected = d + float(other.sigma.trace())
    for a, b in ((point, other), (other, point)):
        assert distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert distance(point, point) == 0.0


@pytest.mark.parametrize(("d", "n"), [(7, 100), (64, 30), (64, 500), (128, 100)])
def test_agrees_with_torchmetrics_on_the_same_features(d, n):
    features = nn.Identity()
    features.num_features = d
    metric = FrechetInceptionDistance(feature=features, normalize=True).set_dtype(torch.float64)
    real, fake = _normal(0, n, d), 1.2 * _normal(1, n + 3, d) + 0.3
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours = [GroupedMoments(d).update(side, assign_groups(None, len(side))) for side in (fake, real)]
    assert frechet_estimate(*ours).value == pytest.approx(float(metric.compute()), rel=1e-6)


def test_both_sides_are_deleted_from():
    """The jackknife done by hand: distances of samples without one group, on either side."""
    samples = [_normal(0, 60, 5), 1.5 * _normal(1, 80, 5)]
    groups = [assign_groups(None, len(sample)) for sample in samples]
    result = frechet_estimate(*(GroupedMoments(5).update(x, g) for x, g in zip(samples, groups, strict=True)))

    def direct(fake, real):
        return frechet_distance(fake.mean(0), torch.cov(fake.T), real.mean(0), torch.cov(real.T))

    value = direct(*samples)
    deleted = [
        [direct(samples[0][groups[0] != k], samples[1]) for k in range(10)],
        [direct(samples[0], samples[1][groups[1] != k]) for k in range(10)],
    ]
    biases = [9 * (sum(side) / 10 - value) for side in deleted]
    assert result.value == pytest.approx(value, rel=1e-10)
    assert result.bias_corrected == pytest.approx(value - sum(biases), rel=1e-9)


def _fit_data(n, seed):
    return torch.linspace(0.5, 1.5, 8, dtype=torch.float64) * _normal(seed, n, 8)


def test_fd_infinity_removes_the_bias_and_its_interval_covers():
    real = Gaussian(torch.zeros(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64))
    truth = float((torch.linspace(0.5, 1.5, 8, dtype=torch.float64) - 1).square().sum())
    results = [fd_infinity(_fit_data(200, seed), real, points=8, seed=seed) for seed in range(40)]
    plug_in = sum(distance(real, Moments(8).update(_fit_data(200, s)).gaussian()) for s in range(40)) / 40 - truth
    assert abs(sum(result.value for result in results) / 40 - truth) < 0.35 * plug_in
    covered = sum(result.ci95[0] <= truth <= result.ci95[1] for result in results)
    assert covered >= 34  # the binomial 1 % limit of a true 95 % at 40 repetitions
    assert "fit" in results[0].method and "real side" in results[0].method


def test_fd_infinity_is_reproducible_and_keeps_the_class_mix():
    real = Gaussian(torch.zeros(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64))
    features = _fit_data(100, 0)
    first = fd_infinity(features, real, seed=3)
    assert first == fd_infinity(features, real, seed=3) and first.value != fd_infinity(features, real, seed=4).value
    assert fd_infinity(features, real, seed=3, interval=False).value == first.value
    labels = torch.arange(300) % 3
    centres = 5.0 * torch.eye(3, 8, dtype=torch.float64)
    truth = Gaussian(centres.mean(0), torch.eye(8, dtype=torch.float64) + torch.cov(centres.T, correction=0))
    samples = [centres[labels] + _normal(seed, 300, 8) for seed in range(20)]
    told, untold = (
        [fd_infinity(x, truth, points=8, labels=given, interval=False).value for x in samples]
        for given in (labels, None)
    )
    told, untold = (torch.tensor(values).square().mean().sqrt() for values in (told, untold))
    assert told < 0.8 * untold


def test_refusals():
    eye, real = torch.eye(3), Gaussian(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    with pytest.raises(DataError, match="needs"):
        frechet_distance(torch.zeros(3), eye, torch.zeros(2), eye)
    with pytest.raises(NumericalError, match="NaN"):
        frechet_distance(torch.full((3,), float("nan")), eye, torch.zeros(3), eye)
    indefinite = eye - 2 * torch.diag(torch.tensor([0.0, 0, 1]))
    for pair in ((indefinite, eye), (eye, indefinite)):
        with pytest.raises(NumericalError, match="semidefinite"):
            frechet_distance(torch.zeros(3), pair[0], torch.zeros(3), pair[1])
    one = GroupedMoments(3).update(torch.ones(1, 3), torch.zeros(1, dtype=torch.long))
    with pytest.raises(DataError, match="at least 2"):
        frechet_estimate(one, real)
    four = Gaussian(torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    with pytest.raises(DataError, match="length"):
        frechet_estimate(four, real)
    with pytest.raises(DataError, match="length"):
        fd_infinity(_normal(0, 50, 4), real)
    with pytest.raises(DataError, match="at least 20"):
        fd_infinity(_normal(0, 19, 3), real)
    with pytest.raises(UsageError, match="3 points"):
        fd_infinity(_normal(0, 50, 3), real, points=2)
    with pytest.raises(NumericalError):
        fd_infinity(torch.full((50, 3), float("nan")), real)
