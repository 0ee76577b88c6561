"""`diffaccel search` refused or interrupted: one sentence each, and nothing lost or left behind."""

import os
import signal

import pytest

import diffaccel
from diffaccel.core.errors import UsageError
from diffaccel.core.grids import make_grid
from diffaccel.core.schedule import from_diffusers
from diffaccel.samplers.deis import deis_plan
from diffaccel.samplers.searched import PlanFile, model_config
from diffaccel.search.journal import Journal
from diffaccel.search.run import SolverSearch

SEARCH = ("search", "--model", "digits", "--nfe", 2, "--budget", 6, "--samples", 8)
TO = (*SEARCH, "-o", "plan.json")


def replaced(option: str, value) -> tuple:
    """The search with another value of one of its options."""
    index = TO.index(option)
    return (*TO[: index + 1], value, *TO[index + 2 :])


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("'trajectory'?", (*TO, "--objective", "trajectoy")),
        ("'evolution'?", (*TO, "--strategy", "evolutoin")),
        ("'corrector'?", (*TO, "--fix", "core,corector")),
        ("leaves nothing", (*TO, "--fix", "times,order,core,variable,start,points,relaxation,carry,corrector,skip-first,end")),
        ("times alone", (*TO, "--strategy", "times", "--fix", "core")),
        ("such as 90s, 10m or 2h", replaced("--budget", "abc")),
        ("at least 1", replaced("--budget", 0)),
        ("above 0", replaced("--budget", "0s")),
        ("at least 1", replaced("--nfe", 0)),
        ("at least 2", (*replaced("--nfe", 1), "--guidance-scale", 3)),
        ("or equal to 1", replaced("--samples", 0)),
        ("[0, 1)", (*TO, "--skip-layers", 1)),
        ("'digits'?", (*replaced("--model", "digit")[:-1], "new/plan.json")),
        ("not a device", (*TO, "--device", "abacus")),
        ("cannot pass 'num_steps'", (*TO, "--set", "num_steps=3")),
        ("NAME=VALUE", (*TO, "--set", "eta")),
        ("once", (*TO, "--guidance-scale", 2, "--set", "guidance_scale=3")),
        ("--prompts FILE", (*TO, "--negative-prompt", "blurry")),
        ("plan.json", (*SEARCH, "-o", "plan.png")),
        ("no search to resume", (*TO, "--resume")),
        ("-o", SEARCH),
    ],
)  # fmt: skip
def test_refusals(refuse, words, arguments, tmp_path):
    refuse(2, words, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "data"),
    [("no prompt", b" \n\n"), ("not text", b"\x89PNG\r\n\xff"), ("not text", b"a\0b"), ("No such", None)],
)
def test_prompts_that_are_none(refuse, tmp_path, words, data):
    if data is not None:
        (tmp_path / "prompts.txt").write_bytes(data)
    refuse(3, ["prompts", words], *TO, "--prompts", "prompts.txt")


def test_prompts_for_a_model_of_classes(refuse, tmp_path):
    (tmp_path / "prompts.txt").write_text("a three\n")
    refuse(2, "prompt", *TO, "--prompts", "prompts.txt")


def test_a_reference_that_is_missing(refuse, teacher_copy):
    refuse(2, "give a reference", *replaced("--model", teacher_copy), "--objective", "fd")
    refuse(3, "no/where", *TO, "--objective", "fd", "--reference", "no/where")


@pytest.mark.parametrize("name", ["plan.json", "plan.png", "plan.html", "plan.json.log"])
def test_what_exists_stays_as_it_is(refuse, tmp_path, name):
    (tmp_path / name).write_text("mine")
    refuse(2, [name, "--resume"], *TO)
    assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_made(refuse, tmp_path):
    (tmp_path / "file").write_text("")
    refuse(2, "Cannot write", *SEARCH, "-o", "file/plan.json")


@pytest.mark.parametrize("text", ["", "{}\n", "not JSON\n", '{"settings": {}}\n[]\n', "\0\n"])
def test_a_damaged_log(refuse, tmp_path, text):
    (tmp_path / "plan.json.log").write_text(text)
    refuse(3, "not the journal", *TO, "--resume")
    assert (tmp_path / "plan.json.log").read_text() == text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_says_how_to_go_on(refuse, cli, monkeypatch, tmp_path, number):
    add = Journal.add

    def interrupted(self, key, score):
        add(self, key, score)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(Journal, "add", interrupted)
    done = cli(*SEARCH, "-o", tmp_path / "plan.json", "--quiet")
    assert done.code == 128 + number and done.out == ""
    assert done.err.count("\n") == 1 and "plan.json.log" in done.err and "--resume" in done.err
    assert len((tmp_path / "plan.json.log").read_text().splitlines()) == 2  # settings and one score

    refuse(2, ["holds another search", "--resume"], *TO)
    other = ("--seed", 1, "--guidance-scale", 3, "--nfe", 4)
    differences = ["seed was 0 and is 1", "samples was 8 and is 16", "'guidance_scale': 3.0"]
    refuse(2, differences, *replaced("--samples", 16), *other, "--resume")


def test_interrupted_before_it_began(cli, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffaccel.solver_search._subject", interrupted)
    done = cli(*SEARCH, "-o", tmp_path / "plan.json")
    assert (done.code, done.err) == (130, "Error: Interrupted.\n")


def test_a_search_that_cannot_succeed_leaves_no_log(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(SolverSearch, "_score", lambda *_: float("nan"))
    done = cli(*SEARCH, "-o", tmp_path / "plan.json", "--quiet")
    assert done.code == 5 and "finite score" in done.err and done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_time_too_short_for_one_evaluation(refuse, monkeypatch, tmp_path):
    monkeypatch.setattr(SolverSearch, "_score", lambda *_: 1.0)
    done = refuse(2, "too small", *replaced("--budget", "0.1s"), "--quiet")
    assert "more time" in done.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [("--steps", 3), ("--nfe", 3), ("--sampler", "ddim")])
def test_a_plan_beside_steps_or_a_sampler(refuse, more):
    refuse(2, more[0], "sample", "digits", "--plan", "plan.json", "--grid", "x.png", *more)


@pytest.mark.parametrize("content", [None, "", "[]", '{"format": "diffaccel solver schedule", "version": 1}'])
def test_a_plan_that_is_none(refuse, tmp_path, content):
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    refuse(3, "plan", "sample", "digits", "--plan", "plan.json", "--grid", "x.png")


@pytest.fixture
def save_plan(tmp_path):
    """`save_plan(config)`: plan.json with three network calls, for the model of that scheduler configuration."""

    def save_plan(config) -> None:
        plan = deis_plan(make_grid(from_diffusers(config), 3, "quadratic"), 1)
        PlanFile(plan, None, model_config(config)).save(tmp_path / "plan.json")

    return save_plan


def test_a_plan_of_another_model(refuse, save_plan):
    save_plan({"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"})
    refuse(2, "another noise schedule", "sample", "digits", "--plan", "plan.json", "--grid", "x.png")


def test_a_plan_called_with_another_number_of_steps(save_plan, tmp_path):
    pipe = diffaccel.load_pipeline("digits")
    save_plan(pipe.scheduler.config)
    pipe.scheduler = diffaccel.SearchedScheduler.from_file(tmp_path / "plan.json", pipe.scheduler.config)
    with pytest.raises(UsageError, match="num_inference_steps=3 instead of 4"):
        pipe(class_labels=[3], num_inference_steps=4)
