"""Kernel distances against direct sums, closed forms and torchmetrics."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from diffaccel.core.errors import DataError, NumericalError, UsageError
from diffaccel.evaluate.groups import assign_groups
from diffaccel.evaluate.metrics import kernel
from diffaccel.evaluate.metrics.kernel import cmmd, gaussian, kid, kid_subsets, mmd2, polynomial
from diffaccel.evaluate.metrics.neighbours import prdc


def _normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


FAKE, REAL = 1.2 * _normal(0, 90, 6) + 0.3, _normal(1, 120, 6)


def _direct(fake, real, k):
    """The U-statistic, written with loops over pairs."""
    n, m = len(fake), len(real)
    ff = sum(float(k(fake[i], fake[j])) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    rr = sum(float(k(real[i], real[j])) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return ff + rr - 2 * sum(float(k(x, y)) for x in fake for y in real) / (n * m)


def test_kernels_of_pairs():
    x, y = FAKE[:5].numpy(), REAL[:7].numpy()
    np.testing.assert_allclose(polynomial(FAKE[:5], REAL[:7]), (x @ y.T / 6 + 1) ** 3, rtol=1e-12)
    np.testing.assert_allclose(polynomial(FAKE[:5], REAL[:7], 2, 0.5, 0.1), (x @ y.T / 2 + 0.1) ** 2, rtol=1e-12)
    squares = ((x[:, None] - y) ** 2).sum(-1)
    np.testing.assert_allclose(gaussian(FAKE[:5], REAL[:7], 1.7), np.exp(-squares / (2 * 1.7**2)), rtol=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_mmd_is_the_u_statistic_for_every_chunk(chunk):
    fake, real = FAKE[:23], REAL[:31]
    expected = _direct(fake.numpy(), real.numpy(), lambda a, b: (a @ b / 6 + 1) ** 3)
    assert mmd2(fake, real, polynomial, chunk=chunk).value == pytest.approx(expected, rel=1e-10)


def test_interval_is_that_of_samples_without_one_group():
    groups = assign_groups(None, 90), assign_groups(torch.arange(120) % 3, 120)
    result, value = kid(FAKE, REAL, *groups), kid(FAKE, REAL).value
    assert result.value == pytest.approx(value, rel=1e-10) and result.bias_corrected is None
    assert result.method == "delete-10-group jackknife"
    variance = 0.0
    for side, (sample, assigned) in enumerate(zip((FAKE, REAL), groups, strict=True)):
        sizes = torch.bincount(assigned)
        kept = [[x if i != side else sample[assigned != k] for i, x in enumerate((FAKE, REAL))] for k in range(10)]
        deleted = torch.tensor([kid(*pair).value for pair in kept], dtype=torch.float64)
        h = len(sample) / sizes.double()
        bias = float(((1 - 1 / h) * deleted).sum()) - 9 * value
        pseudo = h * value - (h - 1) * deleted
        variance += float(((pseudo - (value - bias)).square() / (h - 1)).mean())
    low, high = result.ci95
    assert (low + high) / 2 == pytest.approx(value, rel=1e-10)
    assert 2.10 < (high - low) / 2 / variance**0.5 < 2.27  # Student's t between 9 and 18 degrees of freedom


def test_too_few_samples_have_no_interval():
    assert kid(FAKE[:19], REAL).ci95 is None and kid(FAKE[:20], REAL).ci95 is not None
    assert kid(FAKE[:2], REAL[:2]).value == pytest.approx(float(poly_mmd(REAL[:2], FAKE[:2])), rel=1e-10)


def test_equal_sizes_agree_with_torchmetrics():
    assert kid(FAKE, REAL[:90]).value == pytest.approx(float(poly_mmd(REAL[:90], FAKE)), rel=1e-9)
    mean, deviation = kid_subsets(FAKE, REAL[:90], subsets=1, subset_size=90)
    assert mean == pytest.approx(float(poly_mmd(REAL[:90], FAKE)), rel=1e-9) and deviation == 0.0


def test_subsets_agree_with_torchmetrics_on_the_same_indices(monkeypatch):
    identity = nn.Identity()
    identity.num_features = 6
    with pytest.warns(UserWarning, match="save all extracted features"):
        metric = KernelInceptionDistance(feature=identity, subsets=8, subset_size=40, normalize=True)
    metric.set_dtype(torch.float64)
    metric.update(REAL, real=True)
    metric.update(FAKE, real=False)
    names = iter([(name, step) for step in range(8) for name in ("real", "fake")])

    def keyed(count):
        name, step = next(names)
        return kernel._subset(5, name, step, count, count, replace=False)

    monkeypatch.setattr(torch, "randperm", keyed)
    expected = [float(x) for x in metric.compute()]
    assert kid_subsets(FAKE, REAL, subsets=8, subset_size=40, seed=5) == pytest.approx(expected, rel=1e-6)


def test_subsets_are_reproducible_and_average_to_the_whole():
    whole = kid(FAKE, REAL).value
    mean, deviation = kid_subsets(FAKE, REAL, subsets=300, subset_size=30, seed=1)
    assert (mean, deviation) == kid_subsets(FAKE, REAL, subsets=300, subset_size=30, seed=1)
    assert mean != kid_subsets(FAKE, REAL, subsets=300, subset_size=30, seed=2)[0]
    assert abs(mean - whole) < 4 * deviation / 300**0.5
    with_replacement = kid_subsets(FAKE, REAL, subsets=50, subset_size=200, replace=True)[0]
    assert with_replacement > whole  # pairs of an image with itself


def test_cmmd_follows_the_published_formula():
    x, y = ((3.0 * side / side.norm(dim=1, keepdim=True)).numpy() for side in (FAKE, REAL))
    unit = x / 3.0, y / 3.0

    def mean(a, b):
        return np.exp(-((a[:, None] - b) ** 2).sum(-1) / 200).mean()

    published = 1000 * (mean(unit[0], unit[0]) + mean(unit[1], unit[1]) - 2 * mean(*unit))
    result = cmmd(torch.from_numpy(x), torch.from_numpy(y))
    assert result.value == pytest.approx(published, rel=1e-8)
    unbiased = 1000 * _direct(*unit, lambda a, b: np.exp(-((a - b) ** 2).sum() / 200))
    assert result.bias_corrected == pytest.approx(unbiased, rel=1e-6)
    assert result.ci95[0] < result.bias_corrected < result.value


def test_gaussian_kernel_of_gaussians_has_a_closed_form():
    """E k(x, y) = (1 + 2τ²/σ²)^(−d/2)·exp(−‖Δ‖²/(2σ² + 4τ²)) for x, y of variance τ² whose means differ by Δ."""
    d, sigma, shift = 3, 2.0, 1.0

    def mean_kernel(v1, v2, delta):
        total = v1 + v2
        return (1 + total / sigma**2) ** (-d / 2) * np.exp(-(delta**2) / (2 * (sigma**2 + total)))

    truth = mean_kernel(1, 1, 0) + mean_kernel(2.25, 2.25, 0) - 2 * mean_kernel(1, 2.25, shift * d**0.5)
    result = mmd2(1.5 * _normal(2, 4000, d) + shift, _normal(3, 4000, d), lambda a, b: gaussian(a, b, sigma))
    assert result.ci95[0] <= truth <= result.ci95[1] and result.value == pytest.approx(truth, rel=0.1)


class _Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("metric", [kid, cmmd, prdc])
def test_memory_is_a_chunk_times_n(metric):
    with _Largest() as largest:
        metric(_normal(0, 2000, 4), _normal(1, 2100, 4))
    assert largest.elements <= 256 * 2100


def test_refusals():
    for metric in (kid, kid_subsets, cmmd):
        with pytest.raises(DataError, match="at least 2"):
            metric(FAKE[:1], REAL)
        with pytest.raises(DataError, match="length"):
            metric(FAKE[:, :5], REAL)
        with pytest.raises(DataError, match=r"\(N, d\)"):
            metric(FAKE[0], REAL)
        with pytest.raises(NumericalError, match="NaN"):
            metric(FAKE, REAL.clone().fill_(float("inf")))
    with pytest.raises(DataError, match="groups"):
        kid(FAKE, REAL, torch.zeros(3, dtype=torch.long))
    with pytest.raises(DataError, match="as many"):
        kid_subsets(FAKE, REAL, subset_size=91)
    with pytest.raises(UsageError, match="at least 1 subset"):
        kid_subsets(FAKE, REAL, subsets=0)
    with pytest.raises(NumericalError, match="direction"):
        cmmd(torch.zeros(30, 6), REAL)
