"""`diffaccel distill`: the run folder, where settings come from, what is printed where."""

import json
import re

import pytest
import yaml

from diffaccel.core.files import verify_manifest


def settings(run, *arguments) -> dict:
    """What a dry run would train with."""
    return yaml.safe_load(run("distill", *arguments, "--dry-run").out)


def test_run_folder(tiny_run):
    names = {path.name for path in tiny_run.iterdir()}
    reports = {"report.json", "report.html"}
    assert names == {"config.yaml", "run.json", "metrics.jsonl", "samples", "checkpoints", "final"} | reports
    assert [path.name for path in sorted((tiny_run / "samples").iterdir())] == ["step-000000.png", "step-000006.png"]
    kept = sorted((tiny_run / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-00000004", "step-00000006"]
    assert all(verify_manifest(folder) == [] for folder in [*kept, tiny_run / "final"])


def test_run_record_and_metrics(tiny_run):
    (record,) = json.loads((tiny_run / "run.json").read_text())["starts"]
    assert record["command"][:2] == ["diffaccel", "distill"] and {"torch", "diffusers"} <= set(record["versions"])
    lines = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "student/loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "validation/FD-digits64" in line] == [0, 6]
    assert json.loads((tiny_run / "report.json").read_text())["results"][0]["metric"] == "FD-digits64"


def test_config_of_a_run_repeats_it(run, tiny_run):
    stored = yaml.safe_load((tiny_run / "config.yaml").read_text())
    assert settings(run, "--config", tiny_run / "config.yaml") == stored


def test_dry_run_is_a_config_and_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("distill", "--teacher", "digits", "--dry-run")
    assert list(tmp_path.iterdir()) == [] and done.err == ""
    told = dict(re.findall(r"^#   (student|critic) +([\d,]+) ", done.out, re.MULTILINE))
    assert told == {"student": "177,553", "critic": "177,553"}
    (tmp_path / "plan.yaml").write_text(done.out)
    assert settings(run, "--config", "plan.yaml") == yaml.safe_load(done.out)


def test_flag_over_set_over_config_over_recipe(run, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("teacher: digits\nmethod: {name: dmd}\ntrainer: {seed: 1, steps: 11, ema: 0.5}\n")
    trainer = settings(
        run, "--config", file, "--set", "trainer.seed=2", "--set", "trainer.steps=12", "--seed", 3
    )["trainer"]  # fmt: skip
    recipe = settings(run, "--teacher", "digits", "--method", "dmd")["trainer"]
    assert (trainer["seed"], trainer["steps"], trainer["ema"]) == (3, 12, 0.5)
    assert trainer["optimizers"] == recipe["optimizers"] and trainer["log_every"] == recipe["log_every"]


def test_divergence_alone_means_f_distill(run):
    method = settings(run, "--teacher", "digits", "--divergence", "forward-kl")["method"]
    assert (method["name"], method["divergence"]) == ("f-distill", "forward-kl")


def test_a_teacher_folder_uses_the_general_recipe(run, teacher_copy):
    plan = settings(run, "--teacher", teacher_copy)
    assert plan["teacher"] == str(teacher_copy) and plan["method"]["name"] == "dmd" and plan["trainer"]["steps"] > 1000


def test_results_on_stdout_and_talk_on_stderr(run, tiny, tmp_path):
    quiet = run(*tiny, "-o", tmp_path / "quiet")
    assert quiet.out.startswith(f"Finished: {tmp_path / 'quiet' / 'final'}") and "FD-digits64:" in quiet.out
    assert quiet.err == ""
    told = run(*[word for word in tiny if word != "--quiet"], "-o", tmp_path / "told")
    assert "for 6 steps" in told.err and "Next: diffaccel sample" in told.err
    assert told.out.replace("told", "quiet") == quiet.out


def test_same_seed_same_weights(run, tiny, tiny_run, tmp_path):
    run(*tiny, "-o", tmp_path / "again")
    run(*tiny, "-o", tmp_path / "other", "--seed", 1)
    weights = "final/unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tiny_run / weights).read_bytes()
    assert (tmp_path / "other" / weights).read_bytes() != (tiny_run / weights).read_bytes()


def test_the_default_output_is_a_dated_folder(run, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*tiny, "--steps", 1)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-distill-digits-dmd") and (folder / "final" / "model_index.json").is_file()


def test_resume_of_a_finished_run_measures_it_again(run, tiny, tmp_path):
    folder = tmp_path / "run"
    first = run(*tiny, "-o", folder)
    metrics = (folder / "metrics.jsonl").read_bytes()
    assert run(*tiny, "-o", folder, "--resume").out == first.out
    assert run("distill", "-o", folder, "--resume", "--quiet").out == first.out
    assert (folder / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("change", [("--seed", 5), ("--set", "trainer.seed=5"), ("--config", "mine.yaml")])
def test_resume_with_other_settings_lists_them(cli, tiny, tiny_run, change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("trainer: {seed: 5}\n")
    refused = cli(*tiny, "-o", tiny_run, "--resume", *change)
    assert refused.code == 2 and "trainer.seed: 0 -> 5" in refused.err


def test_resume_with_another_method_says_so(cli, tiny_run):
    refused = cli("distill", "--method", "f-distill", "-o", tiny_run, "--resume")
    assert refused.code == 2 and "'dmd' -> 'f-distill'" in refused.err


def test_a_refused_start_leaves_the_folder_free(cli, run, tiny, tmp_path):
    folder = tmp_path / "run"
    assert cli(*tiny, "-o", folder, "--set", "trainer.micro_batches=3").code == 2
    assert not folder.exists()
    run(*tiny, "--steps", 1, "-o", folder)
