"""Inception Score against its limits and torchmetrics; CLIP score against its definition."""

import itertools
import math

import pytest
import torch
from torch import nn
from torchmetrics.image.inception import InceptionScore

from diffaccel.core.errors import DataError, NumericalError
from diffaccel.evaluate.metrics.scores import ScoreSums, assign_splits, clip_score

LOGITS = 3 * torch.randn(205, 7, generator=torch.Generator().manual_seed(0))


def _sums(logits, split, splits=10, batch=1000):
    sums = ScoreSums(logits.shape[1], splits)
    for part, part_split in zip(logits.split(batch), split.split(batch), strict=True):
        sums.update(part, part_split)
    return sums


@pytest.mark.parametrize(("count", "splits"), [(200, 10), (205, 10), (205, 4), (11, 10)])
def test_agrees_with_torchmetrics_on_the_same_splits(count, splits, monkeypatch):
    identity = nn.Identity()
    with pytest.warns(UserWarning, match="save all extracted features"):
        metric = InceptionScore(feature=identity, splits=splits)
    metric.update(LOGITS[:count].double())
    split = assign_splits(count, splits, seed=3)
    monkeypatch.setattr(torch, "randperm", lambda n: split.argsort(stable=True))
    expected = [float(x) for x in metric.compute()]
    assert _sums(LOGITS[:count], split, splits).compute() == pytest.approx(expected, rel=1e-6)


def test_split_sizes_are_those_of_chunk():
    for count, splits in ((200, 10), (205, 10), (11, 10), (3, 10), (7, 1)):
        sizes = torch.bincount(assign_splits(count, splits)).tolist()
        assert sizes == [len(part) for part in torch.arange(count).chunk(splits)]
    assert torch.equal(assign_splits(50, 5, seed=1), assign_splits(50, 5, seed=1))
    assert not torch.equal(assign_splits(50, 5, seed=1), assign_splits(50, 5, seed=2))
    assert assign_splits(0).shape == (0,)


def test_limits_of_the_inception_score():
    """C for sure predictions of all classes alike, 1 for equal predictions whether sure or not."""
    one = torch.zeros(100, dtype=torch.long)
    sure = 100.0 * torch.eye(5).repeat(20, 1)
    assert ScoreSums(5, 1).update(sure, one).compute() == (pytest.approx(5.0, rel=1e-12), None)
    assert ScoreSums(5, 1).update(sure[:1].repeat(100, 1), one).compute()[0] == pytest.approx(1.0, rel=1e-12)
    assert ScoreSums(5, 1).update(torch.zeros(100, 5), one).compute()[0] == pytest.approx(1.0, rel=1e-12)
    halves = torch.log(torch.tensor([[0.75, 0.25], [0.25, 0.75]])).repeat(50, 1)
    expected = math.exp(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert ScoreSums(2, 1).update(halves, one).compute()[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 17])
def test_batches_do_not_matter(batch):
    split = assign_splits(205)
    assert _sums(LOGITS, split, batch=batch).compute() == pytest.approx(_sums(LOGITS, split).compute(), rel=1e-10)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shares_of_processes_merge_in_any_order(processes):
    split = assign_splits(205)
    shares = [_sums(LOGITS[rank::processes], split[rank::processes], batch=32) for rank in range(processes)]
    sent = [ScoreSums.from_tensors(share.tensors()) for share in shares]
    for order in itertools.permutations(sent):
        merged = order[0].merge(*order[1:])
        assert merged.compute() == pytest.approx(_sums(LOGITS, split).compute(), rel=1e-10)
    assert int(sent[0].counts.sum()) == len(LOGITS[::processes])


def test_clip_score_is_the_mean_of_clamped_cosines():
    images = torch.tensor([[2.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    texts = torch.tensor([[5.0, 0.0], [3.0, 0.0], [-1.0, 0.0]])
    result = clip_score(images, texts)
    assert result.value == pytest.approx((100 + 100 / 2**0.5 + 0) / 3, rel=1e-7)
    low, high = result.ci95
    assert low < result.value < high and "normal" in result.method
    assert clip_score(images[:1], texts[:1]).ci95 is None


def test_refusals():
    zeros = torch.zeros(3, dtype=torch.long)
    with pytest.raises(DataError, match="Class scores must be"):
        ScoreSums(7).update(LOGITS[:3, :6], zeros)
    with pytest.raises(DataError, match="Splits must lie"):
        ScoreSums(7, 2).update(LOGITS[:3], zeros + 2)
    with pytest.raises(NumericalError, match="class scores"):
        ScoreSums(7).update(LOGITS[:3] * float("nan"), zeros)
    with pytest.raises(DataError, match="got none"):
        ScoreSums(7).compute()
    with pytest.raises(DataError, match="merged"):
        ScoreSums(7).merge(ScoreSums(8))
    with pytest.raises(DataError, match="one shape"):
        clip_score(LOGITS, LOGITS[:5])
    with pytest.raises(DataError, match="at least 1"):
        clip_score(LOGITS[:0], LOGITS[:0])
    with pytest.raises(NumericalError, match="direction"):
        clip_score(LOGITS, torch.zeros_like(LOGITS))
