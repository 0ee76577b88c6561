"""What trackers are given, with stand-ins for their packages; and how a resumed run continues."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from regression import Regression, settings, trained

from diffaccel.core.errors import UsageError
from diffaccel.training.trainer import prepare


class Pictured(Regression):
    """The regression with a picture of its weights."""

    def samples(self, model, random):
        return model.weight.expand(2, 1, 2, 3).tanh()

    def validate(self, model):
        return {"size": float(model.weight.abs().mean())}


def pictured(folder: Path, tracker: str, **more):
    config = settings(tracker=tracker, sample_every=4)
    return trained(folder, config=config, method=Pictured(Regression.Config()), **more)


@pytest.fixture
def tensorboard(monkeypatch) -> list:
    """The calls of SummaryWriter."""
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append(("open", folder, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def add_image(self, name, picture, step):
            assert picture.ndim == 3 and picture.dtype == "uint8"
            calls.append((name, picture.shape, step))

        def flush(self):
            calls.append(("flush",))

        def close(self):
            calls.append(("close",))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def logged(folder: Path) -> dict[tuple[str, int], float]:
    """Numbers of metrics.jsonl by name and step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(name, line["step"]): value for line in lines for name, value in line.items() if name != "step"}


def test_tensorboard_gets_what_the_file_gets_and_the_pictures(tmp_path, tensorboard):
    pictured(tmp_path / "run", "tensorboard")
    assert tensorboard[0] == ("open", str(tmp_path / "run" / "tensorboard"), 0) and tensorboard[-1] == ("close",)
    numbers = {(call[0], call[2]): call[1] for call in tensorboard[1:] if len(call) == 3 and call[0] != "samples"}
    assert numbers == logged(tmp_path / "run") and ("validation/size", 4) in numbers and ("fit/loss", 12) in numbers
    assert [call[2] for call in tensorboard if call[0] == "samples"] == [0, 4, 8, 12]
    assert tensorboard.count(("flush",)) == 3


def test_a_resumed_run_purges_what_came_after_its_checkpoint(tmp_path, tensorboard):
    pictured(tmp_path / "run", "tensorboard", stop_after=5)
    pictured(tmp_path / "run", "tensorboard", resume=True)
    opened = [call[2] for call in tensorboard if call[0] == "open"]
    assert opened == [6] and min(call[2] for call in tensorboard if call[0] == "fit/loss") == 6


class Wandb(ModuleType):
    """The part of W&B that is used; `runs` are the arguments and records of its runs."""

    class Error(Exception):
        pass

    def __init__(self, fault: str | None = None):
        super().__init__("wandb")
        self.fault, self.runs = fault, []

    def Image(self, path):
        return Path(path).name

    def init(self, **arguments):
        if self.fault:
            raise self.Error(self.fault)
        run = SimpleNamespace(arguments=arguments, records=[], ended=None)
        run.define_metric = lambda name, step_metric: run.records.append((name, step_metric))
        run.log = run.records.append
        run.finish = lambda exit_code: setattr(run, "ended", exit_code)
        self.runs.append(run)
        return run


def test_a_resumed_run_continues_the_same_one_of_wandb(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    pictured(tmp_path / "run", "wandb")
    pictured(tmp_path / "run", "wandb", resume=True)
    first, second = wandb.runs
    assert first.arguments["id"] == second.arguments["id"] and first.arguments["resume"] == "allow"
    assert first.arguments["name"] == "run" and first.arguments["config"] == {"kind": "regression"}
    assert first.records[0] == ("*", "step") and first.ended == second.ended == 0
    numbers = {(key, r["step"]): r[key] for r in first.records[1:] for key in r if key not in ("step", "samples")}
    assert numbers == logged(tmp_path / "run")
    assert {"step": 8, "samples": "step-000008.png"} in first.records


def test_a_run_that_fails_is_marked_so(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(Exception, match="nan"):
        trained(tmp_path / "run", config=settings(tracker="wandb"), method=Regression(Regression.Config(2)))
    assert wandb.runs[0].ended == 1


def test_what_wandb_refuses_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb("no API key."))
    with pytest.raises(UsageError, match=r"no API key\. Run `wandb login`"):
        pictured(tmp_path / "run", "wandb")


@pytest.mark.parametrize(
    ("change", "module", "package"),
    [
        ({"tracker": "tensorboard"}, "torch.utils.tensorboard", "tensorboard"),
        ({"tracker": "wandb"}, "wandb", "wandb"),
        ({"eight_bit": True}, "bitsandbytes.optim", "bitsandbytes"),
    ],
)
def test_a_missing_package_is_told_before_anything_starts(monkeypatch, change, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"trainer\.\S+ needs {package}.*pip install {package}, or leave"):
        prepare(settings(**change))


def test_the_file_is_written_whatever_the_tracker(tmp_path, tensorboard):
    pictured(tmp_path / "none", "none")
    pictured(tmp_path / "some", "tensorboard")
    numbers = [{key: v for key, v in logged(tmp_path / n).items() if key[0] != "seconds"} for n in ("none", "some")]
    assert numbers[0] == numbers[1] and torch.tensor(list(numbers[0].values())).isfinite().all()
