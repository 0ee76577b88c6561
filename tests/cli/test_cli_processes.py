"""Several processes under torchrun give what one gives."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from diffaccel.core.images import decode_image, save_png
from diffaccel.evaluate.run import evaluate_images
from diffaccel.models.data import load_digits

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SETTINGS = ["--steps", "3", "--set", "trainer.batch_size=8", "--device", "cpu", "-q"]
STUDENT = ["--set", "trainer.optimizers.student.lr=1e-4"]
CRITIC = [*STUDENT, "--set", "method.critic_warmup=0", "--set", "trainer.optimizers.critic.lr=2e-4"]
MODEL = ["--set", "trainer.optimizers.model.lr=1e-4"]
RUNS = {
    "dmd": ["distill", "--teacher", "digits", "--method", "dmd", *CRITIC],
    "f-distill": ["distill", "--teacher", "digits", "--method", "f-distill", *CRITIC],
    "sid": ["distill", "--teacher", "digits", "--method", "sid", *CRITIC],
    "disback": [
        "distill",
        "--teacher",
        "digits",
        "--method",
        "disback",
        *CRITIC,
        "--set",
        "method.record_steps=2",
        "--set",
        "method.node_interval=1",
        "--set",
        "method.switch=mismatch",
    ],
    "multi-student": [
        "distill",
        "--teacher",
        "digits",
        "--method",
        "multi-student",
        *CRITIC,
        "--set",
        "method.students=2",
    ],
    "consistency": [
        "distill",
        "--teacher",
        "digits",
        "--method",
        "consistency",
        "--data",
        "digits",
        *STUDENT,
        "--set",
        "method.eta=0.2",
        "--set",
        "method.substeps=2",
    ],
    "pairs": ["distill", "--teacher", "digits", "--method", "pairs", *STUDENT, "--set", "method.pairs=32"],
    "digits": ["train", "--recipe", "digits", *MODEL],
    "digits-flow": ["train", "--recipe", "digits-flow", *MODEL],
}


def _torchrun(processes: int, command: list, check: bool = True) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    return subprocess.run([*launcher, *command], check=check, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_evaluation_is_shared(tmp_path, processes):
    from encoders import save_clip

    save_clip(tmp_path / "clip")
    (tmp_path / "images").mkdir()
    for index, image in enumerate(load_digits("train")[0][:700]):  # three blocks
        save_png(image, tmp_path / "images" / f"{index:04d}.png")
    (tmp_path / "images" / "0300.png").write_bytes(b"")
    metrics = ("fid", "kid", "prdc", "is", "cmmd", "appearance")
    settings = {"skip_bad": True, "fd_infinity": True, "clip_weights": str(tmp_path / "clip")}
    alone = evaluate_images(tmp_path / "images", "digits", metrics, **settings)
    command = ["-m", "diffaccel", "evaluate", "all", tmp_path / "images", "digits", "--metrics", ",".join(metrics)]
    options = ["--skip-bad", "--fd-infinity", "--clip-weights", tmp_path / "clip", "--device", "cpu", "--json"]
    together = json.loads(_torchrun(processes, [*command, *options]).stdout)
    assert together["fake"] == alone.fake and together["environment"]["processes"] == processes
    for mine, theirs in zip(alone.results, together["results"], strict=True):
        assert _numbers(theirs) == pytest.approx(_numbers(mine.to_dict()), rel=1e-8, abs=1e-9), mine.metric


def _numbers(result: dict) -> list[float]:
    numbers = [result["value"], result["bias_corrected"], result["deviation"], *(result["ci95"] or ())]
    return [number for number in numbers if number is not None]


def test_a_failure_of_one_process_ends_all_with_one_sentence(tmp_path):
    (tmp_path / "images").mkdir()
    for index, image in enumerate(load_digits("train")[0][:300]):
        save_png(image, tmp_path / "images" / f"{index:04d}.png")
    (tmp_path / "images" / "0290.png").write_bytes(b"")  # the second process reads it
    command = ["-m", "diffaccel", "evaluate", "fid", tmp_path / "images", "digits", "--device", "cpu"]
    done = _torchrun(2, command, check=False)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("0290.png: the file is empty") == 1 and "exitcode  : 3" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(tmp_path, name):
    command = ["-m", "diffaccel", *RUNS[name], *SETTINGS]
    subprocess.run([sys.executable, *command, "-o", tmp_path / "one"], check=True, env=ENVIRONMENT)
    done = _torchrun(2, [*command, "-o", tmp_path / "two"])
    assert done.stdout.count("Finished") == 1
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("final/**/*.safetensors"))
    assert files
    for file in files:
        one, two = (load_file(tmp_path / side / file) for side in ("one", "two"))
        # AdamW turns rounding of near-zero gradients into steps of the size of lr: hence few steps at a usual lr.
        assert max(float((one[key] - two[key]).abs().max()) for key in one) <= 1e-5, file
    logs = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("metrics.jsonl"))
    for log in logs:
        assert len({(tmp_path / side / log).read_text().count("\n") for side in ("one", "two")}) == 1


@pytest.mark.slow
def test_guidance_pairs_are_shared(tmp_path, run):
    command = ["sample", "digits", "--steps", "4", "-n", "6", "--guidance-scale", "3", "--batch-size", "3"]
    done = _torchrun(
        2, ["-m", "diffaccel", *command, "--parallel-cfg", "--device", "cpu", "--output", tmp_path / "two"]
    )
    assert done.stdout.count("6 images") == 1
    run(*command, "--output", tmp_path / "one")
    for path in (tmp_path / "one").glob("*.png"):
        mine, theirs = (
            decode_image((tmp_path / side / path.name).read_bytes()).tensor.int() for side in ("one", "two")
        )
        assert (mine - theirs).abs().max() <= 1
    assert sorted(os.listdir(tmp_path / "one")) == sorted(os.listdir(tmp_path / "two"))
