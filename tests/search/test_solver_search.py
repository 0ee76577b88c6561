"""Solver search from beginning to end: what is returned is what was validated, and it is never worse than what is known."""

import functools
import json
import math
import time
from pathlib import Path

import pytest
import torch
from pipelines import PIPELINES

import diffaccel
from diffaccel.core.errors import NumericalError, UsageError
from diffaccel.core.schedule import EDM, Flow, from_diffusers
from diffaccel.samplers.searched import PlanFile
from diffaccel.search import run as search_run
from diffaccel.search import seeds
from diffaccel.search.dynamic import trajectory_times
from diffaccel.search.objectives import Objective, Trajectory
from diffaccel.search.subjects import PipelineSubject
from diffaccel.solver_search import parse_budget, search_schedule
from diffaccel.testing import spectral_mixture

PROMPTS = [{"prompt": "a cat"}, {"prompt": "two dogs on a hill"}]
TINY = {"strategy": "evolution", "budget": 45, "samples": 8, "validation": 12, "batch_size": 12}
FINE = 24  # steps of the fine trajectory
CASES = {  # name: (nfe, conditions, call)
    "digits": (3, [{"class_labels": label} for label in range(10)], {}),
    "sd": (6, PROMPTS, {"height": 8, "width": 8, "guidance_scale": 2.0}),
    "flux": (
        3,
        [{"prompt_embeds": scale * torch.ones(3, 16), "pooled_prompt_embeds": scale * torch.ones(16)} for scale in (1.0, -1.0)],
        {"height": 8, "width": 8},
    ),
}  # fmt: skip


def pipeline(name: str):
    return diffaccel.load_pipeline("digits") if name == "digits" else PIPELINES[name].build()


@pytest.fixture(scope="module", autouse=True)
def few_seeds():
    """A handful of hand-set schedules, and a coarse dynamic programme: neither is the point here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeds, "RULES", (*seeds.PLANNED, seeds.RULES[4], seeds.RULES[-3]))
        patch.setattr(seeds, "GRIDS", ("trailing", "fast"))
        patch.setattr(seeds, "_POWERS", ())
        patch.setattr(search_run, "trajectory_times", functools.partial(trajectory_times, count=6, nodes=12))
        yield


@functools.cache
def outcome(name: str, folder: Path):
    nfe, conditions, call = CASES[name]
    given = {"conditions": conditions, "call": call, "objective": Trajectory(FINE)}
    return search_schedule(pipeline(name), nfe, output=folder / f"{name}.json", **given, **TINY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


AGAIN = """
import json, sys
import torch
from pipelines import PIPELINES, check_close
import test_solver_search as here
from diffaccel.samplers.searched import PlanFile, SearchedScheduler
from diffaccel.search.objectives import Trajectory
from diffaccel.search.space import GENES
from diffaccel.search.subjects import DenoiserSubject, PipelineSubject

found = {}
for name in here.CASES:
    path, pipe = f"{sys.argv[1]}/{name}.json", here.pipeline(name)
    _, conditions, call = here.CASES[name]
    file = PlanFile.load(path)
    subject = PipelineSubject(pipe, conditions, call, here.TINY["batch_size"])
    seed = file.record["noise_seeds"]["validation"]
    found[name] = Trajectory(here.FINE).score(subject, file, seed, here.TINY["validation"])
    states = subject.draw(file, seed, 2)
    pipe.scheduler = SearchedScheduler.from_file(path, pipe.scheduler.config)
    arguments = {**subject._arguments(file, seed, 0, 2, None)}
    torch.testing.assert_close(torch.as_tensor(pipe(**arguments)[0]).float(), states, rtol=0, atol=0)
