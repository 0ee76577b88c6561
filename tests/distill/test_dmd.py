"""Gradients, identities and bookkeeping of dmd and f-distill."""

import pytest
import torch
from distilling import draw, tiny_task, trained, weights
from torch import nn

from diffaccel.core.errors import UsageError
from diffaccel.core.rng import KeyedRandom
from diffaccel.distill.methods.dmd import DMD
from diffaccel.distill.methods.f_distill import BINS, FDistill
from diffaccel.distill.methods.sid import SiD
from diffaccel.distill.registry import METHODS
from diffaccel.distill.run import build_task, resolve_distillation
from diffaccel.models.teachers import load_pipeline


@pytest.mark.parametrize("weighting", ["normalized", "uniform", "vsd", "score"])
def test_the_student_gradient_is_the_weighted_score_difference(weighting):
    method = DMD(tiny_task(), DMD.Config(weighting=weighting))
    with torch.no_grad():
        for parameter in method.roles["critic"].parameters():
            parameter.mul_(1.3)
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    method.generate = lambda *arguments: x
    phase, sample = method.phases(0)[1], draw()
    method.loss(phase, sample).total.backward()
    t = method.schedule.time(0.02 + 0.96 * sample.stratified("time"))
    alpha, sigma = (value.float().reshape(-1, 1, 1, 1) for value in method.schedule.level(t))
    with torch.no_grad():
        x_t = alpha * x + sigma * sample.normal("eps", (1, 8, 8))
        condition = method.conditions.at(method.conditions.draw(sample))
        real, fake = method.teacher(x_t, t, condition), method.roles["critic"](x_t, t, condition)
        weight = {
            "normalized": 1.0 / ((x - real).abs().mean((1, 2, 3), keepdim=True) + 1e-6),
            "uniform": torch.ones_like(alpha),
            "vsd": alpha * sigma,
            "score": alpha**2 / sigma**2,
        }[weighting]
        expected = weight * (fake - real) / x.numel()
    assert torch.allclose(x.grad, expected, rtol=1e-4, atol=1e-7)
    assert x.grad.abs().max() > 0


