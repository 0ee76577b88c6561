"""Search strategies by themselves: budgets, doubles, scores that are none, and optima that are known."""

import functools
import math

import numpy as np
import pytest

from diffaccel.core.schedule import Flow, from_diffusers
from diffaccel.samplers.usf import Decision
from diffaccel.search.engine import Search
from diffaccel.search.evolution import evolution, offspring
from diffaccel.search.polish import polish
from diffaccel.search.s3 import s3
from diffaccel.search.space import SolverSpace


class Box:
    """Vectors in a box beside a kind that scores may depend on."""

    def __init__(self, dimensions=3, kinds=4, limit=10.0):
        self.dimensions, self.kinds, self.limit = dimensions, kinds, limit

    def key(self, candidate):
        return repr(candidate)

    def draw(self, random):
        return int(random.integers(self.kinds)), tuple(random.uniform(-1.0, 1.0, self.dimensions).tolist())

    def mutate(self, candidate, random):
        kind, numbers = candidate
        if self.dimensions == 0 or random.random() < 0.3:
            return (kind + 1) % self.kinds, numbers
        return self.with_vector(candidate, np.array(numbers) + 0.3 * random.standard_normal(self.dimensions))

    def cross(self, one, other, random):
        return one[0], other[1]

    def vector(self, candidate):
        return np.array(candidate[1])

    def with_vector(self, candidate, vector):
        return candidate[0], tuple(np.clip(vector, -self.limit, self.limit).tolist())

    def tokens(self, candidate):
        return np.array([[candidate[0], *candidate[1]]])


def searched(space, score, budget=1000, seed=0, calls=None, **settings):
    def scores(candidates):
        if calls is not None:
            calls.extend(map(space.key, candidates))
        return [score(one) for one in candidates]

    return Search(space, scores, budget, seed, **settings)


def square(candidate):
    return 0.1 + candidate[0] + sum(number**2 for number in candidate[1])


# ---- the engine


def test_every_candidate_is_scored_once_and_the_budget_is_kept():
    calls, told = [], []
    search = searched(Box(), square, 5, calls=calls, tell=lambda search: told.append(len(search.archive)))
    one, two, *more = [(0, (float(i),) * 3) for i in range(8)]
    assert search.evaluate([one, two, one], "first") == [square(one), square(two), square(one)]
    assert search.evaluate([two, one], "again") == [square(two), square(one)] and len(calls) == 2
    assert search.remaining == 3 and not search.knows(more[0]) and search.knows(one)
    found = search.evaluate([one, *more], "rest")
    assert found[:4] == [square(one), *map(square, more[:3])] and found[4:] == [math.inf] * 3
    assert search.remaining == 0 and len(calls) == len(set(calls)) == 5
    assert search.evaluate([more[-1]], "late") == [math.inf] and search.evaluate([two], "late") == [square(two)]
    assert told == [2, 5] and [one.origin for one in search.archive] == ["first"] * 2 + ["rest"] * 3
    assert search.evaluate([], "none") == [] and len(calls) == 5


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_scores_that_are_none_come_last(wrong):
    search = searched(Box(1), lambda one: wrong if one[1][0] < 0 else one[1][0])
    scores = search.evaluate([(0, (-1.0,)), (0, (2.0,)), (0, (-3.0,)), (0, (1.0,))], "x")
    assert scores == [math.inf, 2.0, math.inf, 1.0]
    assert [one.score for one in search.best(9)] == [1.0, 2.0, math.inf, math.inf]


