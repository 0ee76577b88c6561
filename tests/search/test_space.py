"""The space of solver schedules: whatever is drawn, mutated, crossed or tuned is valid and costs what it should."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch

from diffaccel.core.errors import UsageError
from diffaccel.core.schedule import EDM, VE, Flow, VPCosine, VPLinear, from_diffusers
from diffaccel.samplers.sample import sample
from diffaccel.samplers.usf import Decision, SolverSchedule
from diffaccel.search.space import GENES, Axis, SolverSpace

ZERO_SNR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True}
SCHEDULES = {
    "table": from_diffusers({}),
    "zero-snr": from_diffusers(ZERO_SNR),
    "linear": VPLinear(),
    "cosine": VPCosine(),
    "flow": Flow(),
    "edm": EDM(),
    "wide-edm": EDM(0.002, 700.0, 1.0),
    "ve": VE(),
}
CALLS = (1, 2, 3, 5, 10)
KNOBS = ("times", "relaxation", "carry")  # genes with real numbers


def network(x, t, condition):
    """Nonlinear in the state, so that plans that differ end at different places."""
    return torch.sin(3.0 * x + t[:, None] * 1e-2)


def result(candidate, schedule) -> torch.Tensor:
    return sample(network, torch.linspace(-2.0, 2.0, 7, dtype=torch.float64)[:, None], candidate.compile(schedule))


def walk(space, count, seed=0):
    """(what was done, its first parent, the result) of random draws, mutations and crossings of one another."""
    random, found = np.random.default_rng(seed), []
    population = [space.draw(random) for _ in range(6)]
    for index in range(count):
        one, other = (population[int(i)] for i in random.integers(len(population), size=2))
        if index % 4 == 0:
            found.append(("draw", None, space.draw(random)))
        elif index % 4 == 3:
            found.append(("cross", one, space.cross(one, other, random)))
        else:
            found.append(("mutate", one, space.mutate(one, random)))
        population.append(found[-1][-1])
    return found


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("calls", CALLS)
def test_every_candidate_is_valid(name, calls):
    schedule = SCHEDULES[name]
    space, widths = SolverSpace(schedule, calls), set()
    # The least gap between places, or what fits; single precision may take some of it away.
    gap = min(0.004 * space.axis.top, 0.5 * (space.axis.top - space.axis.bottom) / calls)
    for kind, parent, candidate in walk(space, 32, calls):
        assert candidate.nfe == calls
        times, places = np.array(candidate.times), space.axis.of(candidate.times)
        assert np.array_equal(times, times.astype(np.float32))
        assert schedule.t_min <= times[-1] and times[0] <= schedule.t_max
        assert (-np.diff(places) >= min(gap, 0.9 * gap)).all() and (np.diff(times) < 0.0).all()
        # A first-order step from an older node would waste the newest call.
        assert all(step.order > 1 for step in candidate.steps if step.start > 1)
        assert candidate.skip_first is False or name != "flow"
        assert name != "flow" or candidate.times[0] == 1000.0
        plan = candidate.compile(schedule)
        assert plan.nfe == calls and torch.isfinite(result(candidate, schedule)).all()
        tokens, vector = space.tokens(candidate), space.vector(candidate)
        assert tokens.shape[0] == candidate.nfe and np.isfinite(tokens).all() and np.isfinite(vector).all()
        widths.add(tokens.shape[1])
        if kind == "mutate" and (name, calls) != ("flow", 1):  # of one call from pure noise, there is one only
            assert candidate != parent
    assert len(widths) == 1


@pytest.mark.parametrize("name", ["table", "flow", "edm"])
def test_keys_are_equal_when_schedules_are(name):
    space = SolverSpace(SCHEDULES[name], 3)
    candidates = [one for _, _, one in walk(space, 120)]
    for one in candidates:
        copy = SolverSchedule.from_dict(json.loads(json.dumps(one.to_dict())))
        assert copy == one and space.key(copy) == space.key(one)
    for one, other in itertools.pairwise(candidates):
        assert (one == other) == (space.key(one) == space.key(other))


def test_decisions_without_effect_are_written_in_one_way():
    """Pairs that compile to one plan have one key."""
    space, places = SolverSpace(SCHEDULES["table"], 3), np.array([0.9, 0.5, 0.2])
    same = [
        ([Decision(), Decision(), Decision()], [Decision(3, "data", "angle"), Decision(), Decision()]),
        ([Decision(carry=0.3)] * 3, [Decision(), Decision(carry=0.3), Decision(carry=0.3)]),
        ([Decision(), Decision(1, "data"), Decision()], [Decision(), Decision(), Decision()]),
        ([Decision(relaxation="scale", strength=0.5)] * 3, [Decision()] * 3),
        ([Decision(2, relaxation="scale", strength=1.0)] * 3, [Decision(2)] * 3),
        ([Decision(2, relaxation="bh2", strength=2.0)] * 3, [Decision(2, relaxation="bh2")] * 3),
        ([Decision(3, "data", "t", points=(2, 2))] * 3, [Decision(3, "data", "t")] * 3),
        ([Decision(3, "data", "t", points=(3, 3))] * 3, [Decision(3, "data", "t")] * 3),
        ([Decision(2, "data", "t", start=3)] * 2 + [Decision()], [Decision(2, "data", "t")] * 2 + [Decision()]),
        ([Decision(2, "data", "t", corrector="pseudo")] * 3, [Decision(2, "data", "t", corrector="pseudo")] * 2 + [Decision(2, "data", "t")]),
        ([Decision()] * 2 + [Decision(2, "data", "log-rho")], [Decision()] * 3),  # log ρ is infinite at the clean end
        ([Decision(1, variable="t", carry=0.2)] * 3, [Decision(1, variable="angle", carry=0.2)] * 3),
        ([Decision(2, "noise", "step", relaxation="bh2")] * 3, [Decision(2, "noise", "step")] * 3),
    ]  # fmt: skip
    for one, other in same:
        one, other = (space.settled(places, steps) for steps in (one, other))
        assert float((result(one, space.schedule) - result(other, space.schedule)).abs().max()) < 1e-12
        assert space.key(one) == space.key(other)


@pytest.mark.parametrize("name", ["table", "flow", "edm"])
@pytest.mark.parametrize("fixed", GENES)
def test_fixed_genes_stay(name, fixed):
    """Where steps stay as many: nodes that are added do as their neighbours."""
    schedule, moves_nodes = SCHEDULES[name], {"skip-first", "corrector"} - {fixed}
    rule = Decision(3, "data", "t", relaxation="scale", strength=0.8, carry=0.2, corrector="pseudo")
    space = SolverSpace(schedule, 4, tuple(gene for gene in GENES if gene != fixed and gene not in moves_nodes))
    start = space.settled(np.array([1.0, 0.7, 0.4, 0.1]) * space.axis.top, [rule] * 4)
    random, mutants = np.random.default_rng(1), [start]
    for _ in range(80):
        mutant = space.mutate(mutants[int(random.integers(len(mutants)))], random)
        assert len(mutant.steps) == 4
        if fixed == "times":
            assert mutant.times == pytest.approx(start.times, rel=1e-6)
        for before, after in zip(start.steps[1:], mutant.steps[1:], strict=True):
            if fixed in ("core", "variable", "order", "corrector", "points", "start") and after.order > 1:
                assert getattr(after, fixed) == getattr(before, fixed)
            if fixed == "relaxation" and before.order > 1 and after.order > 1:
                assert after.relaxation in ("none", "scale")
                assert after.strength in (1.0, 0.8)
            if fixed == "carry" and after.start == 1 and after.order > 1:
                assert after.carry in (0.0, 0.2)
        if fixed in ("end", "skip-first"):
            assert mutant.end == 0.0 if fixed == "end" else mutant.skip_first is False
        mutants.append(mutant)


def test_searches_of_times_alone_keep_the_rule():
    space, random = SolverSpace(SCHEDULES["table"], 5, ("times",)), np.random.default_rng(0)
    start = space.settled(np.linspace(1.0, 0.2, 5), [Decision(2, "velocity", "angle", corrector="pseudo")] * 5)
    for _ in range(100):
        mutant = space.mutate(start, random)
        assert mutant.steps == start.steps and mutant.times != start.times
        assert len(space.vector(mutant)) == 5


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("calls", CALLS)
def test_round_trips_are_exact(name, calls):
    """Where times are at their least gap, too, or rounded."""
    space = SolverSpace(SCHEDULES[name], calls)
    for _, _, candidate in walk(space, 40, 7):
        assert space.with_vector(candidate, space.vector(candidate)) == candidate == space.nearest(candidate)


@pytest.mark.parametrize("name", ["table", "flow", "edm"])
def test_any_numbers_are_moved_to_what_is_allowed(name):
    space, random = SolverSpace(SCHEDULES[name], 5), np.random.default_rng(3)
    for _, _, candidate in walk(space, 40):
        vector = space.vector(candidate)
        for wild in (vector + 3.0 * random.standard_normal(len(vector)), 0.0 * vector, 1e6 + vector, -1e6 - vector):
            moved = space.with_vector(candidate, wild)
            assert moved.nfe == 5 and torch.isfinite(result(moved, space.schedule)).all()
            assert space.vector(moved).shape == vector.shape


def test_a_number_moves_what_it_stands_for_and_nothing_else():
    space = SolverSpace(SCHEDULES["table"], 3)
    start = space.settled(
        np.array([0.9, 0.5, 0.2]), [Decision(2, "data", "angle", relaxation="scale", strength=0.9, carry=0.1)] * 3
    )
    vector = space.vector(start)
    for index in range(len(vector)):
        moved = space.with_vector(start, vector + 0.01 * np.eye(len(vector))[index])
        change = space.vector(moved) - vector
        assert change[index] == pytest.approx(0.01, rel=1e-3)
        assert np.abs(np.delete(change, index)).max() < 1e-6
    # Places are in units of the mean gap.
    assert vector[:3] == pytest.approx(np.array([0.9, 0.5, 0.2]) * 3 / space.axis.top, rel=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_places_and_times_are_inverse(name):
    schedule = SCHEDULES[name]
    axis = Axis(schedule)
    assert math.isfinite(axis.top) and 0.0 <= axis.bottom < axis.top
    places = np.linspace(axis.top, axis.bottom, 50)
    times = np.array(axis.times(places))
    assert (np.diff(times) < 0.0).all()
    assert axis.of(times) == pytest.approx(places, abs=1e-6 * axis.top)
    native = torch.linspace(schedule.t_max, schedule.t_min, 50, dtype=torch.float64)
    again = torch.tensor(axis.times(axis.of(native.tolist())), dtype=torch.float64)
    assert float((again - native).abs().max()) <= 1e-6 * (schedule.t_max - schedule.t_min)


def test_the_axis_of_the_linear_schedule_is_its_fast_grid():
    from diffaccel.core.grids import make_grid

    places = Axis(VPLinear()).of(make_grid(VPLinear(), 8, "fast").times[:-1])
    assert np.diff(places) == pytest.approx(np.full(7, places[1] - places[0]), rel=1e-3)


@pytest.mark.parametrize("calls", [2, 3, 6])
def test_other_numbers_of_calls_are_settled(calls):
    """Nodes are added in the widest gap or taken away until the calls are as many as asked."""
    space = SolverSpace(SCHEDULES["table"], calls)
    for nodes in (1, 2, 4, 9):
        for corrector in ("none", "implicit"):
            given = [Decision(2, corrector=corrector)] * nodes
            found = space.settled(np.linspace(0.9, 0.1, nodes), given, skip_first=True)
            assert found.nfe == calls and found.compile(space.schedule).nfe == calls
    start = space.settled(np.linspace(0.9, 0.1, calls), [Decision()] * calls)
    skipping = space.skipping(start, True)
    assert skipping.skip_first and skipping.nfe == calls and len(skipping.times) == calls + 1
    assert space.skipping(skipping, False).nfe == calls
    assert not SolverSpace(SCHEDULES["table"], calls, ("times",)).skipping(start, True).skip_first


def test_times_asked_for_that_collide_are_kept_apart():
    for schedule in SCHEDULES.values():
        space = SolverSpace(schedule, 6)
        for places in (np.full(6, 0.3), np.zeros(6), np.full(6, 9.0), np.linspace(0.5, 0.5001, 6)):
            found = space.settled(places, [Decision(4, "data", "rho")] * 6)
            assert found.nfe == 6 and torch.isfinite(result(found, schedule)).all()


def test_same_randomness_same_candidates():
    space = SolverSpace(SCHEDULES["table"], 4)
    one, other = (walk(space, 60, seed=5) for _ in range(2))
    assert one == other and one != walk(space, 60, seed=6)


def test_crossings_have_something_of_both():
    space, random = SolverSpace(SCHEDULES["table"], 4), np.random.default_rng(0)
    one = space.settled(np.linspace(0.95, 0.3, 4), [Decision(2, "data", "t")] * 4)
    other = space.settled(np.linspace(0.8, 0.1, 4), [Decision(3, "velocity", "angle")] * 4)
    for _ in range(50):
        child = space.cross(one, other, random)
        for index in range(4):
            low, high = sorted((one.times[index], other.times[index]))
            assert low - 1e-3 <= child.times[index] <= high + 1e-3
            assert child.steps[index] in (one.steps[index], other.steps[index])


def test_what_a_search_may_not_be():
    with pytest.raises(UsageError, match="at least one network call; got 0"):
        SolverSpace(VPLinear(), 0)
    with pytest.raises(UsageError, match="colour"):
        SolverSpace(VPLinear(), 3, ("colour",))


@pytest.mark.parametrize(("schedule", "genes"), [(VPLinear(), ()), (Flow(), ("end", "skip-first"))])
def test_nothing_to_search(schedule, genes):
    with pytest.raises(UsageError):
        SolverSpace(schedule, 3, genes)


def test_closed_genes_stay_in_crossings():
    space, random = SolverSpace(SCHEDULES["table"], 4, ("order",)), np.random.default_rng(0)
    one = space.settled(np.linspace(0.95, 0.3, 4), [Decision(2, "data", "t")] * 4)
    other = space.settled(np.linspace(0.8, 0.1, 4), [Decision(3, "velocity", "angle")] * 4)
    for _ in range(50):
        child = space.cross(one, other, random)
        assert child.times in (one.times, other.times)
        assert {step.core for step in child.steps[1:]} in ({"data"}, {"velocity"})


def test_ends_stay_below_the_last_call():
    space, random = SolverSpace(SCHEDULES["table"], 2, ("times", "end")), np.random.default_rng(0)
    candidate = space.draw(random)
    ends = set()
    for _ in range(200):
        candidate = space.mutate(candidate, random)
        ends.add(candidate.end)
        assert candidate.end < float(space.schedule.rho(candidate.times[-1]))
    assert 0.0 in ends and len(ends) > 5
    assert dataclasses.replace(candidate, end=0.0).compile(space.schedule).nfe == 2
