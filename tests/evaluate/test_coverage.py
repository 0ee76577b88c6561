"""How often a nominal 95 % interval contains the truth: Gaussians whose distances are known, both sides sampled."""

import pytest
import torch

from diffaccel.evaluate.groups import assign_groups
from diffaccel.evaluate.metrics.frechet import Gaussian, distance, frechet_estimate
from diffaccel.evaluate.metrics.kernel import cmmd, kid, polynomial
from diffaccel.evaluate.moments import GroupedMoments, Moments

D, REPETITIONS = 16, 100
SCALE = torch.linspace(0.5, 1.5, D, dtype=torch.float64)
SHIFT = 0.2
FRECHET = float(SHIFT**2 * D + (SCALE - 1.0).square().sum())


def _normal(n, seed):
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _pair(n, m, seed, shift=SHIFT):
    return SCALE * _normal(n, seed), shift + _normal(m, 10_000 + seed)


def _share(results, truth):
    return sum(result.ci95[0] <= truth <= result.ci95[1] for result in results) / len(results)


def _frechet(fake, real):
    return frechet_estimate(*(GroupedMoments(D).update(x, assign_groups(None, len(x))) for x in (fake, real)))


@pytest.mark.parametrize(("n", "m"), [(300, 300), (200, 800), (1000, 400)])
def test_frechet_distance(n, m):
    results = [_frechet(*_pair(n, m, seed)) for seed in range(REPETITIONS)]
    assert 0.88 <= _share(results, FRECHET) <= 0.99
    bias = sum(result.value for result in results) / REPETITIONS - FRECHET
    left = sum(result.bias_corrected for result in results) / REPETITIONS - FRECHET
    assert bias > 0.1 and abs(left) < 0.15 * bias


def test_frechet_distance_to_an_exact_side():
    real = Gaussian(torch.full((D,), SHIFT, dtype=torch.float64), torch.eye(D, dtype=torch.float64))
    samples = [_pair(300, 2, seed)[0] for seed in range(REPETITIONS)]
    results = [frechet_estimate(GroupedMoments(D).update(x, assign_groups(None, 300)), real) for x in samples]
    assert 0.88 <= _share(results, FRECHET) <= 0.99
    assert distance(real, Moments(D).update(_normal(400_000, 0) * SCALE).gaussian()) == pytest.approx(FRECHET, rel=0.01)


def _third_moments(shift):
    """E (xᵀy/D + 1)³ over independent x, y: the cross terms of Gaussians with diagonal covariances, in closed form.

    With t = xᵀy: E t, E t² and E t³ follow from the first three moments of the products, which are independent.
    """

    def cubed(mean_x, var_x, mean_y, var_y):
        first = mean_x * mean_y
        second = (mean_x**2 + var_x) * (mean_y**2 + var_y)
        third = (mean_x**3 + 3 * mean_x * var_x) * (mean_y**3 + 3 * mean_y * var_y)
        variance = (second - first**2).sum()
        skew = (third - 3 * first * second + 2 * first**3).sum()  # third central moments add
        mean = first.sum()
        raw = mean, variance + mean**2, skew + 3 * mean * variance + mean**3
        return raw[2] / D**3 + 3 * raw[1] / D**2 + 3 * raw[0] / D + 1

    zero, one = torch.zeros(D, dtype=torch.float64), torch.ones(D, dtype=torch.float64)
    fake, real = (zero, SCALE**2), (shift * one, one)
    return float(cubed(*fake, *fake) + cubed(*real, *real) - 2 * cubed(*fake, *real))


@pytest.mark.parametrize("shift", [0.2, 1.0])
def test_kernel_distance(shift):
    truth = _third_moments(shift)
    results = [kid(*_pair(300, 400, seed, shift)) for seed in range(REPETITIONS)]
    assert 0.88 <= _share(results, truth) <= 0.99
    values = torch.tensor([result.value for result in results])
    assert abs(float(values.mean()) - truth) < 3 * float(values.std()) / REPETITIONS**0.5


def test_the_closed_form_is_that_of_a_large_sample():
    fake, real = _pair(3000, 3000, 0, 1.0)
    direct = [polynomial(x, y).mean() for x, y in ((fake, fake.flip(0)), (real, real.flip(0)), (fake, real))]
    assert float(direct[0] + direct[1] - 2 * direct[2]) == pytest.approx(_third_moments(1.0), rel=0.05)


def test_clip_distance():
    pairs = [_pair(200, 200, seed, 0.5) for seed in range(REPETITIONS)]
    truth = cmmd(*_pair(8000, 8000, 99, 0.5)).bias_corrected
    results = [cmmd(*pair) for pair in pairs]
    assert 0.88 <= _share(results, truth) <= 0.99
    assert sum(result.value for result in results) / REPETITIONS > truth


def test_kernel_distance_of_fixed_class_proportions():
    centres = 3 * torch.randn(10, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(300) % 10
    groups = assign_groups(labels, 300)
    results = []
    for seed in range(REPETITIONS):
        fake, real = (centres[labels] + _normal(300, seed + offset) for offset in (0, 10_000))
        results.append(kid(fake, real, groups, groups, fixed_mix=True))
    bias = sum(result.value for result in results) / REPETITIONS
    left = sum(result.bias_corrected for result in results) / REPETITIONS
    assert bias < 0 and abs(left) < 0.1 * abs(bias)  # the truth is 0
    assert _share(results, 0.0) >= 0.88


def test_no_interval_rather_than_a_wrong_one():
    assert _frechet(*_pair(D, 300, 0)).ci95 is None and _frechet(*_pair(D, 300, 0)).bias_corrected is None
    results = [_frechet(*_pair(2 * D, 300, seed)) for seed in range(REPETITIONS)]
    assert _share(results, FRECHET) >= 0.88