def test_of_equals_the_earlier_is_better():
    search = searched(Box(1), lambda one: 1.0)
    search.evaluate([(0, (float(i),)) for i in range(5)], "x")
    assert [one.candidate[1][0] for one in search.best(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_of_one_kind_at_most_so_many():
    search = searched(Box(1), lambda one: one[0] + 0.01 * one[1][0])
    search.evaluate([(kind, (float(i),)) for kind in range(3) for i in range(5)], "x")
    assert [one.candidate for one in search.best(5, alike=2)] == [
        (0, (0.0,)), (0, (1.0,)), (1, (0.0,)), (1, (1.0,)), (2, (0.0,))
    ]  # fmt: skip
    assert [one.candidate[0] for one in search.best(99, alike=1)] == [0, 1, 2]
    assert len(search.best(99)) == 15 and search.best(0) == [] and search.best(0, alike=1) == []


# ---- strategies


STRATEGIES = {
    "evolution": evolution,
    "s3": functools.partial(s3, screened=40),
    "polish": polish,
}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("budget", [0, 1, 7, 45])
def test_budgets_are_obeyed(name, budget):
    """Of the strategy and of the search, whichever is smaller; nothing is scored twice."""
    for share in (0, 1, 10, 60):
        calls = []
        search = searched(Box(), square, budget, calls=calls)
        search.evaluate([(1, (0.5, 0.2, 0.1)), (0, (0.9, -0.3, 0.4))], "seed")
        before = len(calls)
        STRATEGIES[name](search, share)
        assert len(calls) == len(set(calls)) == len(search.archive) <= budget
        spent = len(calls) - before
        assert spent <= share and (name == "polish" or spent == min(share, max(budget - before, 0)))


@pytest.mark.parametrize("name", STRATEGIES)
def test_same_seed_same_search(name):
    def archive(seed):
        search = searched(Box(), square, 30, seed)
        search.evaluate([search.space.draw(search.random) for _ in range(6)], "seed")
        STRATEGIES[name](search, 24)
        return [(one.candidate, one.score) for one in search.archive]

    assert archive(1) == archive(1) and archive(1) != archive(2)


@pytest.mark.parametrize("name", STRATEGIES)
def test_spaces_that_end_stop_the_search(name):
    """Four candidates in all."""
    search = searched(Box(0), square, 1000)
    search.evaluate([(0, ())], "seed")
    STRATEGIES[name](search, 500)
    assert len(search.archive) == (1 if name == "polish" else 4)


@pytest.mark.parametrize("name", ["evolution", "s3"])
def test_nothing_to_start_from_but_chance(name):
    search = searched(Box(), square, 50)
    STRATEGIES[name](search, 50)
    assert len(search.archive) == 50


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_strategies_survive_scores_that_are_none(name, wrong):
    search = searched(Box(), lambda one: wrong if one[0] != 2 or one[1][0] > 0.3 else square(one), 120, 3)
    search.evaluate([(0, (0.0,) * 3), (1, (0.1,) * 3), (2, (0.29, 0.5, 0.5))], "seed")
    STRATEGIES[name](search, 60)
    assert math.isfinite(search.best()[0].score)
    every = searched(Box(), lambda one: wrong, 40)
    every.evaluate([(0, (0.0,) * 3)], "seed")
    STRATEGIES[name](every, 30)
    assert all(one.score == math.inf for one in every.archive)


def test_one_candidate_of_one_call():
    """A flow sampled in one call leaves nothing to decide."""
    search = searched(SolverSpace(Flow(), 1), lambda candidate: 1.0, 100)
    search.evaluate([search.space.draw(search.random)], "seed")
    assert offspring(search, 1, [search.best()[0].candidate]) == []
    polish(search, 100)
    assert len(search.archive) == 1


def test_children_are_new_and_differ():
    search = searched(Box(1, kinds=50), square, 100)
    search.evaluate([(kind, (0.0,)) for kind in range(40)], "x")
    children = offspring(search, 30, [one.candidate for one in search.best(10)])
    assert len(children) == len(set(children)) == 30 and not any(map(search.knows, children))


# ---- polish


@pytest.mark.parametrize(("condition", "left"), [(1.0, 1e-4), (5.0, 1e-3), (30.0, 1e-2)])
@pytest.mark.parametrize("seed", range(4))
def test_polish_finds_the_minimum_of_a_quadratic(condition, left, seed):
    """In ten dimensions and 150 evaluations, up to a share of what was above the minimum."""
    random = np.random.default_rng(seed)
    rotation = np.linalg.qr(random.standard_normal((10, 10)))[0]
    matrix = rotation @ np.diag(np.geomspace(1.0, condition, 10)) @ rotation.T
    gap = 0.5 * random.standard_normal(10)

    def score(one):
        return 1.0 + float((np.array(one[1]) - gap) @ matrix @ (np.array(one[1]) - gap))

    search = searched(Box(10), score, 151)
    search.evaluate([(0, (0.0,) * 10)], "seed")
    polish(search, 150)
    assert search.best()[0].score - 1.0 < left * (search.archive[0].score - 1.0)


@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_polish_of_scores_that_are_not_positive(shift):
    search = searched(Box(3), lambda one: sum((x - 0.4) ** 2 for x in one[1]) + shift, 200)
    search.evaluate([(0, (0.0,) * 3)], "seed")
    polish(search, 190)
    assert search.best()[0].score - shift < 1e-3


def test_polish_stays_inside_limits():
    """The minimum of two of the numbers lies outside; the others are free."""
    target = np.array([3.0, -3.0, 0.2, 0.1])
    search = searched(Box(4, limit=0.5), lambda one: 1.0 + float(((np.array(one[1]) - target) ** 2).sum()), 150)
    search.evaluate([(0, (0.5, 0.0, 0.0, 0.0))], "seed")
    polish(search, 140)
    best = np.array(search.best()[0].candidate[1])
    assert np.abs(best).max() <= 0.5 and best == pytest.approx([0.5, -0.5, 0.2, 0.1], abs=0.02)


@pytest.mark.parametrize("score", [lambda one: 1.0, lambda one: 0.0, lambda one: -2.0])
def test_polish_leaves_what_is_flat(score):
    search = searched(Box(3), score, 500)
    search.evaluate([(0, (0.0,) * 3), (1, (0.1,) * 3)], "seed")
    polish(search, 400)
    assert len(search.archive) <= 2 + 2 * 8


def test_polish_between_infinite_neighbours():
    search = searched(Box(3), lambda one: 1.0 if one[1] == (0.0,) * 3 else math.inf, 500)
    search.evaluate([(0, (0.0,) * 3)], "seed")
    polish(search, 400)
    assert search.best()[0].candidate == (0, (0.0,) * 3) and search.remaining > 400


def test_polish_of_nothing_and_of_no_numbers():
    empty, pointless = searched(Box(3), square, 100), searched(Box(0), square, 100)
    polish(empty, 50)
    assert not empty.archive
    pointless.evaluate([(0, ()), (1, ())], "seed")
    polish(pointless, 50)
    assert len(pointless.archive) == 2


def test_polish_goes_on_to_the_next_kind():
    """The second best begins in a deeper valley."""

    def score(one):
        return (0.5 if one[0] == 0 else 0.01) + sum((x - 0.3) ** 2 for x in one[1]) + 0.2 * one[0]

    search = searched(Box(2), score, 400)
    search.evaluate([(0, (0.3, 0.3)), (1, (-1.0, 1.0))], "seed")
    polish(search, 300)
    assert search.best()[0].candidate[0] == 1 and search.best()[0].score == pytest.approx(0.21, rel=0.02)


# ---- a known optimum in the space of solver schedules

PLACES = np.array([0.95, 0.55, 0.3, 0.12])
WANTED = (None, ("velocity", 2), ("data", 3), ("noise", 2))


def planted(space):
    """1 at the optimum: squares of the distances of places, and a price for every step of another core or order."""

    def score(candidate):
        if len(candidate.times) != 4 or candidate.skip_first:
            return 9.0
        gaps = 4.0 * (space.axis.of(candidate.times) / space.axis.top - PLACES)
        price = sum(
            0.3 * (step.core != wanted[0]) + 0.3 * (step.order != wanted[1])
            for step, wanted in zip(candidate.steps, WANTED, strict=True)
            if wanted
        )
        return 1.0 + float((gaps**2).sum()) + price

    return score


@pytest.mark.parametrize(
    ("strategy", "evaluations", "seeds"),
    [
        (evolution, 1000, 2),
        pytest.param(evolution, 1000, 10, marks=pytest.mark.slow),
        pytest.param(s3, 400, 10, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
def test_planted_schedules_are_found(strategy, evaluations, seeds):
    """From hand-set starts, by search and polish in equal parts, as searches run: in nine of ten seeds."""
    space, reached = SolverSpace(from_diffusers({}), 4), []
    starts = [
        space.settled(np.linspace(1.0, 0.25, 4), [Decision(order, core, "angle")] * 4)
        for order in (1, 2) for core in ("noise", "data", "velocity")
    ]  # fmt: skip
    for seed in range(seeds):
        search = searched(space, planted(space), evaluations, seed)
        search.evaluate(starts, "seeds")
        strategy(search, search.remaining // 2)
        polish(search, search.remaining)
        reached.append(search.best()[0].score)
    assert sum(score < 1.005 for score in reached) >= 0.9 * seeds, reached
