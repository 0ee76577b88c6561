"""Runs that end early, in real processes: signals, kill −9, damaged checkpoints, and what resuming gives."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = 15
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def command(folder: Path, steps: int = STEPS) -> tuple:
    """A small distillation with a checkpoint every third step."""
    return ("distill", "--teacher", "digits", "--steps", steps, "--batch-size", 8, "--quiet",
            "--set", "trainer.checkpoint_every=3", "--set", "trainer.log_every=1", "-o", folder)  # fmt: skip


@pytest.fixture
def start():
    """`start("distill", …)`: the command in a process of its own, killed at the end of the test."""
    running = []

    def start(*arguments) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "diffaccel", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def wait_for(condition, process: subprocess.Popen) -> None:
    for _ in range(6000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("nothing happened within a minute")


def final_weights(folder: Path) -> bytes:
    return (folder / "final" / WEIGHTS).read_bytes()


def logged_steps(folder: Path) -> list[int]:
    """Steps in metrics.jsonl, without the validation lines."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "critic/loss" in line]


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The weights of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(*command(folder))
    return final_weights(folder)


def test_kill_and_resume_is_bit_identical(run, start, whole, tmp_path):
    folder, delay, arguments = tmp_path / "run", random.uniform(0.0, 0.3), command(tmp_path / "run")
    process = start(*arguments)
    wait_for(lambda: (folder / "config.yaml").exists() and (folder / "metrics.jsonl").exists(), process)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL, f"finished within {delay} s: too late to kill"
    done = run(*arguments, "--resume")
    assert done.err == "" and final_weights(folder) == whole, delay
    assert logged_steps(folder) == list(range(1, STEPS + 1))
    assert not list(folder.rglob(".*")), "temporary files of the killed process are left"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "unfinished"])
def test_a_damaged_checkpoint_is_passed_over(run, cli, whole, tmp_path, monkeypatch, damage):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        assert cli(*command(folder)).code == 143
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    assert newest.name == "step-00000008"
    weights = newest / "student.safetensors"
    if damage == "truncated":
        os.truncate(weights, 1000)
    elif damage == "flipped":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(content)
    else:
        (newest / "manifest.json").unlink()
    done = run(*command(folder), "--resume")
    assert done.err.count("\n") == 1 and newest.name in done.err
    assert final_weights(folder) == whole and logged_steps(folder) == list(range(1, STEPS + 1))


def stop_after(patch, steps: int) -> None:
    """Send this process SIGTERM inside training step ``steps``."""
    from diffaccel.training.trainer import Trainer

    train_step = Trainer._train_step

    def interrupted(self):
        if self.step == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        train_step(self)

    patch.setattr(Trainer, "_train_step", interrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_a_second_process_is_refused_before(cli, start, tmp_path, number):
    folder = tmp_path / "run"
    process = start(*command(folder, 100_000))
    wait_for(lambda: (folder / "checkpoints" / "step-00000003").is_dir(), process)
    refused = cli(*command(folder, 100_000), "--resume")
    assert refused.code == 2 and f"in use by process {process.pid}" in refused.err
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and out == ""
    assert err.startswith("Error: Stopped and saved at step ") and "--resume" in err and err.count("\n") == 1
    saved = int(err.split("step ")[1].split()[0])
    assert (folder / "checkpoints" / f"step-{saved:08d}" / "manifest.json").is_file()
    assert not (folder / "final").exists() and not (folder / ".lock").exists()


def test_stopped_twice_and_resumed_twice_is_bit_identical(cli, run, whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    for index, steps in enumerate((4, 8)):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            stopped = cli(*command(folder), *(("--resume",) if index else ()))
        assert stopped.code == 143 and f"step {steps} of {STEPS}" in stopped.err
    run(*command(folder), "--resume")
    assert final_weights(folder) == whole and logged_steps(folder) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_training_is_one_sentence_too(cli, tmp_path, monkeypatch, number):
    from diffaccel.core import images

    save_png = images.save_png

    def save_and_signal(image, path):
        save_png(image, path)
        if path.name == "000002.png":
            os.kill(os.getpid(), number)

    monkeypatch.setattr(images, "save_png", save_and_signal)
    done = cli("sample", "digits", "--steps", 1, "-n", 9, "-o", tmp_path / "out")
    assert (done.code, done.out, done.err) == (128 + number, "", "Error: Interrupted.\n")
    assert len(list((tmp_path / "out").iterdir())) == 3
