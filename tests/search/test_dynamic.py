"""Dynamic programming over the teacher's own trajectory: the cheapest path, and times that are better than even ones."""

import itertools
import math

import numpy as np
import pytest
from pipelines import PIPELINES

from diffaccel.core.grids import make_grid
from diffaccel.core.schedule import EDM, Flow, from_diffusers
from diffaccel.samplers.ddim import ddim_plan
from diffaccel.samplers.usf import Decision, SolverSchedule
from diffaccel.search.dynamic import cheapest_path, trajectory_times
from diffaccel.search.objectives import Trajectory
from diffaccel.search.subjects import DenoiserSubject, PipelineSubject
from diffaccel.testing import spectral_mixture

SCHEDULES = {"table": from_diffusers({}), "flow": Flow(), "edm": EDM()}


def cost_of(path, begin, costs, later):
    steps = [*path, len(begin)]
    return begin[path[0]] + sum(later**k * costs[i][j] for k, (i, j) in enumerate(itertools.pairwise(steps)))


@pytest.mark.parametrize("later", [1.0, 1.15, 0.7])
@pytest.mark.parametrize("nodes", [1, 2, 5, 7])
def test_cheapest_path_is_the_cheapest(nodes, later):
    """Against all paths."""
    for seed in range(8):
        random = np.random.default_rng(seed)
        begin = random.exponential(size=nodes).tolist()
        costs = [
            [random.exponential() if j > i else math.inf for j in range(nodes + 1)] for i in range(nodes)
        ]  # fmt: skip
        for calls in range(1, nodes + 1):
            found = cheapest_path(begin, costs, calls, later)
            every = itertools.combinations(range(nodes), calls)
            least = min(cost_of(path, begin, costs, later) for path in every)
            assert len(found) == calls and all(i < j for i, j in itertools.pairwise(found))
            assert cost_of(found, begin, costs, later) == pytest.approx(least, rel=1e-12)


def test_forbidden_steps_are_not_taken():
    forbidden = [[math.inf, 1.0, 9.0, math.inf], [math.inf, math.inf, 1.0, math.inf], [math.inf] * 3 + [1.0]]
    assert cheapest_path([0.0, 0.0, 0.0], forbidden, 2) == [1, 2]
    assert cheapest_path([0.0, 5.0, 5.0], forbidden, 3) == [0, 1, 2]
    assert cheapest_path([0.0, math.inf, math.inf], forbidden, 2) == [0, 2]


@pytest.mark.parametrize("name", SCHEDULES)
def test_times_are_valid_and_as_many_as_asked(name):
    schedule = SCHEDULES[name]
    subject = DenoiserSubject(spectral_mixture(schedule, 16, 4))
    for calls in (1, 2, 5, 24):
        times = trajectory_times(subject, calls, 0, count=16, nodes=24)
        assert len(times) == calls and all(later < earlier for earlier, later in itertools.pairwise(times))
        assert schedule.t_min - 1e-9 <= times[-1] and times[0] <= schedule.t_max + 1e-9
        assert SolverSchedule(times, (Decision(),) * calls).compile(schedule).nfe == calls
    assert trajectory_times(subject, 5, 0, 16, 24) == trajectory_times(subject, 5, 0, 16, 24)


@pytest.mark.parametrize("name", ["table", "flow", "edm"])
@pytest.mark.parametrize("calls", [4, 7])
def test_they_lower_the_error_of_the_first_order(name, calls):
    """Against even times, on noise that they were not made from."""
    schedule = SCHEDULES[name]
    subject, judge = DenoiserSubject(spectral_mixture(schedule)), Trajectory(100)
    even = ddim_plan(make_grid(schedule, calls, "linspace" if name != "edm" else "exponential"))
    times = trajectory_times(subject, calls, 0, later=1.0)
    found = SolverSchedule(times, (Decision(),) * calls).compile(schedule)
    scores = [judge.score(subject, subject.file(plan), 99, 128) for plan in (found, even)]
    assert scores[0] < scores[1]


@pytest.mark.parametrize("name", ["sd", "dit", "flux", "svd"])
def test_pipelines_have_trajectories_too(name):
    """With guidance, where states may be doubled; videos, and latents of any shape."""
    case = PIPELINES[name]
    given = {**case.arguments(3), **(case.guided(2.0, 3) if case.scales else {})}
    rows = {key: value for key, value in given.items() if not isinstance(value, (str, int, float, type(None)))}
    rest = {key: value for key, value in given.items() if key not in rows}
    conditions = [{key: value[index] for key, value in rows.items()} for index in range(3)]
    whole, parts = (PipelineSubject(case.build(), conditions, rest, size) for size in (3, 2))
    times = trajectory_times(whole, 3, 0, count=3, nodes=8)
    assert len(times) == 3 and times == trajectory_times(parts, 3, 0, count=3, nodes=8)
