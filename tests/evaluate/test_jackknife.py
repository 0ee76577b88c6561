"""The jackknife: what it estimates, on one side and on two, and which groups it deletes."""

import pytest
import torch

from diffaccel.core.errors import DataError
from diffaccel.core.rng import KeyedRandom
from diffaccel.evaluate.groups import assign_groups, stratified_order
from diffaccel.evaluate.jackknife import combine, enough, normal_interval, ratios, student_t_975, wilson_interval
from diffaccel.evaluate.metrics.frechet import Gaussian, distance, frechet_estimate
from diffaccel.evaluate.moments import GroupedMoments

D = 16
SCALE = torch.linspace(0.5, 1.5, D, dtype=torch.float64)
REAL = Gaussian(torch.full((D,), 0.2, dtype=torch.float64), torch.eye(D, dtype=torch.float64))


def _fake(n, seed):
    return SCALE * torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _grouped(sample, labels=None, groups=10):
    return GroupedMoments(sample.shape[1], groups).update(sample, assign_groups(labels, len(sample), groups))


@pytest.mark.parametrize("sizes", [[4] * 5, [3, 4, 5, 6, 2]])
def test_variance_of_a_mean_is_the_textbook_one(sizes):
    """For T = mean and groups of one, the jackknife is the usual standard error; it finds no bias for any groups."""
    x = torch.randn(sum(sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for counts in (sizes, [1] * len(x)):
        groups = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        deleted = [float(x[groups != k].mean()) for k in range(len(counts))]
        result = combine(float(x.mean()), [(deleted, ratios(counts))])
        assert result.bias_corrected == pytest.approx(float(x.mean()), abs=1e-12)
    half = student_t_975(len(x) - 1) * float(x.std()) / len(x) ** 0.5
    assert result.ci95 == pytest.approx((float(x.mean()) - half, float(x.mean()) + half), rel=1e-10)


def test_bias_of_a_variance_is_removed_exactly():
    """With N in the denominator the variance is biased by exactly −σ²/N, which groups of one remove exactly."""
    x = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    deleted = [float(torch.cat([x[:k], x[k + 1 :]]).var(correction=0)) for k in range(30)]
    result = combine(float(x.var(correction=0)), [(deleted, ratios([1] * 30))])
    assert result.bias_corrected == pytest.approx(float(x.var()), rel=1e-12)


def test_exact_sides_have_no_interval():
    result = frechet_estimate(REAL, REAL)
    assert (result.bias_corrected, result.ci95, result.method) == (None, None, None) and result.value < 1e-12
    assert combine(1.5, []).value == 1.5


def test_too_few_samples_have_no_interval():
    assert frechet_estimate(_grouped(_fake(19, 0)), REAL).ci95 is None
    assert frechet_estimate(_grouped(_fake(20, 0)), REAL).ci95 is not None
    assert frechet_estimate(_grouped(_fake(20, 0)), REAL, interval=False).ci95 is None
    assert frechet_estimate(_grouped(_fake(40, 0), groups=1), REAL).ci95 is None
    assert not enough([5, 0, 9]) and not enough([50]) and enough([2, 2, 2])


def test_plug_in_value_is_that_of_all_samples():
    sample = _fake(333, 0)
    expected = distance(REAL, Gaussian(sample.mean(0), torch.cov(sample.T)))
    result = frechet_estimate(_grouped(sample), REAL)
    assert result.value == pytest.approx(expected, rel=1e-10)
    assert result.method == "delete-10-group jackknife"


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
    told = [frechet_estimate(_grouped(x, labels), truth) for x, labels in samples]
    untold = [frechet_estimate(_grouped(x), truth) for x, _ in samples]
    plug_in, corrected, blind = (
        sum(values) / 100
        for values in ([r.value for r in told], [r.bias_corrected for r in told], [r.bias_corrected for r in untold])
    )
    assert abs(corrected) < 0.2 * plug_in and blind < -0.2 * plug_in
    assert sum(r.ci95[0] <= 0 <= r.ci95[1] for r in told) >= 88


@pytest.mark.parametrize("n", [20, 23, 100, 357])
def test_groups_are_even_in_size_and_class(n):
    labels = torch.arange(n) % 10
    groups = assign_groups(labels, n)
    sizes = torch.bincount(groups, minlength=10)
    assert int(sizes.max() - sizes.min()) <= 2
    per_class = torch.stack([torch.bincount(groups[labels == label], minlength=10) for label in range(10)])
    assert int((per_class.max(1).values - per_class.min(1).values).max()) <= 1


def test_groups_are_even_and_do_not_follow_labels_that_repeat():
    groups = assign_groups(None, 1000)
    assert torch.bincount(groups).tolist() == [100] * 10
    mix = torch.stack([torch.bincount(torch.arange(1000)[groups == k] % 10, minlength=10) for k in range(10)])
    assert int(mix.max()) < 30


def test_a_group_depends_on_the_samples_before_only():
    labels = torch.randint(0, 7, (500,), generator=torch.Generator().manual_seed(0)) * 3 - 1
    whole = assign_groups(labels, 500)
    assert torch.equal(assign_groups(labels[:123], 123), whole[:123])
    first = labels == labels.min()  # and, but for a rotation, on those of the same class only
    assert torch.equal(whole[first], assign_groups(None, int(first.sum())))
    assert torch.equal(whole, assign_groups(labels * 10, 500))  # not on what the classes are called
    assert assign_groups(None, 0).shape == (0,)
    with pytest.raises(DataError, match="every sample needs one"):
        assign_groups(labels, 499)


def test_every_beginning_of_a_stratified_order_has_the_mix_of_classes():
    labels = (torch.arange(600) % 6).clamp_max(2)
    order = stratified_order(labels, 600, KeyedRandom(0), "test", 0)
    assert torch.equal(order.sort().values, torch.arange(600))
    for size in (60, 150, 313):
        counts = torch.bincount(labels[order[:size]], minlength=3) / size
        assert torch.allclose(counts, torch.tensor([1 / 6, 1 / 6, 4 / 6]), atol=2 / size)
    assert not torch.equal(order, stratified_order(labels, 600, KeyedRandom(1), "test", 0))


@pytest.mark.parametrize(("freedom", "quantile"), [(9, 2.262157), (12.5, 2.169260), (18, 2.100922), (1e9, 1.959964)])
def test_student_quantile(freedom, quantile):
    assert student_t_975(freedom) == pytest.approx(quantile, abs=3e-4)


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (3, 10), (10, 10), (512, 1000)])
def test_wilson_interval_solves_its_quadratic(hits, count):
    result = wilson_interval(hits, count)
    low, high = result.ci95
    assert 0.0 <= low <= result.value == hits / count <= high <= 1.0
    for end in {low, high} - {0.0, 1.0}:
        assert (result.value - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / count, rel=1e-5)


def test_normal_interval():
    low, high = normal_interval(torch.tensor([0.0, 2.0], dtype=torch.float64)).ci95
    assert (low + high) / 2 == 1.0 and high - low == pytest.approx(2 * 1.959964, rel=1e-6)
    assert normal_interval(torch.ones(1)).ci95 is None
