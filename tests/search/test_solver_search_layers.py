"""Solver search where layers may be left out, where candidates tie, and where something of a schedule is fixed."""

import math

import pytest
import torch
from test_solver_search import CASES, FINE, TINY, Mean, few_seeds, mixture, pipeline, searched  # noqa: F401

import diffaccel
from diffaccel.samplers.searched import PlanFile
from diffaccel.search import run as search_run
from diffaccel.search import seeds
from diffaccel.search.objectives import Objective, Trajectory
from diffaccel.search.space import GENES
from diffaccel.search.subjects import DenoiserSubject, PipelineSubject
from diffaccel.solver_search import search_schedule


class Skipped(Objective):
    """Leaving something out is what counts."""

    name, unit = "skipped", "nothing"

    def score(self, subject, file, seed, count):
        return 1.0 if file.layers else 2.0


@pytest.mark.parametrize(
    "more", [{"skip_layers": 0.5}, {"skip_scaling": True}, {"skip_layers": 0.5, "skip_scaling": True}]
)
def test_layers_are_searched_and_saved(more, tmp_path):
    """With as many more calls as they pay for; the file does what was validated."""
    pipe, conditions = pipeline("digits"), CASES["digits"][1]
    found = search_schedule(pipe, 3, objective=Skipped(), output=tmp_path / "plan.json", **more, **TINY)
    file = PlanFile.load(tmp_path / "plan.json")
    assert found.improved and file.layers and file == found.file and found.best.file.layers == file.layers
    calls, told = file.plan.nfe, file.record["layers"]
    assert calls == told["calls"] and told["cost_in_whole_calls"] <= 3.0 + 1e-6
    assert calls > 3 if "skip_layers" in more else calls == 3
    assert ("scale" in file.layers) <= ("skip_scaling" in more)
    subject = PipelineSubject(pipe, conditions, {}, 12)
    shares = subject.shares()
    cost = calls - sum(shares[name] for names in file.layers["skip"] for name in names)
    assert cost == pytest.approx(told["cost_in_whole_calls"], rel=1e-9)
    expected = subject.draw(file, 0, 4)
    diffaccel.apply_plan(pipe, tmp_path / "plan.json")
    assert torch.equal(pipe(**subject._arguments(file, 0, 0, 4, None))[0], expected)
    diffaccel.remove_plan(pipe)


def test_layers_with_the_model_s_own_objective():
    found = search_schedule(pipeline("digits"), 3, objective=Trajectory(FINE), skip_layers=0.5, **TINY)
    assert found.best.scores["validation"] <= found.seed.scores["validation"]
    assert bool(found.file.layers) == found.improved == (found.file.plan.nfe > 3)
    assert all(one.file.layers for one in found.finalists if one.file.plan.nfe > 3)


# ---- who wins


class Known(Objective):
    """The hand-set schedules are the best there are, whoever proposes them; the rest is worse."""

    name, unit = "known", "nothing"

    def __init__(self):
        self.ends = [
            seeds._end(file.plan) for _, file in seeds.hand_set(DenoiserSubject(mixture()), 3)
        ]  # fmt: skip

    def score(self, subject, file, seed, count):
        same = [index for index, end in enumerate(self.ends) if seeds._equal(end, seeds._end(file.plan))]
        return 1.0 + 0.01 * same[0] if same else 5.0


class Constant(Objective):
    name, unit = "constant", "nothing"

    def score(self, subject, file, seed, count):
        return 1.0


@pytest.mark.parametrize("objective", [Known, Constant])
def test_a_hand_set_schedule_that_is_proposed_again_is_no_improvement(objective):
    found = searched(objective())
    assert not found.improved and found.best.label == found.seed.label == found.file.record["found_by"]


def test_scores_missing_at_one_stage_do_not_stop_the_file(tmp_path):
    class Unlucky(Objective):
        name, unit = "unlucky", "nothing"

        def score(self, subject, file, seed, count):
            hand = file.plan.name != "searched"
            return (
                math.inf if hand and seed == search_run.fresh_seed(0, 1) else 2.0 - hand - 1e-4 * file.plan.rows[-1].t
            )

    found = searched(Unlucky(), output=tmp_path / "plan.json")
    assert PlanFile.load(tmp_path / "plan.json").plan == found.file.plan


def test_fixed_times_are_those_of_the_starts():
    """Whatever is drawn, mutated, crossed or tuned."""
    seen = []

    class Watching(Mean):
        def score(self, subject, file, seed, count):
            if file.plan.name == "searched":
                seen.append(tuple(round(time, 2) for time in file.decisions.times))
            return float(self(subject.draw(file, seed, count)))

    watching = type("Watching", (Watching, Objective), {"name": "watching", "unit": "nothing"})
    free = tuple(gene for gene in GENES if gene not in ("times", "skip-first", "corrector"))
    found = searched(watching(), genes=free, budget=100)
    starts = sum(origin in ("hand-set", "start") for origin, _ in found.history)
    assert set(seen) == set(seen[:starts]) and len(found.history) == 100
