"""Two processes under torchrun give the student of one."""

import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

SETTINGS = ["--steps", "3", "--set", "trainer.batch_size=8", "--set", "method.critic_warmup=0", "--device", "cpu", "-q",
            "--set", "trainer.optimizers.student.lr=1e-4"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dmd", "f-distill"])
def test_two_processes_equal_one(tmp_path, method):
    command = ["-m", "diffaccel", "distill", "--teacher", "digits", "--method", method, *SETTINGS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command, "-o", tmp_path / "one"], check=True, env=environment)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29511"]
    done = subprocess.run(
        [*launcher, *command, "-o", tmp_path / "two"], check=True, env=environment, capture_output=True, text=True
    )
    assert done.stdout.count("Finished") == 1
    one, two = (
        load_file(tmp_path / name / "final/unet/diffusion_pytorch_model.safetensors") for name in ("one", "two")
    )
    # AdamW turns rounding of near-zero gradients into steps of the size of lr: hence few steps at a usual lr.
    assert max(float((one[key] - two[key]).abs().max()) for key in one) <= 1e-5
    lines = [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("one", "two")]
    assert lines[0] == lines[1]
