"""Pruned models with everything else: samplers, guidance, layers left out, training and its checkpoints."""

import shutil

import pytest
import torch
from branches import own
from pipelines import PIPELINES, check_close

import diffaccel
from diffaccel import CFG, guide
from diffaccel.distill.methods.dmd import DMD
from diffaccel.distill.task import Task
from diffaccel.models.conditions import ClassConditions
from diffaccel.models.networks import network_of
from diffaccel.models.teachers import denoiser_of, load_pipeline
from diffaccel.prune.classes import prune
from diffaccel.prune.operators import operators
from diffaccel.search.layers import bodies, bypass
from diffaccel.training.checkpoint import list_checkpoints
from diffaccel.training.config import OptimizerConfig, TrainerConfig
from diffaccel.training.rundir import RunDirectory
from diffaccel.training.trainer import Trainer


def pruned_digits(name="digits"):
    pipe = load_pipeline(name)
    return prune(pipe, list(operators(pipe.network))[1::4])


@pytest.mark.parametrize("name", ["sd", "classes", "dit", "flux", "wan"])
def test_samplers_and_guidance(name):
    """Of a pruned pipeline as of one whose branches are zero: here, of a copy with the layers merely left out."""
    case = PIPELINES[name]
    pipe, other = own(case), own(case)
    scheduler = case.build("deis").scheduler
    pipe.scheduler = other.scheduler = scheduler
    names = bodies(network_of(pipe))[::2]
    prune(pipe, names)
    with bypass(network_of(other), {"skip": [names]}, lambda: 0):
        want = case.call(other, 3)
        with guide(other, CFG(3.0)):
            guided = case.call(other, 3, **case.guided(2.0))
    check_close(case.call(pipe, 3), want, 1e-5)
    with guide(pipe, CFG(3.0)):
        check_close(case.call(pipe, 3, **case.guided(2.0)), guided, 1e-5)


def test_layers_left_out_of_what_is_left():
    network = pruned_digits().unet
    left = bodies(network)
    assert left and not {record["name"] for record in network.config.pruned_layers} & set(left)
    x, label = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    with torch.no_grad():
        whole = network(x, 5, label).sample
        with bypass(network, {"skip": [left]}, lambda: 0):
            assert (network(x, 5, label).sample - whole).abs().max() > 1e-3
        check_close(network(x, 5, label).sample, whole, 0)


@pytest.mark.parametrize("name", ["digits", "digits-flow"])
def test_training_and_its_checkpoints(name, tmp_path):
    """A pruned model is distilled, checkpointed, resumed and exported like a whole one."""
    pipe = pruned_digits(name)
    layers = pipe.network.config.pruned_layers
    rates = {role: OptimizerConfig(lr=1e-4) for role in ("student", "critic")}

    def trainer(steps, resume):
        method = DMD(Task(denoiser_of(pipe), ClassConditions(10), pipeline=pipe), DMD.Config())
        config = TrainerConfig(steps=steps, batch_size=4, optimizers=rates, device="cpu", checkpoint_every=1)
        return Trainer(method, config, RunDirectory(tmp_path / "run", {}, resume=resume), progress=False)

    begun = trainer(1, False)
    with begun.run:
        begun.fit()
    assert list_checkpoints(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "run" / "final")
    resumed = trainer(2, True)
    with resumed.run:
        resumed.restore()
        assert resumed.step == 1
        resumed.fit()
    student = diffaccel.ClassConditionalPipeline.from_pretrained(tmp_path / "run" / "final")
    assert [dict(one) for one in student.network.config.pruned_layers] == [dict(one) for one in layers]
    x, t = torch.randn(2, *student.sample_shape), torch.tensor([500.0, 20.0])
    with torch.no_grad():
        want = resumed.model.net(x, t, torch.tensor([0, 1])).sample
        found = student.network(x, t, torch.tensor([0, 1])).sample
    check_close(found, want, 1e-5)
