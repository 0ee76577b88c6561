"""The loop on a problem with a known answer: resume, accumulation, phases, averages, faults."""

import json
import math

import pytest
import torch
from regression import Regression, settings, trained, vector
from torch import nn

from diffaccel.core.errors import NumericalError, UsageError
from diffaccel.training import gradients
from diffaccel.training.checkpoint import list_checkpoints
from diffaccel.training.config import OptimizerConfig
from diffaccel.training.ema import EMA
from diffaccel.training.method import Phase
from diffaccel.training.rundir import RunDirectory
from diffaccel.training.trainer import Trainer


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


def test_what_is_frozen_at_the_start_is_never_trained(tmp_path):
    method = Regression(Regression.Config())
    method.roles["model"].bias.requires_grad_(False)
    before = method.roles["model"].bias.clone()
    trainer = trained(tmp_path / "run", method=method)
    assert torch.equal(method.roles["model"].bias, before) and torch.equal(trainer.model.bias, before)
    assert (method.roles["model"].weight - method.target).abs().max() < 1.0


class Adapter(nn.Module):
    """A trained shift of a shared, frozen layer that it does not list."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = (base,)
        self.shift = nn.Parameter(torch.zeros(2))

    def __deepcopy__(self, memo):
        other = Adapter(*self.base)
        other.load_state_dict(self.state_dict())
        return other

    def forward(self, x):
        return self.base[0](x) + self.shift


def test_a_role_may_be_an_adapter_on_a_shared_base(tmp_path):
    def method():
        method = Regression(Regression.Config())
        base = nn.Linear(3, 2).requires_grad_(False)
        method.roles = {name: Adapter(base) for name in method.roles}
        return method

    straight = trained(tmp_path / "straight", method=method())
    trained(tmp_path / "parts", stop_after=5, method=method())
    resumed = trained(tmp_path / "parts", resume=True, method=method())
    assert torch.equal(vector(straight), vector(resumed)) and vector(straight).shape == (6,) and vector(straight).all()
    base = straight.model.base[0]
    assert base is straight.method.roles["helper"].base[0] and not base.weight.requires_grad and base.bias.grad is None


@pytest.mark.parametrize(
    ("poison", "told"),
    [
        ("loss", r"fit loss is nan in"),
        ("metric", r"fit loss is nan \(its metric ratio is inf\) in"),
        ("gradient", r"gradient of model is not finite, first that of bias, in"),
    ],
)
def test_what_is_not_finite_stops_before_it_touches_a_weight(tmp_path, poison, told):
    method = Regression(Regression.Config(6, poison))
    with pytest.raises(NumericalError, match=rf"The {told} the fit update of step 6; no weight"):
        trained(tmp_path / "run", method=method)
    before = trained(tmp_path / "before", stop_after=6)
    assert torch.equal(method.roles["model"].weight, before.method.roles["model"].weight)
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["step-00000004"]


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


def test_all_settings_that_changed_are_listed(tmp_path):
    method = {"name": "dmd", "scale": 1.0, "range": [0.1, 0.9], "data": None}
    stored = {"method": method, "trainer": {"steps": 5, "optimizers": {"model": {"lr": 0.1, "clip": 1.0}}}}
    other = {
        "method": {**method, "scale": 2.0, "range": [0.2, 0.9], "data": "digits"},
        "trainer": {"steps": 6, "optimizers": {"model": {"lr": 0.2, "clip": 1.0}}},
    }
    RunDirectory(tmp_path / "run", stored).__exit__()
    with pytest.raises(UsageError) as refused:
        RunDirectory(tmp_path / "run", other, resume=True)
    changed = ["method.data: None -> 'digits'", "method.range: [0.1, 0.9] -> [0.2, 0.9]", "method.scale: 1.0 -> 2.0"]
    changed += ["trainer.optimizers.model.lr: 0.1 -> 0.2", "trainer.steps: 5 -> 6"]
    assert f"({'; '.join(changed)})" in str(refused.value)


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
    [
        ({"steps": 0}, "steps"),
        ({"ema": 1.0}, "ema"),
        ({"precision": "fp8"}, "precision"),
        ({"seed": -1}, "seed"),
        ({"tracker": "csv"}, "tracker"),
    ],
)
def test_impossible_settings_are_named(change, word):
    with pytest.raises(UsageError, match=word):
        settings(**change)


def test_gradients_travel_in_few_messages_and_none_is_lost(monkeypatch):
    monkeypatch.setattr(gradients, "_BUCKET", 10)
    parameters = [nn.Parameter(torch.zeros(size)) for size in (3, 4, 3, 1, 25, 2, 9)]
    parameters[-1] = nn.Parameter(torch.zeros(9, dtype=torch.float64))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    buckets = list(gradients._buckets(parameters))
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[3, 4, 3], [1], [25], [2], [9]]
    assert [id(p) for bucket in buckets for p in bucket] == [id(p) for p in parameters]
    assert list(gradients._buckets([])) == []
