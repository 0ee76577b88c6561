"""Adapters of one frozen network: at the start, in training, under checkpointing, copied, merged and in a stock pipeline."""

import copy
import importlib.util

import pytest
import torch
from networks import tiny_unet
from pipelines import PIPELINES, check_close, rows
from torch import nn

from diffaccel.core.errors import UsageError
from diffaccel.core.schedule import Flow, VPDiscrete
from diffaccel.distill.adapters import AdapterConfig, SharedBase, find_targets
from diffaccel.models.denoiser import Guided
from diffaccel.models.pixel import PixelDenoiser
from diffaccel.models.transformers import PixArtDenoiser, SD3Denoiser
from diffaccel.models.unet_condition import UNetConditionDenoiser
from diffaccel.training.ema import EMA

VP = VPDiscrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0))
TEXT = {"encoder_hidden_states": torch.zeros(3, 16)}
MASK = {"encoder_attention_mask": torch.ones(3)}
POOLED = {"pooled_projections": torch.zeros(16)}


def network(name: str) -> nn.Module:
    case = PIPELINES[name]
    return copy.deepcopy(getattr(case.build(), case.network))


MODELS = {
    "pixel": lambda: PixelDenoiser(tiny_unet(11), VP, "v_prediction"),
    "sd": lambda: UNetConditionDenoiser(network("sd"), VP, "epsilon", TEXT),
    "pixart": lambda: PixArtDenoiser(network("pixart"), VP, "epsilon", TEXT | MASK),
    "sd3": lambda: SD3Denoiser(network("sd3"), Flow(), "flow_prediction", TEXT | POOLED),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def inputs(model, count=3):
    """x_t, t and a condition that is not the empty one."""
    x = torch.randn(count, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    condition = model.null_condition(count)
    if "class_labels" in condition:
        condition = {"class_labels": torch.arange(count)}
    else:
        states = {key: rows(count, *value.shape[1:]) for key, value in condition.items() if "mask" not in key}
        condition = dict(condition) | states
    return x, torch.linspace(100, 900, count), condition


def trained(adapter, steps=2):
    """The adapter after a few gradient steps of a loss that moves every layer."""
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    for _ in range(steps):
        adapter(*inputs(adapter)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter


def vector(module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


@torch.no_grad()
def output(model) -> torch.Tensor:
    return model(*inputs(model))


@every_model
def test_an_adapter_starts_as_the_teacher_and_changes_nobody_else(make):
    teacher = make()
    before, names = output(teacher), set(teacher.state_dict())
    shared = SharedBase(teacher, AdapterConfig(rank=2))
    student, critic = shared.adapter("student"), shared.adapter("critic")
    for model in (shared.teacher, student, critic):
        assert torch.equal(output(model), before)
    assert {
        name.replace(".base_layer", "") for name in shared.teacher.state_dict()
    } == names  # adapters are no part of it

    other, base = vector(critic), vector(shared.teacher)
    trained(student)
    assert (output(student) - before).abs().max() > 1e-3
    assert torch.equal(output(shared.teacher), before) and torch.equal(output(critic), before)
    assert torch.equal(vector(critic), other) and torch.equal(vector(shared.teacher), base)
    assert all(parameter.grad is None for parameter in shared.teacher.parameters())
    idle = [name for name, pair in student._pairs.items() if not pair.lora_B.weight.any()]
    assert all(name.endswith("add_q_proj") for name in idle)  # the last layer of SD3 asks nothing for the text


@every_model
def test_every_way_to_call_an_adapter_uses_it(make):
    student = trained(SharedBase(make(), AdapterConfig(rank=2)).adapter("student"))
    teacher, (x, t, condition) = student.base.teacher, inputs(student)
    plain = copy.copy(teacher)  # the same denoiser around a network with the adapter folded in
    plain._modules = dict(teacher._modules, net=student.merged())
    calls = {
        "forward": lambda model: model(x, t, condition),
        "predict": lambda model: model.predict(x, t, condition),
        "features": lambda model: model.forward_with_features(x, t, condition)[1][-1],
        "error": lambda model: model.denoising_error(x, t, x.flip(0), condition),
        "guided": lambda model: Guided(model, 3.0)(x, t, condition),
    }
    for call in calls.values():
        with torch.no_grad():
            check_close(call(student), call(plain), 1e-4)
            assert (call(student) - call(teacher)).abs().max() > 1e-3


def test_initial_weights_are_keyed_by_seed_and_name():
    shared = SharedBase(MODELS["pixel"](), AdapterConfig(rank=2), seed=3)
    one = vector(shared.adapter("student"))
    assert torch.equal(one, vector(SharedBase(MODELS["pixel"](), AdapterConfig(rank=2), seed=3).adapter("student")))
    assert not torch.equal(one, vector(shared.adapter("critic")))
    assert not torch.equal(one, vector(SharedBase(MODELS["pixel"](), AdapterConfig(rank=2)).adapter("student")))
    for pair in shared.adapter("student")._pairs.values():  # those of torch's own linear layers
        bound = pair.lora_A.weight[0].numel() ** -0.5
        assert 0.8 * bound < pair.lora_A.weight.abs().max() <= bound and not pair.lora_B.weight.any()


def test_a_deep_copy_is_one_more_adapter_and_the_moving_average_works():
    student = SharedBase(MODELS["pixel"](), AdapterConfig(rank=2)).adapter("student")
    average, before = EMA(student, 0.5), output(student)
    assert average.module.base is student.base and not any(p.requires_grad for p in average.module.parameters())
    trained(student)
    assert torch.equal(output(average.module), before)
    average.update(student, step=0)
    expected = 0.9 * vector(student) + 0.1 * vector(student.base.adapter("student"))
    torch.testing.assert_close(vector(average.module), expected)
    again = student.base.adapter("other")
    again.load_state_dict(student.state_dict())
    assert torch.equal(output(again), output(student))


@pytest.mark.parametrize("make", [MODELS["sd"], MODELS["sd3"]], ids=["sd", "sd3"])
def test_checkpointed_gradients_are_those_of_the_adapter_of_the_forward_pass(make):
    def gradients(checkpointing: bool) -> torch.Tensor:
        shared = SharedBase(make(), AdapterConfig(rank=2))
        student, critic = trained(shared.adapter("student")), trained(shared.adapter("critic"), steps=4)
        if checkpointing:
            student.net.enable_gradient_checkpointing()
        x, t, condition = inputs(student)
        x.requires_grad_()
        x0, features = student.forward_with_features(x, t, condition)
        seen = shared.teacher(x0, t, condition)  # as an adversarial loss looks through the teacher
        critic(x.detach(), t, condition)  # another adapter is in the network between forward and backward
        loss = x0.square().mean() + seen.square().mean() + features[-1].square().mean()
        with shared.selected(None):
            loss.backward()
        assert all(parameter.grad is None for parameter in critic.parameters())
        return torch.cat([p.grad.flatten() for p in [x, *student.parameters()]])

    plain = gradients(False)
    assert plain.abs().max() > 1e-3
    check_close(gradients(True), plain, 1e-6)


def test_the_network_is_the_teacher_again_after_an_error():
    shared = SharedBase(MODELS["pixel"](), AdapterConfig(rank=2))
    student, before = trained(shared.adapter("student")), output(shared.teacher)
    with pytest.raises(RuntimeError):
        student(torch.zeros(2, 3, 8, 8), torch.zeros(2), {"class_labels": torch.zeros(2, dtype=torch.long)})
    assert torch.equal(output(shared.teacher), before)
    with pytest.raises(UsageError, match="teacher"):
        shared.teacher.requires_grad_(True)
        student(*inputs(student))


def test_alpha_scales_and_merging_and_loading_agree_with_it():
    case = PIPELINES["sd"]
    pipe = copy.deepcopy(case.build("ddim"))
    shared = SharedBase(UNetConditionDenoiser(pipe.unet, VP, "epsilon", TEXT), AdapterConfig(rank=2, alpha=6.0))
    student = trained(shared.adapter("student"))
    plain, stock = copy.deepcopy(case.build("ddim")), copy.deepcopy(case.build("ddim"))
    untrained = case.call(plain)
    plain.unet = student.merged()
    assert set(plain.unet.state_dict()) == set(stock.unet.state_dict())
    stock.load_lora_weights({f"unet.{key}": value for key, value in student.lora_state().items()})
    check_close(case.call(stock), case.call(plain), 1e-5)
    assert (case.call(plain) - untrained).abs().max() > 1e-2
    assert torch.equal(case.call(pipe), untrained)  # at rest, the shared network is the teacher's own


def test_a_base_in_half_precision_keeps_single_precision_adapters():
    shared = SharedBase(MODELS["sd"](), AdapterConfig(rank=2, base_dtype="bfloat16"))
    student, before = shared.adapter("student"), output(shared.teacher)
    assert before.dtype == torch.float32 and torch.equal(output(student), before)
    trained(student)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert {p.dtype for p in shared.teacher.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in student.merged().parameters()} == {torch.float32}  # as the pipeline that it goes into
    assert not torch.equal(output(student), before)


def test_targets():
    unet = find_targets(MODELS["sd"]().net)
    assert {"to_q", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "time_emb_proj"} <= set(unet)
    assert "add_q_proj" in find_targets(MODELS["sd3"]().net) and "add_q_proj" not in unet
    few = SharedBase(MODELS["sd"](), AdapterConfig(rank=2, targets=("attn1.to_q",)))
    assert few.layers and all(name.endswith("attn1.to_q") for name in few.layers)
    with pytest.raises(UsageError, match="Did you mean 'to_q'"):
        SharedBase(MODELS["sd"](), AdapterConfig(targets=("to_qq",)))
    with pytest.raises(UsageError, match="already"):
        SharedBase(few.teacher)
    with pytest.raises(UsageError, match=r"adapters\.targets"):
        find_targets(nn.Sequential(nn.Linear(2, 2)))


def test_settings_that_cannot_be(monkeypatch):
    for wrong in ({"rank": 0}, {"alpha": -1.0}, {"base_dtype": "float16"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            AdapterConfig(**wrong)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'diffaccel\[lora\]'"):
        SharedBase(MODELS["pixel"]())
