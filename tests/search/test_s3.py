"""Predictor-guided search: its budget, its optimum, its sameness under a seed, and spaces that end."""

import itertools
import math

import numpy as np
import pytest
import torch

from diffaccel.search.engine import Search
from diffaccel.search.s3 import s3

STEPS, KINDS, LEVELS = 4, 3, 5
KIND, LEVEL = (0, 2, 1, 2), (3, 4, 1, 0)  # the optimum


class Words:
    """Sequences of (kind, level) decisions."""

    def __init__(self, steps=STEPS, kinds=KINDS, levels=LEVELS):
        self.steps, self.kinds, self.levels = steps, kinds, levels

    def key(self, candidate):
        return str(candidate)

    def draw(self, random):
        return tuple((int(random.integers(self.kinds)), int(random.integers(self.levels))) for _ in range(self.steps))

    def mutate(self, candidate, random):
        place, changed = int(random.integers(self.steps)), list(candidate)
        kind, level = changed[place]
        if self.kinds > 1 and random.random() < 0.5:
            changed[place] = ((kind + 1 + int(random.integers(self.kinds - 1))) % self.kinds, level)
        else:
            changed[place] = (kind, (level + 1 + int(random.integers(self.levels - 1))) % self.levels)
        return tuple(changed)

    def cross(self, one, other, random):
        return tuple(pair[int(random.integers(2))] for pair in zip(one, other, strict=True))

    def vector(self, candidate):
        return np.zeros(0)

    def with_vector(self, candidate, vector):
        return candidate

    def tokens(self, candidate):
        return np.array([[*np.eye(self.kinds)[kind], level / self.levels] for kind, level in candidate])


def score(candidate):
    """0 at the optimum, at least 1 elsewhere; levels count together with those of their neighbours."""
    gaps = [level - best for (_, level), best in zip(candidate, LEVEL, strict=True)]
    wrong = sum(kind != best for (kind, _), best in zip(candidate, KIND, strict=True))
    return sum(gap**2 for gap in gaps) + 0.5 * sum(a * b for a, b in itertools.pairwise(gaps)) + 6.0 * wrong


def scores(candidates):
    return [score(one) for one in candidates]


FAST = {"batch": 24, "screened": 100}


def searched(evaluations, seed=0, start=3, score=scores, space=None, budget=10_000, **settings):
    """(search, candidates in the order of their calls)."""
    calls, space = [], space or Words()

    def counting(candidates):
        calls.extend(candidates)
        return score(candidates)

    search, random = Search(space, counting, budget, seed), np.random.default_rng(1)
    search.evaluate([space.draw(random) for _ in range(start)], "seed")
    s3(search, evaluations, **{**FAST, **settings})
    return search, calls


@pytest.mark.parametrize("seeds", [pytest.param(range(10), marks=pytest.mark.slow), range(1, 2)])
def test_the_optimum_is_found(seeds):
    found = 0
    for seed in seeds:
        best = searched(120, seed=seed, batch=12, screened=600)[0].best()[0]
        found += best.candidate == tuple(zip(KIND, LEVEL, strict=True))
    assert found >= 0.9 * len(seeds)  # of 50,625 candidates


@pytest.mark.parametrize("start", [0, 3])
def test_the_evaluations_are_spent_to_the_last_one(start):
    search, calls = searched(53, start=start)
    assert len(search.archive) == len(calls) == len(set(calls)) == start + 53
    assert {one.origin for one in search.archive[start:]} == {"s3"}


def test_a_smaller_budget_is_obeyed():
    search, calls = searched(100, budget=41)
    assert len(search.archive) == len(calls) == 41 and search.remaining == 0
    assert searched(0)[0].remaining == 10_000 - 3


def test_candidates_without_a_finite_score_do_not_stop_it():
    search, calls = searched(60, score=lambda candidates: [math.inf] * len(candidates))
    assert len(calls) == len(set(calls)) == 63
    assert search.facts["kendall_tau"] == 0.0


def test_a_space_may_be_used_up():
    space = Words(steps=2, kinds=2, levels=3)
    search, calls = searched(1000, space=space, score=lambda candidates: [float(one[0][1]) for one in candidates])
    assert len(set(calls)) == len(calls) == len(search.archive) == 36


def test_the_seed_decides_and_global_state_does_not():
    one, _ = searched(30, seed=5)
    torch.manual_seed(123)
    np.random.seed(7)
    again, _ = searched(30, seed=5)
    assert [item.candidate for item in one.archive] == [item.candidate for item in again.archive]
    assert one.facts == again.facts
    assert [item.candidate for item in searched(30, seed=6)[0].archive] != [item.candidate for item in one.archive]


def test_it_says_how_well_its_predictor_ranks():
    search, _ = searched(120)
    assert search.facts["kendall_tau"] >= 0.6
    assert -1.0 <= search.facts["kendall_tau_ahead"] <= 1.0


def test_without_the_predictor_it_is_an_evolution():
    search, calls = searched(48, plain=1.0)
    assert len(set(calls)) == 51 and search.best()[0].score < min(map(score, calls[:3]))


def test_a_batch_is_of_many_kinds_where_there_are_many():
    """Kinds that the predictor likes best do not fill a batch by themselves; where there is but one, it may."""

    class Lines(Words):  # a kind and one real number
        def key(self, candidate):
            return repr(candidate)

        def draw(self, random):
            return int(random.integers(self.kinds)), float(random.uniform(-1.0, 1.0))

        def mutate(self, candidate, random):
            kind = int(random.integers(self.kinds)) if random.random() < 0.5 else candidate[0]
            return kind, candidate[1] + 0.3 * random.standard_normal()

        def cross(self, one, other, random):
            return one[0], other[1]

        def vector(self, candidate):
            return np.array([candidate[1]])

        def with_vector(self, candidate, vector):
            return candidate[0], float(vector[0])

        def tokens(self, candidate):
            return np.array([[*np.eye(self.kinds)[candidate[0]], candidate[1]]])

    def cost(candidates):
        return [kind + number**2 for kind, number in candidates]

    def batches(kinds):
        search, _ = searched(48, start=12, score=cost, space=Lines(1, kinds), batch=12, first=12, plain=0.0)
        archive = [one.candidate[0] for one in search.archive[24:]]
        return [archive[start : start + 12] for start in range(0, len(archive), 12)]

    for batch in batches(12):
        assert max(map(batch.count, batch)) <= 2
    assert [len(batch) for batch in batches(1)] == [12, 12, 12]
