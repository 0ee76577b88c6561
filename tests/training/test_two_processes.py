"""What happens to one of two processes under torchrun happens to both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from regression import Regression, settings, trained

from diffaccel.core.errors import DiffaccelError
from diffaccel.training.launch import launch
from diffaccel.training.recipes import RunConfig


class Lopsided(Regression):
    """The second half of a batch alone has a metric of its own, and is spoilt."""

    def loss(self, phase, draw):
        self.config.poison_at = draw.step if draw.start > 0 and draw.step >= 7 else -1
        found = super().loss(phase, draw)
        if draw.start > 0:
            found.metrics["second"] = float(draw.step)
        return found


def main(folder: Path, poison: str) -> None:
    """One process: write down what it ended with."""
    method = (Lopsided if poison != "none" else Regression)(Regression.Config(poison=poison))
    try:
        launch(method, RunConfig({"name": "regression"}, settings(ema=0.0)), folder / "run", progress=False)
        found = {"weight": method.roles["model"].weight.tolist()}
    except DiffaccelError as error:
        found = {"told_elsewhere": error.told_elsewhere, "code": error.exit_code, "text": str(error)}
    (folder / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))


def together(folder: Path, poison: str) -> list[dict]:
    """What each of two processes ended with."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, __file__, str(folder), poison], env=environment, check=True, timeout=120)
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("poison", "told"),
    [
        ("loss", "fit loss is nan in the fit update of step 7"),
        ("metric", "fit loss is nan (its metric ratio is inf) in the fit update of step 7"),
        ("gradient", "gradient of model is not finite, first that of bias, in"),
    ],
)
def test_a_loss_that_is_not_finite_on_one_process_stops_both(tmp_path, poison, told):
    found = together(tmp_path, poison)
    assert [one["code"] for one in found] == [5, 5]
    (said,) = [one["text"] for one in found if not one["told_elsewhere"]]
    assert f"The {told}" in said
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    # Steps 0 to 5, two a line: the mean of a metric that one process has is over that one.
    assert [line["fit/second"] for line in lines] == [0.5, 2.5, 4.5]


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path):
    one, other = together(tmp_path, "none")
    alone = trained(tmp_path / "alone", config=settings(ema=0.0)).method.roles["model"].weight
    assert one == other and torch.allclose(torch.tensor(one["weight"]), alone, atol=1e-5)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
