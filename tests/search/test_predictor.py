"""Ranking from sequences of steps: the correlation by its definition, learning, and sameness under a seed."""

import itertools
import math

import numpy as np
import pytest
import torch

from diffaccel.core.errors import UsageError
from diffaccel.search.predictor import RankingPredictor, kendall_tau

STEPS, KINDS = 5, 3


def by_definition(one, other):
    """τ_b from concordant, discordant and tied pairs, one by one."""
    concordant = discordant = tied_one = tied_other = 0
    for (a, b), (c, d) in itertools.combinations(list(zip(one, other, strict=True)), 2):
        if a == c or b == d:
            tied_one += a == c
            tied_other += b == d
        elif (a < c) == (b < d):
            concordant += 1
        else:
            discordant += 1
    pairs = len(one) * (len(one) - 1) // 2
    return (concordant - discordant) / math.sqrt((pairs - tied_one) * (pairs - tied_other))


def sequences(count, seed=0):
    """(tokens, scores): kinds and real numbers per step; neighbours interact."""
    random = np.random.default_rng(seed)
    kind, value = random.integers(KINDS, size=(count, STEPS)), random.normal(size=(count, STEPS))
    target = np.linspace(-1.0, 1.0, STEPS)
    scores = ((value - target) ** 2).sum(1) + (kind != np.arange(STEPS) % KINDS).sum(1)
    scores += 0.7 * (value[:, 1:] * value[:, :-1]).sum(1) + 1.5 * (kind[:, 1:] == kind[:, :-1]).sum(1)
    return list(np.concatenate([np.eye(KINDS)[kind], value[..., None]], axis=2)), scores


@pytest.fixture(scope="module")
def fitted():
    return RankingPredictor(seed=3).fit(*sequences(60))


@pytest.mark.parametrize("levels", [3, 1000])
def test_kendall_tau_is_what_its_definition_says(levels):
    random = np.random.default_rng(levels)
    for _ in range(5):
        one, other = random.integers(levels, size=(2, 30)).astype(float)
        assert kendall_tau(one, other) == pytest.approx(by_definition(one, other), abs=1e-14)


def test_kendall_tau_takes_infinities_as_ties():
    assert kendall_tau([1.0, 2.0, math.inf, math.inf], [1.0, 2.0, 3.0, 3.0]) == pytest.approx(1.0, abs=1e-15)
    one, other = [1.0, math.inf, math.inf, 0.5], [2.0, 4.0, 3.0, 1.0]
    assert kendall_tau(one, other) == pytest.approx(by_definition(one, other), abs=1e-15)


def test_kendall_tau_of_a_constant_is_zero():
    assert kendall_tau([math.inf] * 4, [1.0, 2.0, 3.0, 4.0]) == 0.0


def test_unseen_sequences_are_ranked():
    tokens, scores = sequences(400)
    predictor = RankingPredictor().fit(tokens[:200], scores[:200])
    ahead = kendall_tau(predictor.predict(tokens[200:]), scores[200:])
    assert ahead >= 0.6
    assert predictor.tau == pytest.approx(ahead, abs=0.1)  # cross-validation says what to expect


def test_only_ranks_of_scores_matter(fitted):
    tokens, scores = sequences(60)
    cubed = RankingPredictor(seed=3).fit(tokens, np.exp(scores))
    np.testing.assert_array_equal(cubed.predict(tokens), fitted.predict(tokens))


def test_infinite_scores_are_the_worst():
    tokens, scores = sequences(120)
    broken = scores > np.quantile(scores, 0.7)
    predicted = RankingPredictor().fit(tokens, np.where(broken, np.inf, scores)).predict(tokens)
    assert predicted[broken].mean() > predicted[~broken].mean() + 1.0
    with_nan = RankingPredictor().fit(tokens, np.where(broken, np.nan, scores)).predict(tokens)
    np.testing.assert_array_equal(predicted, with_nan)


def test_seed_decides_and_global_state_does_not(fitted):
    tokens, scores = sequences(60)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    with torch.no_grad():
        again = RankingPredictor(seed=3).fit(tokens, scores)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)
    again.predict(tokens[:5])  # what was asked before makes no difference
    np.testing.assert_array_equal(again.predict(tokens), fitted.predict(tokens))
    assert (RankingPredictor(seed=4).fit(tokens, scores).predict(tokens) != fitted.predict(tokens)).any()


def test_a_prediction_does_not_depend_on_its_company(fitted):
    tokens, _ = sequences(60)
    longer = [*tokens[:3], np.concatenate([tokens[0], tokens[1]])]
    np.testing.assert_allclose(fitted.predict(longer)[:3], fitted.predict(tokens)[:3], rtol=0, atol=1e-5)


def test_sequences_may_differ_in_length():
    tokens, scores = sequences(90)
    tokens = [one[: STEPS - i % 3] for i, one in enumerate(tokens)]
    predicted = RankingPredictor().fit(tokens[:60], scores[:60] + 20.0 * (np.arange(60) % 3)).predict(tokens[60:])
    assert kendall_tau(predicted, np.arange(60, 90) % 3) > 0.7


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_examples_do(count):
    tokens, scores = sequences(count)
    predictor = RankingPredictor().fit(tokens, scores)
    assert np.isfinite(predictor.predict(sequences(5, seed=1)[0])).all() and -1.0 <= predictor.tau <= 1.0


def test_equal_scores_teach_nothing():
    tokens, _ = sequences(8)
    predictor = RankingPredictor().fit(tokens, [math.inf] * 8)
    assert (predictor.predict(tokens) == 0.0).all() and predictor.tau == 0.0
    assert predictor.predict([]).shape == (0,)


def test_scores_must_be_as_many_as_candidates():
    with pytest.raises(UsageError, match="one score for each"):
        RankingPredictor().fit(sequences(3)[0], [1.0])
    with pytest.raises(UsageError, match="0 candidates"):
        RankingPredictor().fit([], [])
