"""Selections by joint losses, against every possible set."""

import itertools
import math

import numpy as np
import pytest
from test_selection import made_up, possible

from diffaccel.core.errors import DataError, NumericalError, UsageError
from diffaccel.prune.additivity import nested
from diffaccel.prune.joint import search_selection, select_iteratively
from diffaccel.prune.scores import Remembered, score
from diffaccel.prune.selection import SOLVERS, Task, select
from diffaccel.prune.subset_space import SubsetSpace


class Quadratic:
    """Losses that do not add up: ‖Σ v‖² of one vector for each operator, those inside others being parts of theirs."""

    def __init__(self, survey, seed, correlated=0.7):
        random = np.random.default_rng(seed)
        common = random.normal(size=4)
        self.vectors = {name: correlated * common + random.normal(size=4) for name in survey.names}
        self.calls = 0

    def loss(self, names):
        self.calls += 1
        total = sum((self.vectors[name] for name in names), np.zeros(4))
        return float(total @ total)

    def settings(self):
        return {"method": "quadratic"}


def case(seed):
    survey, _ = made_up(np.random.default_rng(seed))
    criterion = Quadratic(survey, seed)
    return survey, criterion, {name: criterion.loss([name]) for name in survey.names}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cost", ["parameters", "macs"])
def test_candidates_meet_the_target_and_nothing_more(seed, cost):
    survey, _, scores = case(seed)
    task = Task.of(survey, scores, 0.4, cost)
    space, random = SubsetSpace(task), np.random.default_rng(seed)
    valid = {
        names
        for names in possible(survey)
        if task.met(sum(getattr(survey[n], cost) for n in names))
        and not any(task.met(sum(getattr(survey[n], cost) for n in names if n != one)) for one in names)
    }
    seen = set()
    parents = [space.draw(random) for _ in range(40)]
    for one, other in itertools.pairwise(parents):
        seen |= {one, space.mutate(one, random), space.cross(one, other, random)}
    assert seen <= valid and len(seen) > min(3, len(valid) - 1)
    assert all(space.mutate(one, random) != one for one in seen) or len(valid) == 1
    one = parents[0]
    assert space.key(one) == space.key(one[::-1]) and len(space.vector(one)) == 0
    assert space.with_vector(one, np.empty(0)) == one
    assert space.tokens(one)[:, 0].sum() == len(one) and space.tokens(one)[:, 0] @ space.tokens(one)[:, 1] >= 1.0


@pytest.mark.parametrize("seed", range(6))
def test_the_search_finds_the_best_of_all(seed):
    """Where losses do not add up, so that no solver by single scores can know."""
    survey, criterion, scores = case(seed)
    found = search_selection(survey, scores, criterion, 0.4, evaluations=150)
    sets = [names for names in possible(survey) if sum(survey[n].parameters for n in names) >= 0.4 * survey.parameters]
    task = Task.of(survey, scores, 0.4, "parameters")
    minimal = [
        names
        for names in sets
        if not any(task.met(sum(survey[n].parameters for n in names if n != one)) for one in names)
    ]
    assert found.score == pytest.approx(min(map(criterion.loss, minimal)))
    assert found.score == pytest.approx(criterion.loss(found.names)) and found.ratio >= 0.4
    for solver in SOLVERS:
        assert found.score <= criterion.loss(select(survey, scores, 0.4, solver=solver).names) + 1e-9


def test_a_search_is_repeatable_and_stays_in_its_budget():
    survey, _, scores = case(3)
    told, found = [], []
    for _ in range(2):
        criterion = Quadratic(survey, 3)
        found.append(
            search_selection(survey, scores, criterion, 0.5, evaluations=9, progress=lambda *facts: told.append(facts))
        )
        assert criterion.calls <= 9
    assert found[0] == found[1] and told[0][1] == 9 and told[-1][0] <= 9
    assert search_selection(survey, scores, Quadratic(survey, 3), 0.0).names == ()


@pytest.mark.parametrize("seed", range(6))
def test_iterative_against_the_definition(seed):
    """Each removal adds least for what it saves; the first is the one-shot solver's first."""
    survey, criterion, scores = case(seed)
    first = select_iteratively(survey, scores, criterion, 1e-9)
    assert first.names == select(survey, scores, 1e-9, solver="greedy").names
    found = select_iteratively(survey, scores, criterion, 0.4)
    assert found.ratio >= 0.4 and found.score == pytest.approx(criterion.loss(found.names))
    assert not any(nested(one, other) for one, other in itertools.combinations(found.names, 2))
    task = Task.of(survey, scores, 0.4, "parameters")
    assert not any(task.met(sum(survey[n].parameters for n in found.names if n != one)) for one in found.names)
    alone = {name: float(index + 1) * survey[name].parameters for index, name in enumerate(survey.names)}

    class Additive:
        def loss(self, names):
            return sum(alone[name] for name in names)

    outer = {name: value for name, value in alone.items() if "." not in name}
    same = select_iteratively(survey, outer, Additive(), 0.4)
    assert same.names == select(survey, outer, 0.4, solver="greedy").names
    assert select_iteratively(survey, scores, criterion, 0.4, every=3).ratio >= 0.4


def test_losses_are_computed_once(tmp_path):
    survey, criterion, scores = case(1)
    file, before = tmp_path / "scores.jsonl", criterion.calls
    kept = Remembered(criterion, file)
    assert score(kept, survey.names) == scores
    want = search_selection(survey, scores, kept, 0.4, evaluations=30)
    joint = kept.loss(want.names[::-1])
    calls = criterion.calls
    assert calls - before <= len(survey.names) + 30
    again = Remembered(criterion, file)
    assert score(again, survey.names) == scores and again.loss(want.names) == joint
    assert search_selection(survey, scores, again, 0.4, evaluations=30) == want
    assert criterion.calls == calls, "everything was in the file"
    with pytest.raises(UsageError, match="other settings"):
        criterion.settings = lambda: {"method": "another"}
        Remembered(criterion, file)
    file.write_text("nonsense\n")
    with pytest.raises(DataError, match="not the journal"):
        Remembered(criterion, file)


def test_what_cannot_be():
    survey, criterion, scores = case(0)
    with pytest.raises(UsageError, match="at least one evaluation"):
        search_selection(survey, scores, criterion, 0.3, evaluations=0)
    with pytest.raises(UsageError, match="at least one removal"):
        select_iteratively(survey, scores, criterion, 0.3, every=0)
    for ways in (search_selection, select_iteratively):
        with pytest.raises(UsageError, match="At most"):
            ways(survey, scores, criterion, 0.99)

    class Broken:
        def loss(self, names):
            return math.nan

    with pytest.raises(NumericalError, match=r"None of \d+ sets"):
        search_selection(survey, scores, Broken(), 0.4, evaluations=5)
    with pytest.raises(NumericalError, match="nothing more can go"):
        select_iteratively(survey, scores, Broken(), 0.6)
