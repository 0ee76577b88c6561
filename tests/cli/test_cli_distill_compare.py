"""`diffaccel distill compare`: table and files, what fails beside what does not, going on, and what is refused."""

import json

import pytest
import torch

from diffaccel.core.errors import InterruptedRun
from diffaccel.distill.budget import Pace

COMPARE = ("distill", "compare", "--teacher", "digits", "--num", 100, "--set", "trainer.batch_size=4", "--quiet")
BAD = "dmd:trainer.optimizers.student.lr=1e30"


@pytest.fixture(scope="module")
def compared(cli, tmp_path_factory):
    """A folder with a method that works and one that does not, and what was printed."""
    folder = tmp_path_factory.mktemp("compare") / "new"
    return folder, cli(*COMPARE, "--steps", 3, "--methods", f"{BAD},dmd", "-o", folder)


def test_a_method_that_fails_is_a_row_and_does_not_stop_the_others(compared):
    folder, done = compared
    assert done.code == 5 and done.err.count("\n") == 1 and f"{BAD}, seed 0, failed: " in done.err
    report = json.loads((folder / "report.json").read_text())
    assert [row["label"] for row in report["rows"]] == ["teacher, 50 steps", "teacher, 1 step", BAD, "dmd"]
    assert [len(row["runs"]) for row in report["rows"]] == [1, 1, 0, 1]
    (failure,) = report["failures"]
    assert failure["exit_code"] == 5 and "nan" in failure["text"] and failure["text"] in done.out


def test_every_number_is_there(compared):
    folder, done = compared
    many, one, _, row = json.loads((folder / "report.json").read_text())["rows"]
    (run,) = row["runs"]
    fds = [found["runs"][0]["fd"] for found in (many, one)]
    assert run["gain"] == pytest.approx((fds[1] - run["fd"]) / (fds[1] - fds[0]))
    assert (run["nfe"], many["runs"][0]["nfe"], run["steps"], run["data"]) == (1, 50, 3, None)
    assert all(0.0 <= run[name] <= 1.0 for name in ("precision", "recall", "accuracy"))
    assert run["ci95"][0] < run["ci95"][1] and run["cpu_seconds"] > 0 and run["wall_seconds"] > 0
    (line,) = [line for line in done.out.splitlines() if line.startswith("dmd ")]
    assert f"{run['fd']:.3f}" in line and f"{run['gain']:.3f}" in line
    assert "method" in done.out.splitlines()[0] and f"Report: {folder / 'report.html'}" in done.out


def test_runs_are_ordinary_ones_with_pages(compared):
    folder, _ = compared
    assert (folder / "dmd-seed-0" / "final" / "model_index.json").is_file()
    text = (folder / "report.html").read_text()
    assert text.count("<svg") == 2 and "dmd-seed-0/report.html" in text and "<script" not in text
    for name in ("dmd-seed-0", "dmd-trainer.optimizers.student.lr-1e30-seed-0"):  # the failed one, too
        assert "Healthy:" in (folder / name / "report.html").read_text()


def test_the_same_command_goes_on_and_methods_may_be_others(run, compared, monkeypatch):
    folder, _ = compared
    before = json.loads((folder / "report.json").read_text())["rows"]
    with monkeypatch.context() as patch:
        for name in ("run_distillation", "report_student"):  # nothing is trained again
            patch.setattr(f"diffaccel.distill_comparison.{name}", None)
        done = run(*COMPARE, "--steps", 3, "--methods", "dmd", "-o", folder, "--json")
    rows = json.loads(done.out)["rows"]
    assert rows == [before[0], before[1], before[3]]


def test_other_settings_are_refused_by_name(cli, compared):
    refused = cli(*COMPARE, "--steps", 4, "--methods", "dmd", "-o", compared[0])
    assert refused.code == 2 and "steps: 3 -> 4" in refused.err


class _Judge:
    """Measures nothing."""

    def __init__(self, reference, num, prompts, device):
        self.reference, self.num = reference, num

    def __call__(self, model, **drawing):
        facts = {"fd": 9.0 - drawing.get("steps", 2) / 10, "ci95": None, "metric": "FD-x", "nfe": 1, "warnings": []}
        return facts | dict.fromkeys(("precision", "recall", "accuracy")), torch.zeros(1, 4, 4, dtype=torch.uint8)


def test_budget_gives_steps_that_are_kept(run, tmp_path, monkeypatch):
    told = []

    def probe(config):
        told.append(config.method["name"])
        return Pace(0.5, {}, 0.5)

    monkeypatch.setattr("diffaccel.distill_comparison.measure_pace", probe)
    monkeypatch.setattr("diffaccel.distill_comparison.Judge", _Judge)
    monkeypatch.setattr("diffaccel.distill_comparison.report_student", lambda *_: None)
    command = (*COMPARE, "--budget", "1.5s", "--methods", "dmd", "-o", tmp_path / "out", "--json")
    first, again = (json.loads(run(*command).out) for _ in range(2))
    assert first["rows"] == again["rows"] and first["rows"][2]["runs"][0]["steps"] == 2 and told == ["dmd"]
    assert json.loads((tmp_path / "out/comparison.json").read_text())["paces"]["dmd"]["step"] == 0.5


def test_interrupted(cli, compared, monkeypatch):
    def stop(*_, **__):
        raise InterruptedRun("Stopped and saved.", 15)

    monkeypatch.setattr("diffaccel.distill_comparison.run_distillation", stop)
    done = cli(*COMPARE, "--steps", 3, "--methods", "dmd", "--seeds", "0,8", "-o", compared[0])
    assert done.code == 143 and "dmd-seed-8" in done.err and "the same command goes on" in done.err


@pytest.mark.parametrize(
    ("words", "more"),
    [
        ("'dmd'", ("--methods", "dmdd")),
        ("dmd:divergence=js: Unknown setting", ("--methods", "dmd:divergence=js")),
        ("told apart", ("--methods", "dmd,dmd")),
        ("not both", ("--methods", "dmd", "--steps", 2, "--budget", "9s")),
        ("such as 90s", ("--methods", "dmd", "--budget", "90")),
        ("--seeds takes", ("--methods", "dmd", "--seeds", "one")),
        ("at least one of seeds", ("--methods", "dmd", "--seeds", ",")),
        ("rests for the first 50 steps", ("--methods", "f-distill", "--steps", 2)),
    ],
)
def test_bad_input(refuse, words, more, tmp_path):
    refuse(2, words, *COMPARE, "-o", "out", *more)
    assert not (tmp_path / "out").exists()


def test_teachers_and_folders_that_cannot_be(refuse, teacher_copy, tmp_path):
    refuse(2, "give a reference", "distill", "compare", "--teacher", teacher_copy, "--methods", "dmd", "-o", "out")
    refuse(4, "weights", "distill", "compare", "--teacher", "sd15", "--methods", "dmd", "-o", "out")
    refuse(2, "is not empty", *COMPARE, "--methods", "dmd", "-o", teacher_copy)


def test_options_belong_after_the_word(refuse):
    refuse(2, "after the word compare", "distill", "--teacher", "digits", "compare", "--methods", "dmd")


def test_help_has_examples(cli):
    text = cli("distill", "compare", "--help").out.replace("`", "")
    assert "diffaccel distill compare --teacher digits" in text and "compare" in cli("distill", "--help").out
