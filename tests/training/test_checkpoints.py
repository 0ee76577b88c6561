"""Checkpoints that cannot be used, and which are kept."""

import json
import re
from pathlib import Path

import pytest
import torch
from regression import settings, trained, vector
from safetensors.torch import load_file

from diffaccel.core.errors import DataError
from diffaccel.training.checkpoint import list_checkpoints, save_checkpoint


def test_only_the_wanted_number_of_checkpoints_is_kept(tmp_path):
    trained(tmp_path / "run", config=settings(checkpoint_every=2, keep=3))
    assert [path.name[-2:] for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["08", "10", "12"]


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    straight = trained(tmp_path / "straight")
    trained(tmp_path / "run", config=settings(steps=12))
    weights = tmp_path / "run/checkpoints/step-00000012/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert torch.equal(vector(straight), vector(trained(tmp_path / "run", resume=True)))
    assert re.fullmatch(
        r"Passing over the checkpoint step-00000012: model\S+ has .* bytes.*\n", capsys.readouterr().err
    )


def replace(folder: Path, name: str, change: dict) -> None:
    """Write the newest checkpoint anew, intact but with other tensors in one of its files."""
    path = list_checkpoints(folder / "checkpoints")[-1]
    files = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    files[name] = {key: value for key, value in {**files[name], **change}.items() if value is not None}
    record = json.loads((path / "trainer.json").read_text())
    save_checkpoint(path.parent, record["step"], files, {"roles": record["roles"]}, keep=9)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("helper", {"weight": torch.zeros(2, 4)}, r"helper .*weight has shape \(2, 4\), expected \(2, 3\)"),
        ("ema", {"bias": None}, "ema .*bias is missing"),
        ("model.optimizer", {"0.exp_avg": torch.zeros(3)}, r"optimizer .*0\.exp_avg has shape \(3,\), expected"),
        ("model.optimizer", {"1.step": None}, r"1\.step is missing"),
        ("model.optimizer", {"7.step": torch.zeros(())}, "7 is not expected, there are 2"),
        ("method", {"updates": None, "other": torch.zeros(1)}, "method .*updates is missing; other is not expected"),
    ],
)
def test_an_intact_checkpoint_that_does_not_fit_is_passed_over(tmp_path, capsys, name, change, told):
    straight = trained(tmp_path / "straight")
    trained(tmp_path / "run", stop_after=4)
    trained(tmp_path / "run", resume=True, stop_after=7)
    replace(tmp_path / "run", name, change)
    resumed = trained(tmp_path / "run", resume=True)
    assert torch.equal(vector(straight), vector(resumed)) and resumed.method.updates == 36
    said = capsys.readouterr().err
    assert said.startswith("Passing over the checkpoint step-00000007: ") and re.search(told, said)


def test_without_a_checkpoint_that_fits_the_differences_are_listed(tmp_path):
    trained(tmp_path / "run", stop_after=4)
    replace(tmp_path / "run", "model", {"weight": torch.zeros(2, 4), "more": torch.zeros(1)})
    with pytest.raises(DataError, match=r"None of .* more is not expected; weight has shape .* another folder"):
        trained(tmp_path / "run", resume=True)


def test_what_was_passed_over_does_not_outlive_what_is_good(tmp_path):
    trained(tmp_path / "run", stop_after=4)
    trained(tmp_path / "run", resume=True, stop_after=7)
    replace(tmp_path / "run", "model", {"bias": None})
    trained(tmp_path / "run", resume=True, stop_after=6, config=settings(keep=1))
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["step-00000006"]
