"""The jackknife: what it estimates, on one side and on two, and how often its interval is right."""

import pytest
import torch

from diffaccel.evaluate.metrics.frechet import Gaussian, distance
from diffaccel.evaluate.jackknife import GroupedMoments, estimate, student_t_975

D = 16
SCALE = torch.linspace(0.5, 1.5, D, dtype=torch.float64)
TRUTH = float(0.04 * D + (SCALE - 1.0).square().sum())
REAL = Gaussian(torch.full((D,), 0.2, dtype=torch.float64), torch.eye(D, dtype=torch.float64))


def _fake(n, seed):
    return SCALE * torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _real(n, seed):
    return 0.2 + torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _study(two_sided, n=300, repetitions=200):
    for seed in range(repetitions):
        fake = GroupedMoments(D).update(_fake(n, seed))
        yield estimate(fake, GroupedMoments(D).update(_real(n, 1000 + seed)) if two_sided else REAL)


@pytest.mark.parametrize("two_sided", [False, True])
def test_bias_is_removed_and_the_interval_covers(two_sided):
    results = list(_study(two_sided))
    plug_in = sum(r.value for r in results) / len(results) - TRUTH
    corrected = sum(r.bias_corrected for r in results) / len(results) - TRUTH
    assert plug_in > 0.2
    assert abs(corrected) < 0.15 * plug_in
    covered = sum(r.ci95[0] <= TRUTH <= r.ci95[1] for r in results) / len(results)
    assert covered >= 0.91  # the binomial 1 % limit of a true 95 % at 200 repetitions


def test_exact_sides_have_no_interval():
    result = estimate(REAL, REAL)
    assert result.bias_corrected is None and result.ci95 is None and result.value < 1e-12


def test_too_few_samples_have_no_interval():
    few = GroupedMoments(D).update(_fake(19, 0))
    assert estimate(few, REAL).ci95 is None
    assert estimate(GroupedMoments(D).update(_fake(20, 0)), REAL).ci95 is not None


def test_plug_in_value_is_that_of_all_samples():
    sample = _fake(333, 0)
    expected = distance(REAL, Gaussian(sample.mean(0), torch.cov(sample.T)))
    assert estimate(GroupedMoments(D).update(sample), REAL).value == pytest.approx(expected, rel=1e-10)


def test_result_does_not_depend_on_the_batch_size():
    sample, labels = _fake(2500, 0), torch.arange(2500) % 7
    results = []
    for batch in (1, 7, 256, 1024, 2500):
        grouped = GroupedMoments(D)
        for part, part_labels in zip(sample.split(batch), labels.split(batch), strict=True):
            grouped.update(part, part_labels)
        assert grouped.count == 2500
        results.append(estimate(grouped, REAL))
    for other in results[1:]:
        assert other.value == pytest.approx(results[0].value, rel=1e-10)
        assert other.ci95 == pytest.approx(results[0].ci95, rel=1e-9)


def _strata(n, seed):
    """A stratified sample of a mixture: classes in turn, far apart, with standard normal values within."""
    labels = torch.arange(n) % 5
    centres = 10.0 * torch.eye(5, D, dtype=torch.float64)
    noise = torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return centres[labels] + noise, labels


def test_fixed_class_proportions_need_labels():
    centres = 10.0 * torch.eye(5, D, dtype=torch.float64)
    truth = Gaussian(centres.mean(0), torch.eye(D, dtype=torch.float64) + torch.cov(centres.T, correction=0))
    samples = [_strata(250, seed) for seed in range(100)]
    told = [estimate(GroupedMoments(D).update(x, labels), truth) for x, labels in samples]
    untold = [estimate(GroupedMoments(D).update(x), truth) for x, _ in samples]
    plug_in, corrected, blind = (
        sum(values) / 100
        for values in ([r.value for r in told], [r.bias_corrected for r in told], [r.bias_corrected for r in untold])
    )
    assert abs(corrected) < 0.2 * plug_in and blind < -0.2 * plug_in
    assert sum(r.ci95[0] <= 0 <= r.ci95[1] for r in told) >= 88


@pytest.mark.parametrize("n", [20, 23, 100, 357])
def test_groups_are_even_in_size_and_class(n):
    labels = torch.arange(n) % 10
    grouped = GroupedMoments(10).update(torch.eye(10)[labels], labels)
    grouped.total()
    sizes = [part.count for part in grouped.parts]
    assert max(sizes) - min(sizes) <= 2
    per_class = torch.stack([part.mean * part.count for part in grouped.parts])
    assert float((per_class.max(0).values - per_class.min(0).values).max()) < 1.5


def test_groups_are_even_and_do_not_follow_labels_that_repeat():
    grouped = GroupedMoments(10).update(torch.eye(10).repeat(100, 1))  # features = one-hot labels 0, 1, …, 9, 0, 1, …
    grouped.total()
    assert [part.count for part in grouped.parts] == [100] * 10
    for part in grouped.parts:
        assert float(part.mean.max()) < 0.3


@pytest.mark.parametrize(("freedom", "quantile"), [(9, 2.262157), (12.5, 2.169260), (18, 2.100922), (1e9, 1.959964)])
def test_student_quantile(freedom, quantile):
    assert student_t_975(freedom) == pytest.approx(quantile, abs=3e-4)
