"""Streaming moments: equal to the direct formula for every batch size, merge order and number of processes."""

import itertools

import numpy as np
import pytest
import torch

from diffaccel.core.errors import DataError, NumericalError
from diffaccel.evaluate.groups import assign_groups
from diffaccel.evaluate.metrics.frechet import Gaussian, frechet_estimate
from diffaccel.evaluate.moments import GroupedMoments, Moments


def _data(n=500, d=9, offset=0.0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + offset


@pytest.mark.parametrize("batch", [1, 17, 500])
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
    assert Moments(9).merge(Moments(9)).count == 0


def test_a_large_mean_does_not_cancel_the_covariance():
    plain, shifted = (Moments(9).update(_data(offset=offset)) for offset in (0.0, 1e7))
    np.testing.assert_allclose(shifted.covariance, plain.covariance, rtol=1e-6, atol=1e-7)
    halves = [Moments(9).update(part) for part in _data(offset=1e7).split(250)]
    np.testing.assert_allclose(halves[0].merge(halves[1]).covariance, plain.covariance, rtol=1e-6, atol=1e-7)


def _grouped(x, groups, batch):
    moments = GroupedMoments(x.shape[1])
    for part, part_groups in zip(x.split(batch), groups.split(batch), strict=True):
        moments.update(part, part_groups)
    return moments


def _check_equal(one, other):
    assert one.count == other.count and one.counts == other.counts
    reference = Gaussian(torch.zeros(9, dtype=torch.float64), torch.eye(9, dtype=torch.float64))
    a, b = frechet_estimate(one, reference), frechet_estimate(other, reference)
    assert a.value == pytest.approx(b.value, rel=1e-10)
    assert a.bias_corrected == pytest.approx(b.bias_corrected, rel=1e-10)
    assert a.ci95 == pytest.approx(b.ci95, rel=1e-10)


def test_groups_hold_what_was_put_into_them_for_every_batch_size():
    x, groups = _data(2500), assign_groups(torch.arange(2500) % 7, 2500)
    whole = _grouped(x, groups, 2500)
    for index, part in enumerate(whole.parts):
        np.testing.assert_allclose(part.covariance, np.cov(x[groups == index].numpy(), rowvar=False), rtol=1e-11)
        rest = whole.without(index)
        np.testing.assert_allclose(rest.covariance, np.cov(x[groups != index].numpy(), rowvar=False), rtol=1e-11)
    for batch in (1, 17, 1024):
        _check_equal(_grouped(x, groups, batch), whole)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shares_of_processes_merge_in_any_order(processes):
    x, groups = _data(700), assign_groups(None, 700)
    shares = [_grouped(x[rank::processes], groups[rank::processes], 64) for rank in range(processes)]
    sent = [GroupedMoments.from_tensors(share.tensors()) for share in shares]
    for order in itertools.permutations(sent):
        _check_equal(order[0].merge(*order[1:]), _grouped(x, groups, 700))
    shapes = [{key: (t.shape, t.dtype) for key, t in share.tensors().items()} for share in (*shares, GroupedMoments(9))]
    assert all(shape == shapes[0] for shape in shapes)


def test_merging_leaves_the_parts_alone():
    x, groups = _data(60), assign_groups(None, 60)
    one, other = GroupedMoments(9).update(x[:30], groups[:30]), GroupedMoments(9).update(x[30:], groups[30:])
    union = one.merge(other)
    union.update(x, groups)
    assert (one.count, other.count, union.count, sum(union.counts)) == (30, 30, 120, 120)
    copy = GroupedMoments.from_tensors(one.tensors()).update(x, groups)
    assert copy.count == 90 and one.count == sum(one.counts) == 30


def test_what_waits_is_bounded():
    moments = GroupedMoments(4)
    for _ in range(300):
        moments.update(torch.ones(17, 4), torch.zeros(17, dtype=torch.long))
        assert sum(len(features) for features, _ in moments._waiting) < 1024


def test_single_precision_features_are_summed_in_double():
    x = _data(400, offset=100.0).float()
    np.testing.assert_allclose(Moments(9).update(x).covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-11)
    grouped = GroupedMoments(9).update(x, assign_groups(None, 400))
    np.testing.assert_allclose(grouped.total().covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-11)


@pytest.mark.gpu
def test_cuda_features_are_summed_there_to_the_same_numbers():
    x, groups = _data(2500), assign_groups(None, 2500)
    there = _grouped(x.cuda(), groups, 300)
    assert there.parts[0].mean.is_cuda and not there.tensors()["means"].is_cuda
    _check_equal(there, _grouped(x, groups, 300))


def test_refusals():
    with pytest.raises(DataError, match="at least 2"):
        _ = Moments(3).update(torch.zeros(1, 3)).covariance
    with pytest.raises(DataError, match="must be"):
        Moments(3).update(torch.zeros(5, 4))
    with pytest.raises(NumericalError):
        Moments(3).update(torch.full((2, 3), float("nan")))
    with pytest.raises(DataError, match="merge"):
        Moments(3).merge(Moments(4))
    with pytest.raises(DataError, match="groups"):
        GroupedMoments(3).update(torch.zeros(5, 3), torch.zeros(4, dtype=torch.long))
    with pytest.raises(DataError, match="0 … 9"):
        GroupedMoments(3).update(torch.zeros(1, 3), torch.tensor([10]))
    with pytest.raises(DataError, match="same number of groups"):
        GroupedMoments(3).merge(GroupedMoments(3, groups=2))
    with pytest.raises(NumericalError):
        GroupedMoments(3).update(torch.full((2, 3), float("inf")), torch.zeros(2, dtype=torch.long)).total()
