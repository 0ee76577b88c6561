"""kill −9 at ten random moments of one run of every method: each time continued, it ends with the bits of an unbroken run."""

import os
import random
import subprocess
import sys
import time

import pytest
from test_cli_interrupted import final_weights

STEPS, KILLS = 60, 10
METHODS = {
    "dmd": (),
    "f-distill": ("critic_warmup=5", "gan_weight=0.01"),
    "disback": ("record_steps=20", "node_interval=5", "switch_interval=8"),
    "disback-mismatch": ("record_steps=20", "node_interval=5", "switch=mismatch", "switch_threshold=5.0"),
    "sid": (),
    "consistency": ("grid_steps=8", "adversarial_weight=0.1", "eta=0.2"),
    "pairs": ("pairs=64", "pair_steps=4"),
    "multi-student": ("students=2", "student=1", "matching_steps=10", "channels=[16, 32]"),
}


def command(name: str, folder) -> list[str]:
    method = name.removesuffix("-mismatch")
    data = ["--data", "digits"] if method in ("f-distill", "consistency") else []
    settings = [f"method.{text}" for text in METHODS[name]]
    settings += ["trainer.checkpoint_every=3", "trainer.log_every=1", "trainer.sample_every=0"]
    return [sys.executable, "-m", "diffaccel", "distill", "--teacher", "digits", "--method", method, "--steps", str(STEPS),
            "--batch-size", "8", "--quiet", "--threads", "1", "-o", str(folder), *data,
            *(word for text in settings for word in ("--set", text))]  # fmt: skip


def size(file) -> int:
    return file.stat().st_size if file.is_file() else 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", METHODS)
def test_ten_kills_change_nothing(tmp_path, name):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    at = "student-1" if name == "multi-student" else "run"
    whole, folder = tmp_path / "whole" / at, tmp_path / "killed" / at
    subprocess.run(command(name, whole), check=True, env=environment, stdout=subprocess.DEVNULL)
    kills, moments = 0, []
    while not (folder / "final").is_dir():
        arguments = command(name, folder) + (["--resume"] if (folder / "config.yaml").is_file() else [])
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (folder / "config.yaml").is_file():
            time.sleep(0.01)
        log = folder / "metrics.jsonl"
        before, patience = size(log), time.monotonic() + random.choice([0.5, 60.0, 60.0])
        while process.poll() is None and time.monotonic() < patience and size(log) == before:
            time.sleep(0.01)
        if kills < KILLS:
            time.sleep(random.uniform(0.0, 0.4))
            if process.poll() is None:
                process.kill()
                kills += 1
                moments.append(log.read_text().count("\n") if log.is_file() else 0)
        process.wait()
        assert process.returncode in (0, -9), process.returncode
    assert kills == KILLS, f"the run was over after {kills} kills: {moments}"
    assert final_weights(folder) == final_weights(whole), moments
