"""8-bit moments, activations computed again, bfloat16: less memory, and what each may and may not change."""

import sys
from types import ModuleType

import pytest
import torch
from diffusers import UNet2DModel
from networks import tiny_unet
from regression import settings, trained, vector
from torch import nn

from diffaccel.core.errors import UsageError
from diffaccel.core.schedule import VPLinear
from diffaccel.models.pixel import PixelDenoiser
from diffaccel.training.method import Loss, Method, Phase
from diffaccel.training.optimizers import optimizer_tensors
from diffaccel.training.rundir import RunDirectory
from diffaccel.training.trainer import Trainer


class AdamW8bit(torch.optim.Optimizer):
    """Adam with state like that of bitsandbytes: bytes, one table of levels for all, scales, a plain number of steps."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.levels = torch.linspace(-1.0, 1.0, 256)

    def state_dict(self):
        state = super().state_dict()
        state["state"] = {key: {"nested": value} for key, value in state["state"].items()}
        return state

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state.update(step=0, factor=1.0, qmap1=self.levels, qmap2=self.levels)
                    state.update({f"state{i}": torch.full_like(p, 128, dtype=torch.uint8) for i in (1, 2)})
                    state.update({f"absmax{i}": torch.zeros(1) for i in (1, 2)})
                assert type(state["step"]) is int and type(state["factor"]) is float
                state["step"] += 1
                moments = []
                for i, (beta, new) in enumerate(zip(group["betas"], (p.grad, p.grad**2), strict=True), 1):
                    old = state[f"qmap{i}"][state[f"state{i}"].long()] * state[f"absmax{i}"]
                    moment = torch.lerp(new, old, beta)
                    state[f"absmax{i}"] = moment.abs().max().reshape(1)
                    bins = (moment / state[f"absmax{i}"] * 127.5 + 127.5).round()
                    state[f"state{i}"] = bins.to(torch.uint8)
                    moments.append(moment / (1 - beta ** state["step"]))
                p -= group["lr"] * state["factor"] * moments[0] / (moments[1].abs().sqrt() + 1e-8)


@pytest.fixture
def bitsandbytes(monkeypatch):
    module = ModuleType("bitsandbytes.optim")
    module.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_8_bit_moments_resume_without_changing_a_bit(tmp_path, bitsandbytes):
    config = settings(eight_bit=True)
    straight = trained(tmp_path / "straight", config=config)
    trained(tmp_path / "parts", config=config, stop_after=5)
    resumed = trained(tmp_path / "parts", config=config, resume=True)
    assert torch.equal(vector(straight), vector(resumed))
    assert not torch.equal(vector(straight), vector(trained(tmp_path / "other")))
    tensors = optimizer_tensors(resumed.optimizers["model"])
    assert tensors["0.state1"].dtype == torch.uint8 and tensors["1.step:number"] == 12
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)


def test_8_bit_state_of_another_model_is_passed_over(tmp_path, bitsandbytes, capsys):
    from test_checkpoints import replace

    config = settings(eight_bit=True)
    trained(tmp_path / "run", config=config, stop_after=4)
    trained(tmp_path / "run", config=config, resume=True, stop_after=7)
    replace(tmp_path / "run", "model.optimizer", {"0.state2": None})
    assert trained(tmp_path / "run", config=config, resume=True, stop_after=5).step == 5
    assert "0.state2 is missing" in capsys.readouterr().err


class Denoising(Method):
    """One denoising loss of a tiny U-Net."""

    main_role = "model"

    def __init__(self, net: nn.Module | None = None):
        self.roles = {"model": PixelDenoiser(net or tiny_unet(), VPLinear(), "epsilon")}

    def phases(self, step):
        return [Phase("fit", ("model",))]

    def loss(self, phase, draw):
        model = self.roles["model"]
        x0, eps, t = draw.normal("x0", (1, 8, 8)), draw.normal("eps", (1, 8, 8)), 0.1 + 0.8 * draw.uniform("t")
        labels = {"class_labels": draw.integers("labels", 4)}
        self.dtype = model.predict(x0, t, labels).dtype
        return Loss(model.denoising_error(x0, t, eps, labels).mean())

    def samples(self, model, random):
        return None

    def export(self, model, folder):
        pass


def gradients(folder, method: Method, **changes) -> list[torch.Tensor]:
    trainer = Trainer(method, settings(**changes), RunDirectory(folder, {}), progress=False)
    (draw,) = trainer._draws(Phase("fit", ("model",)), 0)
    with trainer.accelerator.autocast():
        method.loss(None, draw).total.backward()
    return [parameter.grad for parameter in method.roles["model"].parameters()]


def test_activations_computed_again_give_the_same_gradients(tmp_path):
    calls = {False: 0, True: 0}
    found = []
    for again in calls:
        method = Denoising()

        def count(*_, again=again):
            calls[again] += 1

        method.roles["model"].net.down_blocks[0].resnets[0].register_forward_pre_hook(count)
        found.append(gradients(tmp_path / str(again), method, gradient_checkpointing=again))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert calls == {False: 2, True: 3}  # two evaluations; that with a backward pass once more


def test_networks_that_cannot_compute_again_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(UNet2DModel, "_supports_gradient_checkpointing", False)
    with pytest.raises(UsageError, match=r"model, a UNet2DModel, cannot.*gradient_checkpointing"):
        gradients(tmp_path / "unet", Denoising(), gradient_checkpointing=True)
    with pytest.raises(UsageError, match="no network"):
        trained(tmp_path / "linear", config=settings(gradient_checkpointing=True))


def test_a_step_in_bfloat16_leaves_weights_and_moments_in_single_precision(tmp_path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # one precision a process
    try:
        method = Denoising(tiny_unet().to(torch.bfloat16))
        trainer = Trainer(method, settings(precision="bf16"), RunDirectory(tmp_path / "run", {}), progress=False)
        before = nn.utils.parameters_to_vector(method.roles["model"].parameters()).detach().clone()
        trainer._train_step()
    finally:
        AcceleratorState._reset_state()
    after = nn.utils.parameters_to_vector(method.roles["model"].parameters())
    assert method.dtype == torch.bfloat16 and before.dtype == after.dtype == torch.float32
    assert not torch.equal(before, after) and torch.isfinite(after).all()
    moments = [value for name, value in optimizer_tensors(trainer.optimizers["model"]).items() if "exp_avg" in name]
    assert {moment.dtype for moment in moments} == {torch.float32}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