def test_sid_moves_samples_through_teacher_and_critic():
    """The gradient of SiD's loss, by differentiating its formula as it stands in the paper."""
    method = SiD(tiny_task(), SiD.Config(alpha=0.7))
    with torch.no_grad():
        for parameter in method.roles["critic"].parameters():
            parameter.mul_(1.3)
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    method.generate = lambda *arguments: x
    sample = draw()
    method.loss(method.phases(0)[1], sample).total.backward()
    found, x.grad = x.grad, None
    t = method.schedule.time(0.02 + 0.78 * sample.stratified("time"))
    condition = method.conditions.at(method.conditions.draw(sample))
    x_t = method.teacher.noised(x, t, sample.normal("eps", (1, 8, 8)))
    real, fake = method.teacher(x_t, t, condition), method.roles["critic"](x_t, t, condition)
    terms = (1 - 0.7) * (real - fake) ** 2 + (real - fake) * (fake - x)  # equation 23
    weight = 1.0 / ((x - real).detach().abs().mean((1, 2, 3), keepdim=True) + 1e-6)
    (weight * terms).mean().backward()
    assert torch.allclose(found, x.grad, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        direct = weight * (fake - x) / x.numel()
    assert (found - direct).abs().max() > 1e-5  # more than the path beside the networks


def test_critic_equal_to_teacher_means_no_student_gradient(tmp_path):
    method = DMD(tiny_task(), DMD.Config())
    method.loss(method.phases(0)[1], draw()).total.backward()
    gradient = torch.cat([p.grad.flatten() for p in method.roles["student"].parameters() if p.grad is not None])
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("gan_weight", [0.0, 0.01])
def test_f_distill_with_reverse_kl_is_dmd(tmp_path, gan_weight):
    real = tiny_task(data=gan_weight > 0)
    base = trained(DMD(real, DMD.Config(gan_weight=gan_weight)), tmp_path / "dmd", steps=20)
    config = FDistill.Config(divergence="reverse-kl", gan_weight=gan_weight)
    other = trained(FDistill(real, config), tmp_path / "f", steps=20)
    assert set(base.roles) == set(other.roles)
    assert torch.allclose(weights(base), weights(other), atol=1e-5)
    assert (weights(base) - nn.utils.parameters_to_vector(base.teacher.parameters())).abs().max() > 1e-3


def test_f_distill_with_reverse_kl_is_dmd_on_the_digits_teacher(tmp_path):
    results = []
    for method_class, config in ((DMD, DMD.Config()), (FDistill, FDistill.Config(divergence="reverse-kl"))):
        settings = resolve_distillation({"teacher": "digits"})
        method = method_class(build_task(settings), config)
        results.append(weights(trained(method, tmp_path / method_class.__name__, steps=20, batch_size=16)))
    assert (results[0] - results[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("divergence", ["js", "forward-kl"])
def test_accumulation_changes_nothing_beyond_rounding(tmp_path, divergence):
    # AdamW divides by the root of the second moment: rounding in near-zero gradients moves weights by up to lr.
    config = FDistill.Config(divergence=divergence, gan_weight=0.01, r1_weight=0.5)
    whole = FDistill(tiny_task(data=True), config)
    parts = FDistill(tiny_task(data=True), config)
    gradients = []
    for method, micro in ((whole, 1), (parts, 4)):
        trained(method, tmp_path / str(micro), steps=1, micro_batches=micro)
        gradients.append(torch.cat([method.ratio_means, method.weight_mean[None]]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)
    assert (weights(whole) - weights(parts)).abs().mean() < 1e-6


def test_running_means_come_to_one_for_the_exact_ratio():
    """E_q[p_t/q_t] = 1 at every time; p, q Gaussians of the same family, the logit is the exact log-ratio."""
    method = FDistill(tiny_task(data=True), FDistill.Config(normalizer_decay=0.98))
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
    method = FDistill(tiny_task(data=True), FDistill.Config(divergence="forward-kl", normalizer_decay=0.0))
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
    method = trained(DMD(tiny_task(), DMD.Config(critic_warmup=3)), tmp_path / "run", steps=3)
    start = nn.utils.parameters_to_vector(method.teacher.parameters())
    assert torch.equal(weights(method), start)
    assert not torch.equal(weights(method, "critic"), start)
    assert [phase.name for phase in method.phases(2)] == ["critic"]
    assert [phase.name for phase in method.phases(3)] == ["critic", "student"]


def test_the_teacher_is_never_trained(tmp_path):
    config = FDistill.Config(divergence="js", gan_weight=0.1)
    method = FDistill(tiny_task(data=True), config)
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
@pytest.mark.parametrize("steps", [1, 3])
def test_the_exported_pipeline_is_the_trained_generator(tmp_path, odd, steps):
    task = build_task(resolve_distillation({"teacher": "digits"}))
    config = {**task.pipeline.scheduler.config, **odd}
    config.pop("_use_default_values", None)
    task.pipeline.scheduler = type(task.pipeline.scheduler).from_config(config)
    method = DMD(task, DMD.Config(student_steps=steps))
    student = method.roles["student"].eval()
    method.export(student, tmp_path / "final")
    noise, labels = KeyedRandom(0).normal("z", 0, 0, 6, (1, 8, 8)), torch.arange(6)
    pipe = load_pipeline(tmp_path / "final")
    images = pipe(class_labels=labels, noise=noise, output_type="pt", generator=torch.Generator().manual_seed(1)).images
    renoise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        condition = {"class_labels": labels}
        expected = method.generate(student, noise, condition, lambda step: torch.randn(6, 1, 8, 8, generator=renoise))
    assert torch.allclose(images, expected, atol=1e-5)


def test_a_student_of_several_steps_is_trained_on_states_of_its_own():
    method = DMD(tiny_task(), DMD.Config(student_steps=4))
    seen = []
    method.roles["student"].forward = lambda x_t, t, condition: seen.append((float(t[0]), x_t)) or 0.5 * x_t
    for step in range(8):
        sample, before = draw(step=step), len(seen)
        x, _ = method.student_sample(sample, grad=True)
        times, states = zip(*seen[before:], strict=True)
        assert times == method.steps.times[: len(times)]
        state = sample.normal("latent", (1, 8, 8))
        for index, (t, given) in enumerate(zip(times, states, strict=True)):
            assert torch.allclose(given, state, atol=1e-6)
            if t != times[-1]:
                alpha, sigma = method.teacher.level(torch.tensor([method.steps.times[index + 1]]))
                state = alpha * 0.5 * state + sigma * sample.normal(f"renoise{index}", (1, 8, 8))
        assert torch.allclose(x, 0.5 * state, atol=1e-6)
    assert {t for t, _ in seen} == set(method.steps.times)


@pytest.mark.parametrize("preset", METHODS["dmd"].presets)
def test_every_preset_trains_its_student(tmp_path, preset):
    settings = DMD.Config(
        **METHODS["dmd"].presets[preset] | {"regression_pairs": 16, "regression_steps": 2, "critic_steps": 1}
    )
    method = trained(DMD(tiny_task(data=True), settings), tmp_path / "run", steps=2)
    start = nn.utils.parameters_to_vector(method.teacher.parameters())
    assert not torch.equal(weights(method), start) and weights(method).isfinite().all()
    assert ("critic" in method.roles) == (preset != "ladd")
    assert ("discriminator" in method.roles) == (preset in ("dmd2", "ladd"))


def test_log_normal_times_are_log_normal():
    method = DMD(tiny_task(), DMD.Config(time_sampling="log-normal", time_mean=-0.5, time_std=0.8))
    _, t = method.times(draw(count=4000), "time")
    log_rho = method.schedule.rho(t).log()
    assert float(log_rho.mean()) == pytest.approx(-0.5, abs=0.01)
    assert float(log_rho.std()) == pytest.approx(0.8, abs=0.02)


def test_guidance_needs_an_empty_condition():
    with pytest.raises(UsageError, match="guidance_scale"):
        DMD(tiny_task(embeddings=None), DMD.Config(guidance_scale=2.0))


def test_a_discriminator_needs_data():
    with pytest.raises(UsageError, match="--data"):
        FDistill(tiny_task(), FDistill.Config())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"critic_steps": 0}, "critic_steps"),
        ({"time_range": (0.9, 0.1)}, "time_range"),
        ({"gan_weight": -1.0}, "gan_weight"),
        ({"gan_loss": "wasserstein"}, "gan_loss"),
        ({"weighting": "normal"}, "weighting"),
        ({"distribution_weight": 0.0}, "losses"),
        ({"student_steps": 0}, "student_steps"),
        ({"student_start": 0.0}, "student_start"),
        ({"divergence": "kl"}, "divergence"),
        ({"ratio_range": (0.0, 1.0)}, "ratio_range"),
        ({"normalizer_decay": 1.0}, "normalizer_decay"),
    ],
)
def test_impossible_settings_are_named(change, word):
    with pytest.raises(UsageError, match=word):
        FDistill.Config(**change)
