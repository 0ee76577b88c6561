"""`diffaccel train`: the recipes behind what ships."""

import yaml

SHORT = ("--steps", 3, "--batch-size", 8, "--quiet")


def test_digits(run, tmp_path):
    done = run("train", "--recipe", "digits", *SHORT, "-o", tmp_path / "teacher")
    assert "FD-digits64:" in done.out and done.err == ""
    run("sample", tmp_path / "teacher" / "final", "--num", 10, "--grid", tmp_path / "sheet.png")
    stored = yaml.safe_load((tmp_path / "teacher" / "config.yaml").read_text())
    assert stored["trainer"]["steps"] == 3


def test_digits_features(run, tmp_path):
    done = run("train", "--recipe", "digits-features", *SHORT, "-o", tmp_path / "features")
    assert (tmp_path / "features" / "final" / "classifier.safetensors").is_file()
    assert "held_out_accuracy" in (tmp_path / "features" / "metrics.jsonl").read_text()
    assert done.out.startswith(f"Finished: {tmp_path / 'features' / 'final'}\n") and "held_out_accuracy" in done.out


def test_dry_run_is_a_config_and_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("train", "--recipe", "digits", "--dry-run")
    assert yaml.safe_load(done.out)["method"]["name"] == "denoising" and list(tmp_path.iterdir()) == []
    (tmp_path / "plan.yaml").write_text(done.out)
    assert run("train", "--recipe", "digits", "--config", "plan.yaml", "--dry-run").out == done.out


def test_resume_lists_changed_settings_and_other_recipes(cli, run, tmp_path):
    run("train", "--recipe", "digits-features", *SHORT, "-o", tmp_path / "run")
    again = ("train", "-o", tmp_path / "run", "--resume")
    assert "trainer.seed: 0 -> 5" in cli(*again, "--recipe", "digits-features", "--set", "trainer.seed=5").err
    assert "'classifier'" in cli(*again, "--recipe", "digits").err
    assert run(*again, "--recipe", "digits-features", "--quiet").out.startswith("Finished")
