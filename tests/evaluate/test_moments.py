"""Streaming moments: equal to the direct formula for every batch size and merge order."""

import numpy as np
import pytest
import torch

from diffaccel.core.errors import DataError, NumericalError
from diffaccel.evaluate.moments import Moments


def _data(n=500, d=9, offset=0.0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + offset


@pytest.mark.parametrize("batch", [1, 7, 64, 500])
def test_equal_to_numpy_for_every_batch_size(batch):
    x, moments = _data(), Moments(9)
    for part in x.split(batch):
        moments.update(part)
    assert moments.count == 500
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(moments.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-11, atol=1e-13)


def test_merge_is_associative_and_leaves_its_parts_alone():
    parts = [Moments(9).update(part) for part in _data().split([3, 200, 0, 1, 296])]
    a, b, c, d, e = parts
    left = a.merge(b).merge(c).merge(d).merge(e)
    right = a.merge(b.merge(c.merge(d.merge(e))))
    once = e.merge(a, c, d, b)
    for other in (right, once):
        np.testing.assert_allclose(left.mean, other.mean, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(left.covariance, other.covariance, rtol=1e-10, atol=1e-13)
    assert [part.count for part in parts] == [3, 200, 0, 1, 296]


def test_a_large_mean_does_not_cancel_the_covariance():
    plain, shifted = (Moments(9).update(_data(offset=offset)) for offset in (0.0, 1e7))
    np.testing.assert_allclose(shifted.covariance, plain.covariance, rtol=1e-6, atol=1e-7)


def test_refusals():
    with pytest.raises(DataError, match="at least 2"):
        _ = Moments(3).update(torch.zeros(1, 3)).covariance
    with pytest.raises(DataError, match="must be"):
        Moments(3).update(torch.zeros(5, 4))
    with pytest.raises(NumericalError):
        Moments(3).update(torch.full((2, 3), float("nan")))
    with pytest.raises(DataError, match="merge"):
        Moments(3).merge(Moments(4))
