"""The loop on a problem with a known answer: resume, accumulation, phases, averages, faults."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from diffaccel.core.errors import NumericalError, UsageError
from diffaccel.training import trainer
from diffaccel.training.checkpoint import latest_checkpoint, list_checkpoints
from diffaccel.training.config import OptimizerConfig, TrainerConfig
from diffaccel.training.ema import EMA
from diffaccel.training.method import Loss, Method, Phase
from diffaccel.training.rundir import RunDirectory
from diffaccel.training.trainer import Trainer


class Regression(Method):
    """Two linear roles: ``model`` regresses noise onto a fixed map, ``helper`` follows the model."""

    main_role = "model"

    @dataclass
    class Config:
        poison_at: int = -1

    def __init__(self, config: Config):
        self.config = config
        torch.manual_seed(0)
        self.roles = {"model": nn.Linear(3, 2), "helper": nn.Linear(3, 2)}
        self.target = torch.randn(2, 3)
        self.updates = 0
        self.called = []

    def phases(self, step):
        return [Phase("follow", ("helper",), repeats=2), Phase("fit", ("model",))]

    def loss(self, phase, draw):
        x = draw.normal("x", (3,))
        model, helper = self.roles["model"](x), self.roles["helper"](x)
        if phase.name == "follow":
            return Loss((helper - model).square().mean())
        total = (model - x @ self.target.T).square().mean()
        if draw.step == self.config.poison_at:
            total = total * float("nan")
        return Loss(total, {"size": model.detach().abs().mean()})

    def samples(self, model, random):
        self.called.append("samples")

    def export(self, model, folder):
        torch.nn.utils.parameters_to_vector(model.parameters()).numpy().tofile(folder / "weights.bin")

    def end_phase(self, phase, total):
        self.updates += 1

    def begin(self, folder):
        self.called.append(folder)

    def end_step(self, step):
        self.called.append((step, self.updates))

    def extra_state(self):
        return {"updates": torch.tensor(self.updates)}

    def load_extra_state(self, state):
        self.updates = int(state["updates"])


def settings(**changes) -> TrainerConfig:
    optimizer = OptimizerConfig(lr=0.05, warmup=3, final_lr_fraction=0.1)
    defaults = {"steps": 12, "batch_size": 8, "checkpoint_every": 4, "log_every": 2, "device": "cpu"}
    return TrainerConfig(**{**defaults, "optimizers": {"model": optimizer, "helper": optimizer}, **changes})


def trained(folder, stop_after=None, resume=False, config=None, method=None) -> Trainer:
    with RunDirectory(folder, {"kind": "regression"}, resume) as run:
        trainer = Trainer(method or Regression(Regression.Config()), config or settings(), run, progress=False)
        if resume:
            trainer.restore()
        if stop_after is None:
            trainer.fit()
        else:
            while trainer.step < stop_after:
                trainer._train_step()
                trainer.step += 1
            trainer.save()
    return trainer


def vector(trainer: Trainer) -> torch.Tensor:
    modules = [*trainer.method.roles.values(), trainer.model]
    return torch.cat([nn.utils.parameters_to_vector(module.parameters()) for module in modules])


@pytest.mark.parametrize("stop_after", [1, 5, 11])
def test_stopping_and_resuming_changes_no_bit(tmp_path, stop_after):
    straight = trained(tmp_path / "straight")
    trained(tmp_path / "parts", stop_after=stop_after)
    resumed = trained(tmp_path / "parts", resume=True)
    assert torch.equal(vector(straight), vector(resumed))
    assert resumed.method.updates == straight.method.updates == 12 * 3
    same = [(tmp_path / name / "final/weights.bin").read_bytes() for name in ("straight", "parts")]
    assert same[0] == same[1]


def test_a_method_hears_of_the_run_and_of_each_step(tmp_path):
    folder = tmp_path / "run"
    trained(folder, stop_after=5)
    method = trained(folder, resume=True).method
    assert method.called == [folder, *((step, 3 * (step + 1)) for step in range(5, 12)), "samples"]
    assert trained(tmp_path / "new").method.called[:3] == [tmp_path / "new", "samples", (0, 3)]


def test_accumulation_equals_one_large_batch(tmp_path):
    whole = trained(tmp_path / "whole")
    parts = trained(tmp_path / "parts", config=settings(micro_batches=4))
    assert torch.allclose(vector(whole), vector(parts), atol=1e-5)


def test_the_model_learns(tmp_path):
    trainer = trained(tmp_path / "run", config=settings(steps=300))
    assert (trainer.method.roles["model"].weight - trainer.method.target).abs().max() < 0.05


def test_a_phase_moves_only_its_roles(tmp_path):
    trainer = Trainer(Regression(Regression.Config()), settings(), RunDirectory(tmp_path / "run", {}), progress=False)
    before = {name: module.weight.clone() for name, module in trainer.method.roles.items()}
    trainer._update(Phase("follow", ("helper",)), 0)
    assert torch.equal(trainer.method.roles["model"].weight, before["model"])
    assert not torch.equal(trainer.method.roles["helper"].weight, before["helper"])


def test_a_nan_stops_before_it_touches_a_weight(tmp_path):
    method = Regression(Regression.Config(poison_at=6))
    with pytest.raises(NumericalError, match="fit loss is nan in the fit update of step 6"):
        trained(tmp_path / "run", method=method)
    assert torch.isfinite(method.roles["model"].weight).all()
    path, _ = latest_checkpoint(tmp_path / "run/checkpoints", print)
    assert path.name == "step-00000004"


def test_metrics_are_means_and_each_step_is_logged_once(tmp_path):
    trained(tmp_path / "run", stop_after=5)
    trained(tmp_path / "run", resume=True)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [6, 8, 10, 12]
    assert all(math.isfinite(record["fit/loss"]) and record["fit/grad_norm_model"] > 0 for record in records)


def test_settings_that_leave_the_result_alone_may_change_on_resume(tmp_path):
    stored = {"trainer": {"seed": 0, "micro_batches": 1, "keep": 2}}
    for config, resume in ((stored, False), ({"trainer": {"seed": 0, "micro_batches": 4, "keep": 3, "new": 1}}, True)):
        with RunDirectory(tmp_path / "run", config, resume):
            pass
    assert len(json.loads((tmp_path / "run/run.json").read_text())["starts"]) == 2
    with pytest.raises(UsageError, match=r"trainer\.seed: 0 -> 1"):
        RunDirectory(tmp_path / "run", {"trainer": {"seed": 1, "micro_batches": 1}}, resume=True)


def test_only_the_wanted_number_of_checkpoints_is_kept(tmp_path):
    trained(tmp_path / "run", config=settings(checkpoint_every=2, keep=3))
    assert [path.name[-2:] for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["08", "10", "12"]


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    straight = trained(tmp_path / "straight")
    trained(tmp_path / "run", config=settings(steps=12))
    weights = tmp_path / "run/checkpoints/step-00000012/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    said = []
    path, _ = latest_checkpoint(tmp_path / "run/checkpoints", said.append)
    assert path.name == "step-00000008" and "step-00000012" in said[0]
    assert torch.equal(vector(straight), vector(trained(tmp_path / "run", resume=True)))


def test_a_batch_that_cannot_be_split_is_refused(tmp_path):
    with pytest.raises(UsageError, match="multiple"):
        trained(tmp_path / "run", config=settings(micro_batches=3))


def test_the_average_follows_its_closed_form():
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 0.0)
    ema = EMA(module, decay=0.9)
    expected = 0.0
    for step in range(50):
        nn.init.constant_(module.weight, float(step))
        ema.update(module, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.module.weight.item() == pytest.approx(expected, rel=1e-5)


def test_the_learning_rate_warms_up_and_ends_on_the_cosine():
    optimizer = OptimizerConfig(lr=1.0, warmup=10, final_lr_fraction=0.2)
    assert optimizer.lr_at(0, 100) == pytest.approx(0.1, rel=1e-3)
    assert optimizer.lr_at(50, 100) == pytest.approx(0.2 + 0.8 * 0.5)
    assert optimizer.lr_at(99, 100) == pytest.approx(0.2, abs=1e-3)
    assert OptimizerConfig(lr=1.0).lr_at(77, 100) == 1.0


@pytest.mark.parametrize(
    ("change", "word"),
    [({"steps": 0}, "steps"), ({"ema": 1.0}, "ema"), ({"precision": "fp8"}, "precision"), ({"seed": -1}, "seed")],
)
def test_impossible_settings_are_named(change, word):
    with pytest.raises(UsageError, match=word):
        settings(**change)


def test_gradients_travel_in_few_messages_and_none_is_lost(monkeypatch):
    monkeypatch.setattr(trainer, "_BUCKET", 10)
    parameters = [nn.Parameter(torch.zeros(size)) for size in (3, 4, 3, 1, 25, 2, 9)]
    parameters[-1] = nn.Parameter(torch.zeros(9, dtype=torch.float64))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    buckets = list(trainer._buckets(parameters))
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[3, 4, 3], [1], [25], [2], [9]]
    assert [id(p) for bucket in buckets for p in bucket] == [id(p) for p in parameters]
    assert list(trainer._buckets([])) == []
