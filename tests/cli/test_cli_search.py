"""`diffaccel search`: one small search, what it writes, and what its plan does in the other commands."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

import diffaccel
from diffaccel.cli.search import _Shown
from diffaccel.core.imagefiles import read_images
from diffaccel.samplers.searched import PlanFile
from diffaccel.search.outcome import Progress
from diffaccel.search.settings import STRATEGIES
from diffaccel.search.space import GENES

SEARCH = ("search", "--model", "digits", "--nfe", 2, "--budget", 6, "--samples", 8)


@pytest.fixture(scope="module")
def found(run, tmp_path_factory):
    """(plan, what was printed) of one finished search; read them, do not change them."""
    path = tmp_path_factory.mktemp("search") / "new" / "plan.json"
    return path, run(*SEARCH, "-o", path)


def decided(path) -> dict:
    """A plan without what may differ between equal searches."""
    content = json.loads(path.read_text())
    del content["record"]["versions"]
    return content


def test_what_is_written_and_said(found):
    path, done = found
    file = PlanFile.load(path)
    names = {"plan.json", "plan.json.log", "plan.png", "plan.html"}
    assert {one.name for one in path.parent.iterdir()} == names
    assert file.plan.nfe == 2 and file.record["cost"]["candidates"] == 6
    lines = done.out.splitlines()
    assert [line.split(":")[0] for line in lines[2:4] if line] in (["hand-set"], ["hand-set", "searched"])
    assert f"{file.record['seed_schedule']['scores']['validation']:.4g}" in lines[2]
    assert "6 candidates" in done.out and ("was not beaten" in done.out) != file.record["improved"]
    assert 'from_file("' in done.err and "num_inference_steps=2" in done.err and "--plan" in done.err
    assert done.err.index("seeds") < done.err.index("selection") < done.err.index("validation")


def test_the_log_gives_the_same_plan_again(run, found, tmp_path):
    for name in ("plan.json.log", "plan.json"):
        (tmp_path / name).write_bytes((found[0].parent / name).read_bytes())
    done = run(*SEARCH, "-o", tmp_path / "plan.json", "--resume", "--json", "--quiet")
    assert decided(tmp_path / "plan.json") == decided(found[0]) and done.err == ""
    told = json.loads(done.out)
    assert told["calls"] == 2 and told["evaluations_per_call"] == 1 and told["scores"]["validation"] > 0.0
    assert (tmp_path / "plan.json.log").read_bytes() == (found[0].parent / "plan.json.log").read_bytes()


@pytest.mark.slow
def test_killed_and_resumed_it_finds_the_same(run, found, tmp_path):
    path = tmp_path / "plan.json"
    command = [*map(str, SEARCH), "-o", str(path), "--quiet"]
    log = path.with_name("plan.json.log")
    whole = found[0].with_name("plan.json.log").read_bytes().count(b"\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "diffaccel", *command], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        for _ in range(6000):
            if log.exists() and log.read_bytes().count(b"\n") > whole // 3:
                break
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert log.read_bytes().count(b"\n") < whole and not path.exists()
    run(*command, "--resume")
    assert decided(path) == decided(found[0])


@pytest.mark.slow
def test_two_processes_find_the_same(found, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [*launcher, "-m", "diffaccel", *map(str, SEARCH), "--device", "cpu", "-o", tmp_path / "plan.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert decided(tmp_path / "plan.json") == decided(found[0])
    assert done.stdout.count("hand-set:") == 1 and done.stderr.count("Next, in Python") == 1


def test_sample_draws_what_the_scheduler_does(run, found, tmp_path):
    path, out = found[0], tmp_path / "out"
    done = run("sample", "digits", "--plan", path, "--num", 4, "--seed", 3, "-o", out, "--json")
    said, written = json.loads(done.out), json.loads((out / "dataset.json").read_text())["settings"]
    assert (said["steps"], said["nfe"]) == (2, 2) and written["sampler"] == str(path)
    pipe = diffaccel.load_pipeline("digits")
    pipe.scheduler = diffaccel.SearchedScheduler.from_file(path, pipe.scheduler.config)
    images = torch.cat([images for images, _ in diffaccel.generate(pipe, 4, steps=2, seed=3)])
    assert torch.equal(read_images(sorted(out.glob("*.png"))), images)


def test_sample_takes_the_guidance_scale_of_the_plan(run, found, tmp_path):
    content = json.loads(found[0].read_text())
    for scale, more, nfe in ((3.0, (), 4), (3.0, ("--guidance-scale", 1), 2), ("high", (), 2)):
        content["record"]["asked"]["call"] = {"guidance_scale": scale}
        (tmp_path / "plan.json").write_text(json.dumps(content))
        done = run(
            "sample", "digits", "--plan", tmp_path / "plan.json", "-n", 2, "--grid", tmp_path / "x.png", *more, "--json"
        )
        assert json.loads(done.out)["nfe"] == nfe


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("objectives", {"trajectory", "fd-teacher", "fd", "kd"}),
        ("strategies", set(STRATEGIES)),
        ("decisions", set(GENES)),
    ],
)
def test_lists(run, kind, names):
    rows = json.loads(run("list", kind, "--json").out)
    assert {row["name"] for row in rows} == names and all(row["what"] for row in rows)


def test_help_has_examples(cli):
    text = cli("search", "--help").out.replace("`", "")
    assert "diffaccel search --model digits" in text and "torchrun" in text and "--resume" in text


def test_progress_is_told_by_stages_without_a_terminal(capsys):
    stages = [("seeds", 0, 0), ("seeds", 0, 0), ("s3", 3, 10), ("s3", 4, 10), ("polish", 9, 10)]
    with _Shown(True) as shown:
        for stage, done, planned in stages:
            shown(Progress(stage, done, planned, 0.25 if done else float("inf"), {"kendall_tau": 0.5}, 61.0))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["seeds", "s3", "polish"]
    assert "3 of 10" in lines[1] and "best 0.25" in lines[1] and "0.50" in lines[1] and "1:01 left" in lines[1]


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with _Shown(True) as shown:
        for done in range(0, 11, 5):
            shown(Progress("s3", done, 10, 0.25, {}, 3661.0))
    text = capsys.readouterr().err
    assert "\n" not in text.strip() and "10/10 schedules" in text and "1:01:01 left" in text and "best 0.25" in text
