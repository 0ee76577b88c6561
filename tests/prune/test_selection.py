"""Selections against every possible one."""

import itertools
import math

import numpy as np
import pytest
from networks import tiny_unet

from diffaccel.core.errors import UsageError
from diffaccel.prune.additivity import nested
from diffaccel.prune.selection import SOLVERS, reachable, select
from diffaccel.prune.surgery import removed
from diffaccel.prune.survey import Candidate, Survey, survey_network


def made_up(random: np.random.Generator, fractions: bool = False) -> tuple[Survey, dict[str, float]]:
    """A few outer operators with some inside, and losses."""
    names = []
    for outer in range(random.integers(2, 5)):
        names.append(f"{outer}")
        for inner in range(random.integers(0, 3)):
            names.append(f"{outer}.{inner}")
            names += [f"{outer}.{inner}.0"] * bool(random.random() < 0.3)
    sizes = {}
    for name in reversed(names):
        inside = sum(
            sizes[one] for one in sizes if one.startswith(name + ".") and one.count(".") == name.count(".") + 1
        )
        sizes[name] = int(inside + random.integers(1, 30))
    seconds = {name: size * 0.001 * random.uniform(0.5, 1.0) for name, size in sizes.items()}
    candidates = tuple(
        Candidate(name, "resnet", "identity", sizes[name], 2 * sizes[name], seconds[name] if fractions else None)
        for name in names
    )
    whole = sum(sizes[name] for name in names if "." not in name) + 20
    survey = Survey("Net", candidates, whole, 2 * whole, whole * 0.001 if fractions else None)
    return survey, {name: float(random.uniform(0.1, 3.0)) for name in names}


def possible(survey: Survey):
    """Every set of candidates none of which contains another."""
    for size in range(len(survey.candidates) + 1):
        for names in itertools.combinations(survey.names, size):
            if not any(nested(one, other) for one, other in itertools.combinations(names, 2)):
                yield names


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("cost", ["parameters", "macs"])
def test_the_knapsack_is_the_best_of_all(seed, cost):
    random = np.random.default_rng(seed)
    survey, scores = made_up(random)
    whole = getattr(survey, cost)
    sets = [
        (sum(getattr(survey[n], cost) for n in names) / whole, sum(scores[n] for n in names))
        for names in possible(survey)
    ]
    most = max(share for share, _ in sets)
    assert reachable(survey, cost=cost) == pytest.approx(most)
    for ratio in (0.0, 0.1, 0.37, 0.9 * most, most):
        found = select(survey, scores, ratio, cost)
        assert found.score == pytest.approx(min(value for share, value in sets if share >= ratio - 1e-12))
        assert found.ratio >= ratio - 1e-12 and found.cost == cost
        assert found.ratio == pytest.approx(sum(getattr(survey[name], cost) for name in found.names) / whole)
        assert found.score == pytest.approx(sum(scores[name] for name in found.names))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cost", ["parameters", "seconds"])
def test_every_solver_meets_the_ratio(solver, cost):
    for seed in range(20):
        survey, scores = made_up(np.random.default_rng(seed), fractions=True)
        most = reachable(survey, cost=cost)
        for ratio in (0.2, 0.5 * most, most):
            found = select(survey, scores, ratio, cost, solver)
            assert found.ratio >= ratio - 1e-9
            assert not any(nested(one, other) for one, other in itertools.combinations(found.names, 2))
            if solver == "knapsack" and cost == "parameters":
                assert found.score <= select(survey, scores, ratio, cost, "greedy").score + 1e-9


def test_ascending_takes_the_lowest_first():
    survey, _ = made_up(np.random.default_rng(0))
    outer = [name for name in survey.names if "." not in name]
    scores = {name: float(index) for index, name in enumerate(reversed(outer))}
    found = select(survey, scores, 1e-6, solver="ascending")
    assert found.names == (outer[-1],)
    sizes = [survey[name].parameters for name in outer]
    two = select(survey, scores, (sizes[-1] + sizes[-2]) / survey.parameters, solver="ascending")
    assert two.names == (outer[-2], outer[-1])
    assert sizes[-2] > sizes[-1], "so the first is put back where the second alone is enough"
    assert select(survey, scores, (sizes[-1] + 1) / survey.parameters, solver="ascending").names == (outer[-2],)


def test_rounded_costs_of_a_real_network():
    """Parameters far beyond the number of bins; what is chosen can be removed and saves what it says."""
    network = tiny_unet()
    survey = survey_network(network, single=True)
    random = np.random.default_rng(0)
    scores = {name: float(random.uniform()) for name in survey.names}
    for cost, ratio in (("parameters", 0.35), ("macs", 0.5), ("parameters", reachable(survey))):
        found = select(survey, scores, ratio, cost)
        with removed(network, found.names):
            left = sum(weight.numel() for weight in network.parameters())
            if cost == "parameters":
                assert 1 - left / survey.parameters == pytest.approx(found.ratio)
        assert ratio - 1e-9 <= found.ratio


def test_scores_that_forbid():
    survey, scores = made_up(np.random.default_rng(1))
    never = survey.names[0]
    assert never not in select(survey, {**scores, never: math.inf}, 0.3).names
    assert never not in select(survey, {name: value for name, value in scores.items() if name != never}, 0.3).names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 1.0}, "from 0 to below 1"),
        ({"ratio": -0.1}, "from 0 to below 1"),
        ({"ratio": math.nan}, "from 0 to below 1"),
        ({"ratio": 0.99}, r"At most 0\.\d+ of the parameters of this Net can be removed .* got a ratio of 0\.99"),
        ({"ratio": 0.99, "cost": "macs"}, r"of the multiply–accumulates of this Net"),
        ({"ratio": 0.3, "cost": "weights"}, "Unknown cost 'weights'"),
        ({"ratio": 0.3, "cost": "seconds"}, "Time was not measured"),
        ({"ratio": 0.3, "solver": "magic"}, "Unknown solver 'magic'"),
    ],
)
def test_what_cannot_be_selected(settings, message):
    survey, scores = made_up(np.random.default_rng(2))
    with pytest.raises(UsageError, match=message):
        select(survey, scores, **settings)
    with pytest.raises(UsageError, match="Unknown removable layer of Net 'x'"):
        select(survey, {**scores, "x": 1.0}, 0.1)