print(json.dumps(found))
"""


@pytest.mark.parametrize("name", CASES)
def test_what_is_returned(folder, name):
    found = outcome(name, folder)
    nfe, _, _ = CASES[name]
    calls = nfe // found.subject.evaluations
    assert found.file.plan.nfe == calls == 3 and not found.file.layers
    assert found.file == PlanFile.load(folder / f"{name}.json") and found.best.file.plan == found.file.plan
    assert len(found.history) <= TINY["budget"] and all(origin for origin, _ in found.history)
    # Never worse than a hand-set schedule on the noise that nothing was chosen by.
    compared = [one for one in found.finalists if "validation" in one.scores]
    assert found.best.scores["validation"] == min(one.scores["validation"] for one in compared)
    assert found.best.scores["validation"] <= found.seed.scores["validation"]
    assert found.improved == (found.best.label != found.seed.label)
    record = found.file.record
    assert record["improved"] == found.improved and record["scores"] == found.best.scores
    assert set(record["scores"]) == {"search", "selection", "validation"}
    assert record["seed_schedule"] == {"label": found.seed.label, "scores": found.seed.scores}
    assert record["model"] == found.subject.fingerprint() and record["cost"]["candidates"] == len(found.history)
    assert record["samples"] == {"search": 8, "selection": 12, "validation": 12}
    assert len({*record["noise_seeds"].values()}) == 3


def test_a_fresh_process_gives_the_same_scores(folder, python):
    """In every bit: the file says all that the plan is."""
    expected = {name: outcome(name, folder).best.scores["validation"] for name in CASES}
    tests = Path(__file__).parent
    path = f"import sys; sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}]\n"
    done = python("-c", path + AGAIN, folder)
    assert done.code == 0, done.err
    assert json.loads(done.out.splitlines()[-1]) == expected


class Mean:
    """A user's own objective, with a memory of how often it was asked and a call at which it is interrupted."""

    def __init__(self, stop=math.inf, at=0.3):
        self.count, self.stop, self.at = 0, stop, at

    def __call__(self, samples):
        self.count += 1
        if self.count == self.stop:
            raise KeyboardInterrupt
        return (samples.square().mean() - self.at).abs() + 0.1

    __name__ = "mean"


def mixture(schedule=None):
    return spectral_mixture(schedule or from_diffusers({}), 6, 3)


def searched(objective=None, model=None, nfe=3, **more):
    return search_schedule(model or mixture(), nfe, objective=objective or Mean(), **{**TINY, **more})


def content(found) -> dict:
    """All of a plan file but the time it was made at."""
    content = found.file.to_dict()
    content["record"].pop("versions")
    return content


@pytest.mark.parametrize("schedule", [from_diffusers({}), Flow(), EDM()])
def test_denoisers_with_an_objective_of_ones_own(schedule, tmp_path):
    found = searched(model=mixture(schedule), output=tmp_path / "plan.json")
    assert found.file == PlanFile.load(tmp_path / "plan.json")
    assert found.file.record["objective"] == "mean" and found.file.plan.nfe == 3
    assert found.best.scores["validation"] <= found.seed.scores["validation"]


def test_same_seed_same_plan():
    one, other, third = searched(seed=4), searched(seed=4), searched(seed=5)
    assert content(one) == content(other) and one.history == other.history
    assert one.history != third.history


def test_batches_make_no_difference():
    one, other = searched(), searched(batch_size=5)
    assert [origin for origin, _ in one.history] == [origin for origin, _ in other.history]
    assert [score for _, score in one.history] == pytest.approx([score for _, score in other.history], rel=1e-4)


@pytest.mark.parametrize("stop", [1, 9, 17, 30, 55, 70])
def test_stopped_and_resumed_it_finds_the_same(stop, tmp_path):
    whole, plan = Mean(), tmp_path / "plan.json"
    expected = searched(whole)
    assert stop <= whole.count, "there is no such call"
    with pytest.raises(KeyboardInterrupt):
        searched(Mean(stop), output=plan)
    assert not plan.exists()
    with pytest.raises(UsageError, match="holds another search"):
        searched(output=plan)
    with pytest.raises(UsageError, match="seed was 0 and is 1"):
        searched(output=plan, resume=True, seed=1)
    rest = Mean()
    found = searched(rest, output=plan, resume=True)
    assert {**content(found), "record": {**found.file.record, "versions": 0}} == {
        **content(expected), "record": {**expected.file.record, "versions": 0}
    }  # fmt: skip
    assert found.history == expected.history and PlanFile.load(plan) == found.file
    assert rest.count < whole.count or stop <= 17  # what was written down is not done again


class Planted(Objective):
    """Hand-set schedules are better than all that is searched, by ``gap``; else the earlier the last call."""

    name, unit = "planted", "nothing"

    def __init__(self, gap):
        self.gap = gap

    def score(self, subject, file, seed, count):
        return (
            1.0 + self.gap * (file.plan.name == "searched") - 1e-4 * file.plan.rows[-1].t - 1e-6 * file.plan.rows[1].t
        )


def test_where_nothing_better_is_found_the_seed_is_returned():
    found = searched(Planted(0.5))
    assert not found.improved and found.file.record["improved"] is False
    assert found.best.label == found.seed.label == found.file.record["found_by"]
    assert found.file.plan == found.seed.file.plan and found.file.plan.name != "searched"
    better = searched(Planted(-0.5))
    assert better.improved and better.file.plan.name == "searched"


def test_objectives_that_are_no_numbers(tmp_path):
    for wrong in (math.nan, math.inf):
        with pytest.raises(NumericalError, match="finite score"):
            searched(lambda samples, wrong=wrong: wrong, output=tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())  # the same again would fail again


