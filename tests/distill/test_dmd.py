"""Gradients, identities and bookkeeping of dmd and f-distill."""

import pytest
import torch
from networks import tiny_unet
from torch import nn

from diffaccel.core.errors import UsageError
from diffaccel.core.rng import KeyedRandom
from diffaccel.core.schedule import VPDiscrete
from diffaccel.distill.methods.dmd import DMD
from diffaccel.distill.methods.f_distill import BINS, FDistill
from diffaccel.models.data import load_images
from diffaccel.models.pixel import PixelDenoiser
from diffaccel.models.teachers import denoiser_of, load_pipeline
from diffaccel.training.config import OptimizerConfig, TrainerConfig
from diffaccel.training.method import Draw
from diffaccel.training.rundir import RunDirectory
from diffaccel.training.trainer import Trainer

CPU = torch.device("cpu")


def teacher() -> PixelDenoiser:
    schedule = VPDiscrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0))
    return PixelDenoiser(tiny_unet(11), schedule, "v_prediction")


def data():
    return load_images("digits", 1, (8, 8), 10)


def trained(method, folder, steps=5, batch_size=8, **changes) -> DMD:
    rates = {name: OptimizerConfig(lr=1e-3, betas=(0.0, 0.99)) for name in method.roles}
    config = TrainerConfig(steps=steps, batch_size=batch_size, optimizers=rates, device="cpu", **changes)
    trainer = Trainer(method, config, RunDirectory(folder, {}), progress=False)
    while trainer.step < steps:
        trainer._train_step()
        trainer.step += 1
    return method


def weights(method, role="student") -> torch.Tensor:
    return nn.utils.parameters_to_vector(method.roles[role].parameters()).detach()


def draw(count=6, step=0) -> Draw:
    return Draw(KeyedRandom(0), "student/0", step, 0, count, count, CPU)


def test_the_student_gradient_is_the_normalised_score_difference():
    method = DMD(teacher(), {}, None, DMD.Config())
    with torch.no_grad():
        for parameter in method.roles["critic"].parameters():
            parameter.mul_(1.3)
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    method.generate = lambda model, noise, condition: x
    phase, sample = method.phases(0)[1], draw()
    method.loss(phase, sample).total.backward()
    u = 0.02 + 0.96 * sample.stratified("time")
    t = method.schedule.time(u)
    with torch.no_grad():
        x_t = method.teacher.noised(x, t, sample.normal("eps", (1, 8, 8)))
        condition = method.conditions(sample)
        real, fake = method.teacher(x_t, t, condition), method.roles["critic"](x_t, t, condition)
        expected = (fake - real) / ((x - real).abs().mean((1, 2, 3), keepdim=True) + 1e-6) / x.numel()
    assert torch.allclose(x.grad, expected, atol=1e-7)
    assert x.grad.abs().max() > 0


def test_critic_equal_to_teacher_means_no_student_gradient(tmp_path):
    method = DMD(teacher(), {}, None, DMD.Config())
    method.loss(method.phases(0)[1], draw()).total.backward()
    gradient = torch.cat([p.grad.flatten() for p in method.roles["student"].parameters() if p.grad is not None])
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("gan_weight", [0.0, 0.01])
def test_f_distill_with_reverse_kl_is_dmd(tmp_path, gan_weight):
    real = data() if gan_weight else None
    base = trained(DMD(teacher(), {}, real, DMD.Config(gan_weight=gan_weight)), tmp_path / "dmd", steps=20)
    config = FDistill.Config(divergence="reverse-kl", gan_weight=gan_weight)
    other = trained(FDistill(teacher(), {}, real, config), tmp_path / "f", steps=20)
    assert set(base.roles) == set(other.roles)
    assert torch.allclose(weights(base), weights(other), atol=1e-5)
    assert (weights(base) - nn.utils.parameters_to_vector(base.teacher.parameters())).abs().max() > 1e-3