def test_some_scores_that_are_no_numbers():
    def sometimes(samples):
        value = float(samples.mean())
        return math.nan if int(abs(value) * 1e6) % 3 == 0 else 1.0 + abs(value)

    found = searched(sometimes)
    assert math.isfinite(found.best.scores["validation"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"budget": 0}, "evaluations must be a whole number of at least 1; got 0"),
        ({"budget": "0.001s"}, "too small"),
        ({"budget": "0s"}, "above 0 seconds"),
        ({"budget": "soon"}, "got 'soon'"),
        ({"budget": "1.5"}, "got '1.5'"),
        ({"nfe": 0}, "at least 1"),
        ({"nfe": 2.0}, "at least 1"),
        ({"strategy": "luck"}, "luck"),
        ({"genes": ("colour",)}, "colour"),
        ({"samples": 0}, "samples must be"),
        ({"skip_layers": 1.0}, r"\[0, 1\)"),
        ({"skip_layers": 0.3}, "no network of which layers"),
        ({"resume": True}, "with an output can be resumed"),
        ({"call": {"guidance_scale": 2.0}}, "conditions only"),
        ({"objective": "beauty"}, "beauty"),
    ],
)
def test_refusals(more, words):
    with pytest.raises(UsageError, match=words):
        searched(**{"nfe": 3, **more})


def test_budgets():
    assert parse_budget(7) == parse_budget("7") == (7, None)
    assert parse_budget("90s") == (None, 90.0) and parse_budget("1.5h") == (None, 5400.0)
    assert parse_budget(" 10 m ") == (None, 600.0)
    for wrong in (True, 1.5, "", "-3", "10 d", "1e3", None, "s"):
        with pytest.raises(UsageError):
            parse_budget(wrong)


def test_a_time_is_turned_into_evaluations_once(tmp_path):
    def slow(samples):
        time.sleep(0.03)
        return samples.square().mean()

    found = searched(slow, budget="3s", output=tmp_path / "plan.json")
    entries = [json.loads(line) for line in (tmp_path / "plan.json.log").read_text().splitlines()]
    (count,) = [entry["value"] for entry in entries if entry.get("fact") == "evaluations"]
    assert len(found.history) <= count < 100
    again = searched(slow, budget="3s", output=tmp_path / "plan.json", resume=True)
    assert again.file == found.file


@pytest.mark.parametrize("strategy", ["s3", "evolution", "times"])
def test_strategies(strategy):
    told = []
    found = searched(strategy=strategy, tell=told.append, budget=70)
    assert {origin for origin, _ in found.history} <= {"hand-set", "start", strategy, "evolution", "polish"}
    assert told[0].stage == "seeds" and 0 < told[0].done <= told[0].planned  # hand-set schedules
    explored = [one for one in told if one.stage in (strategy, "polish")]
    done = [one.done for one in explored]
    assert done == sorted(done) and done[-1] == len(found.history) <= 70
    assert math.isfinite(explored[-1].best) and explored[-1].planned == 70
    if strategy == "times":
        assert found.file.record["genes"] == ["times"]


def test_one_call():
    for schedule in (from_diffusers({}), EDM()):
        assert searched(model=mixture(schedule), nfe=1).file.plan.nfe == 1


def test_the_pipeline_is_as_it_was(folder):
    pipe = pipeline("sd")
    scheduler = pipe.scheduler
    with pytest.raises(UsageError, match="needs prompts"):
        search_schedule(pipe, 4, **TINY)
    with pytest.raises(UsageError, match="at least 2, the evaluations of one call"):
        search_schedule(pipe, 1, conditions=PROMPTS, call=CASES["sd"][2], **TINY)
    assert pipe.scheduler is scheduler and isinstance(outcome("sd", folder).subject, PipelineSubject)


def test_the_user_s_own_errors_are_not_bad_scores():
    def broken(states):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        searched(objective=broken)


@pytest.mark.parametrize("conditions", ["a cat", {"prompt": "a cat"}, ["a cat"]])
def test_conditions_are_a_list_of_arguments(conditions):
    with pytest.raises(UsageError, match="Conditions are a list such as"):
        search_schedule(pipeline("sd"), 2, conditions=conditions)


def test_hand_set_schedules_that_fail_on_fresh_noise_are_no_standard():
    """Where others have a finite score, one that has none is not what the winner is compared with."""

    class Fresh(Trajectory):
        def score(self, subject, file, seed, count):
            score = super().score(subject, file, seed, count)
            return math.nan if seed == search_run.fresh_seed(0, 1) and file.decisions in self.failing else score

    objective = Fresh(FINE)
    objective.failing = ()
    first = searched(objective=objective, budget=20)
    objective.failing = (first.seed.file.decisions,)
    second = searched(objective=objective, budget=20)
    assert second.seed.file.decisions != first.seed.file.decisions and math.isfinite(second.seed.scores["selection"])