def test_f_distill_with_reverse_kl_is_dmd_on_the_digits_teacher(tmp_path):
    results = []
    for method_class, config in ((DMD, DMD.Config()), (FDistill, FDistill.Config(divergence="reverse-kl"))):
        pipeline = load_pipeline("digits")
        method = method_class(denoiser_of(pipeline), dict(pipeline.scheduler.config), None, config)
        results.append(weights(trained(method, tmp_path / method_class.__name__, steps=20, batch_size=16)))
    assert (results[0] - results[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("divergence", ["js", "forward-kl"])
def test_accumulation_changes_nothing_beyond_rounding(tmp_path, divergence):
    # AdamW divides by the root of the second moment: rounding in near-zero gradients moves weights by up to lr.
    config = FDistill.Config(divergence=divergence, gan_weight=0.01, r1_weight=0.5)
    whole = FDistill(teacher(), {}, data(), config)
    parts = FDistill(teacher(), {}, data(), config)
    gradients = []
    for method, micro in ((whole, 1), (parts, 4)):
        trained(method, tmp_path / str(micro), steps=1, micro_batches=micro)
        gradients.append(torch.cat([method.ratio_means, method.weight_mean[None]]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)
    assert (weights(whole) - weights(parts)).abs().mean() < 1e-6


def test_running_means_come_to_one_for_the_exact_ratio():
    """E_q[p_t/q_t] = 1 at every time; p, q Gaussians of the same family, the logit is the exact log-ratio."""
    method = FDistill(teacher(), {}, data(), FDistill.Config(normalizer_decay=0.98))
    random = KeyedRandom(3)
    for step in range(400):
        u = 0.02 + 0.96 * random.uniform("u", step, 0, 256)
        alpha, sigma = (value.float() for value in method.schedule.level(method.schedule.time(u)))
        std_p, std_q = (alpha**2 * 0.8**2 + sigma**2).sqrt(), (alpha**2 + sigma**2).sqrt()
        x = std_q * random.normal("x", step, 0, 256)
        logit = torch.log(std_q / std_p) - 0.5 * (x / std_p) ** 2 + 0.5 * (x / std_q) ** 2
        method.sample_weight(u, logit, {})
        method.end_phase(method.phases(0)[1], lambda value: value)
    assert method.ratio_means.shape == (BINS,)
    assert (method.ratio_means - 1.0).abs().max() < 0.05


def test_a_constant_error_of_the_logit_is_calibrated_away():
    method = FDistill(teacher(), {}, data(), FDistill.Config(divergence="forward-kl", normalizer_decay=0.0))
    logit = torch.linspace(-1.0, 1.0, 64)
    u = torch.full((64,), 0.5)
    results = []
    for shift in (0.0, 1.5):
        for _ in range(3):  # the means used are those of the update before, and h follows r
            weight = method.sample_weight(u, logit + shift, {})
            method.end_phase(method.phases(0)[1], lambda value: value)
        results.append(weight)
    assert torch.allclose(results[0], results[1], rtol=1e-4)
    assert results[0].mean() == pytest.approx(1.0, rel=1e-4)


def test_during_critic_warm_up_the_student_rests(tmp_path):
    method = trained(DMD(teacher(), {}, None, DMD.Config(critic_warmup=3)), tmp_path / "run", steps=3)
    start = nn.utils.parameters_to_vector(method.teacher.parameters())
    assert torch.equal(weights(method), start)
    assert not torch.equal(weights(method, "critic"), start)
    assert [phase.name for phase in method.phases(2)] == ["critic"]
    assert [phase.name for phase in method.phases(3)] == ["critic", "student"]


def test_the_teacher_is_never_trained(tmp_path):
    config = FDistill.Config(divergence="js", gan_weight=0.1)
    method = FDistill(teacher(), {}, data(), config)
    before = nn.utils.parameters_to_vector(method.teacher.parameters()).clone()
    trained(method, tmp_path / "run", steps=3)
    assert torch.equal(before, nn.utils.parameters_to_vector(method.teacher.parameters()))
    assert not any(p.requires_grad or p.grad is not None for p in method.teacher.parameters())


@pytest.mark.parametrize(
    "odd",
    [{}, {"clip_sample": True}, {"thresholding": True}, {"timestep_spacing": "leading"}, {"grid": "leading"},
     {"final_sigmas_type": "sigma_min"}, {"use_karras_sigmas": True}],
    ids=str,
)  # fmt: skip
def test_the_exported_pipeline_is_the_trained_generator(tmp_path, odd):
    config = {**load_pipeline("digits").scheduler.config, **odd}
    config.pop("_use_default_values", None)
    method = DMD(teacher(), config, None, DMD.Config())
    student = method.roles["student"].eval()
    method.export(student, tmp_path / "final")
    noise, labels = KeyedRandom(0).normal("z", 0, 0, 6, (1, 8, 8)), torch.arange(6)
    images = load_pipeline(tmp_path / "final")(class_labels=labels, noise=noise, output_type="pt").images
    with torch.no_grad():
        expected = method.generate(student, noise, {"class_labels": labels})
    assert torch.allclose(images, expected, atol=1e-5)


def test_guidance_needs_classes():
    unconditional = PixelDenoiser(tiny_unet(None), teacher().schedule, "v_prediction")
    with pytest.raises(UsageError, match="guidance_scale"):
        DMD(unconditional, {}, None, DMD.Config(guidance_scale=2.0))


def test_a_discriminator_needs_data():
    with pytest.raises(UsageError, match="--data"):
        FDistill(teacher(), {}, None, FDistill.Config())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"critic_steps": 0}, "critic_steps"),
        ({"time_range": (0.9, 0.1)}, "time_range"),
        ({"gan_weight": -1.0}, "gan_weight"),
        ({"divergence": "kl"}, "divergence"),
        ({"ratio_range": (0.0, 1.0)}, "ratio_range"),
        ({"normalizer_decay": 1.0}, "normalizer_decay"),
    ],
)
def test_impossible_settings_are_named(change, word):
    with pytest.raises(UsageError, match=word):
        FDistill.Config(**change)
