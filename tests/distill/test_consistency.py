"""Sub-steps of teachers, the consistency loss against LCM's own formulas, the target network, faults."""

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from networks import tiny_unet
from torch import nn

from diffaccel.core.errors import UsageError
from diffaccel.core.rng import KeyedRandom
from diffaccel.core.schedule import EDM, VE, Flow, VPDiscrete
from diffaccel.distill.adapters import AdapterConfig, SharedBase
from diffaccel.distill.methods.consistency import Consistency
from diffaccel.distill.substeps import FAMILIES, noise_share, solve_between, substep
from diffaccel.distill.task import Task
from diffaccel.models.conditions import ClassConditions
from diffaccel.models.data import load_images
from diffaccel.models.denoiser import Guided
from diffaccel.models.pixel import PixelDenoiser
from diffaccel.testing import GaussianTeacher
from diffaccel.training.config import OptimizerConfig, TrainerConfig
from diffaccel.training.method import Draw, Phase
from diffaccel.training.rundir import RunDirectory
from diffaccel.training.trainer import Trainer

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
VP = VPDiscrete(torch.cumprod(1 - BETAS, 0))
SCHEDULES = [VP, VE(0.01, 10.0), EDM(), Flow()]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
CPU = torch.device("cpu")
STUDENT = Phase("student", ("student",))
SCOTT = {"grid_steps": 10, "substeps": 2, "eta": 0.3, "adversarial_weight": 0.4, "student_steps": 2}


def teacher() -> PixelDenoiser:
    return PixelDenoiser(tiny_unet(11), VP, "v_prediction")


def task(**changes) -> Task:
    given = {"teacher": None, "data": load_images("digits", 1, (8, 8), 10)} | changes
    given["teacher"] = given["teacher"] or teacher()
    return Task(conditions=ClassConditions(10), **given)


def consistency(**settings) -> Consistency:
    return Consistency(task(), Consistency.Config(**settings))


def trainer(method, folder, resume=False, **changes) -> Trainer:
    rates = {name: OptimizerConfig(lr=1e-3) for name in method.roles}
    config = TrainerConfig(
        **{"batch_size": 8, "steps": 100, "optimizers": rates, "device": "cpu", "checkpoint_every": 0} | changes
    )
    return Trainer(method, config, RunDirectory(folder, {}, resume), progress=False)


def trained(method, folder, steps, **changes) -> Trainer:
    loop = trainer(method, folder, **changes)
    for _ in range(steps):
        loop._train_step()
        loop.step += 1
    return loop


def weights(model) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def draw(count=8, step=0, stream="student/0") -> Draw:
    return Draw(KeyedRandom(0), stream, step, 0, count, count, CPU)


# Sub-steps.


@every_schedule
def test_noise_has_the_closed_forms_of_ddim_er_sde_and_ctm(schedule):
    """The mean and the variance of x'/α' given x and x̂0, in terms of noise-to-signal ratios."""
    t, t_next = schedule.time(torch.tensor([0.3, 0.6, 0.98])), schedule.time(torch.tensor([0.1, 0.55, 0.9]))
    rho, rho_next = schedule.rho(t), schedule.rho(t_next)
    alpha, alpha_next = schedule.alpha(t), schedule.alpha(t_next)
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)

    def coefficients(eta, family):
        """In x'/α': of x/α − x̂0, of x̂0 (when x/α = x̂0), of the noise."""
        inputs = ((alpha, zero, zero), (alpha, one, zero), (zero, zero, one))
        return [substep(schedule, x, x0, t, t_next, eta, family, noise) / alpha_next for x, x0, noise in inputs]

    def phi(family, r):
        powers = {"ddim": 2.0, "er-sde-1.5": 1.5, "er-sde-2.5": 2.5}
        return r ** powers[family] if family in powers else r * (torch.exp(r**0.3) + 10.0)

    for eta in (0.0, 0.3, 1.0):
        of_x, of_both, of_noise = coefficients(eta, "ddim")
        variance = eta**2 * rho_next**2 * (rho**2 - rho_next**2) / rho**2
        torch.testing.assert_close(of_noise, variance.sqrt(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(of_both, one)  # a clean sample stays where it is
        torch.testing.assert_close(of_x, (rho_next**2 - variance).sqrt() / rho)
        torch.testing.assert_close(coefficients(eta, "ctm")[0], (1 - eta**2) ** 0.5 * rho_next / rho)
    for family in FAMILIES:
        of_x, _, of_noise = coefficients(1.0, family)
        ratio = phi(family, rho_next) / phi(family, rho)
        torch.testing.assert_close(of_x, ratio, rtol=1e-9, atol=0.0)
        torch.testing.assert_close(of_noise, (rho_next**2 - ratio**2 * rho**2).sqrt(), rtol=1e-7, atol=1e-9)


def test_pure_noise_of_a_flow_is_left_at_once():
    share = noise_share(torch.tensor([torch.inf]), torch.tensor([3.0]), 0.5, "er-sde-5")
    assert share.tolist() == [0.25]
    x, x0 = torch.ones(1, 2), torch.full((1, 2), 3.0)
    state = substep(Flow(), x, x0, torch.tensor([1000.0]), torch.tensor([600.0]))
    torch.testing.assert_close(state, 0.4 * x0 + 0.6 * x)


@every_schedule
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_the_marginal_variance_of_a_gaussian_is_kept(schedule, family, eta):
    """As the steps become fine, the variance at the end becomes that of the marginal, whatever the noise: order 1."""
    gaussian = GaussianTeacher(torch.zeros(1, dtype=torch.float64), 0.7, schedule)
    ends = schedule.time(torch.tensor([0.8, 0.2]))

    def variance(t):
        alpha, sigma = schedule.level(t)
        return alpha**2 * 0.7**2 + sigma**2

    def relative_error(count):
        times = schedule.t_from_rho(torch.exp(torch.linspace(*schedule.rho(ends).log().tolist(), count + 1).double()))
        t, t_next = times[:-1], times[1:]
        unit, none = torch.ones(count, 1, dtype=torch.float64), torch.zeros(count, 1, dtype=torch.float64)
        of_x = substep(schedule, unit, gaussian(unit, t), t, t_next, eta, family, none)
        of_noise = substep(schedule, none, none, t, t_next, eta, family, unit)
        result = variance(times[0])
        for gain, added in zip(of_x.flatten().tolist(), of_noise.flatten().tolist(), strict=True):
            result = gain**2 * result + added**2
        return float(result / variance(times[-1]) - 1.0)

    coarse, fine = relative_error(200), relative_error(400)
    assert abs(fine) < 0.02
    assert fine / coarse == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_two_substeps_are_two_calls_of_one(eta):
    model, x = teacher().double(), torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([[999.0, 700.0, 500.0], [600.0, 400.0, 300.0], [90.0, 50.0, 0.0]], dtype=torch.float64)
    condition = {"class_labels": torch.arange(3)}
    noise = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    both = solve_between(model, x, times, condition, eta, "ddim", lambda step: noise[step])
    first = solve_between(model, x, times[:, :2], condition, eta, "ddim", lambda step: noise[0])
    assert torch.equal(both, solve_between(model, first, times[:, 1:], condition, eta, "ddim", lambda step: noise[1]))


# The loss.


@pytest.mark.parametrize("metric", ["huber", "l2"])
def test_without_noise_it_is_the_update_of_latent_consistency_models(metric):
    """Three updates beside ones written with the formulas of LCM's paper and script: tables, not schedules."""
    method = consistency(guidance_scale=2.5, grid_steps=50, metric=metric)
    own = method.roles["student"]
    real, student, target, w = teacher(), own.clone(), own.clone(), 1.5

    table = torch.cumprod(1 - BETAS, 0).numpy()
    solver_times = (np.arange(1, 51) * 20).round().astype(np.int64) - 1
    solver_times_before = np.array([0, *solver_times[:-1]])

    def column(values):
        return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1, 1)

    def x0_and_eps(net, x, times, labels):
        v = net(x, torch.tensor(times, dtype=torch.float32), class_labels=labels).sample
        alpha, sigma = column(table[times] ** 0.5), column((1 - table[times]) ** 0.5)
        return alpha * x - sigma * v, alpha * v + sigma * x

    def function(net, x, times, labels):
        scaled = 10.0 * times
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        return column(skip) * x + column(out) * x0_and_eps(net, x, times, labels)[0]

    for step in range(3):
        sample = draw(step=step)
        found = method.loss(STUDENT, sample).total
        found.backward()
        x0, condition = method.data.batch(sample)
        labels = condition["class_labels"]
        index = 49 - (sample.stratified("interval") * 50).long().numpy()
        times, times_before = solver_times[index], solver_times_before[index]
        noise = sample.normal("eps", (1, 8, 8))
        x_t = column(table[times] ** 0.5) * x0 + column((1 - table[times]) ** 0.5) * noise
        with torch.no_grad():
            cond_x0, cond_eps = x0_and_eps(real.net, x_t, times, labels)
            null_x0, null_eps = x0_and_eps(real.net, x_t, times, torch.full_like(labels, 10))
            guided_x0, guided_eps = cond_x0 + w * (cond_x0 - null_x0), cond_eps + w * (cond_eps - null_eps)
            before = table[times_before]
            x_before = column(before**0.5) * guided_x0 + column((1 - before) ** 0.5) * guided_eps
            wanted = function(target.net, x_before, times_before, labels)
        difference = function(student.net, x_t, times, labels) - wanted
        loss = (difference**2 if metric == "l2" else (difference**2 + 1e-3**2).sqrt() - 1e-3).mean()
        loss.backward()
        # Huber's gradient turns a rounding of 1e-7 into 1e-7 / c = 1e-4 of the next weights.
        exact = 1e-6 if step == 0 or metric == "l2" else 1e-4
        torch.testing.assert_close(found, loss, rtol=exact, atol=1e-6)
        with torch.no_grad():
            for model in (own, student):
                for parameter in model.parameters():
                    parameter -= 0.05 * parameter.grad
                model.zero_grad()
            method.end_step(step)
            for average, source in zip(target.parameters(), student.parameters(), strict=True):
                average.copy_(0.95 * average + 0.05 * source)
    assert (weights(student) - weights(real)).abs().max() > 1e-3
    close = 1e-6 if metric == "l2" else 1e-5
    assert (weights(own) - weights(student)).abs().max() < close
    assert (weights(method.target) - weights(target)).abs().max() < close


@pytest.mark.parametrize(("schedule", "boundary"), [(VP, 10.0), (VE(0.01, 10.0), 1.0), (Flow(), 10.0)])
def test_at_the_cleanest_time_the_student_is_the_identity(schedule, boundary):
    model = PixelDenoiser(tiny_unet(11), schedule, "sample")
    method = Consistency(
        Task(model, ClassConditions(10), load_images("digits", 1, (8, 8), 10)),
        Consistency.Config(boundary=boundary, grid="karras"),
    )
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = {"class_labels": torch.arange(3)}
    times = method.intervals[-1, -1].expand(3)
    assert times[0] == schedule.t_min
    assert torch.equal(method.clean(method.roles["student"], x, times, condition), x)
    assert not torch.allclose(method.clean(method.roles["student"], x, method.intervals[:3, 0], condition), x, atol=0.1)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_student_is_called_on_its_training_grid_where_lcms_scheduler_calls_it(steps):
    reference = LCMScheduler(original_inference_steps=50)
    reference.set_timesteps(steps, original_inference_steps=50)
    method = consistency(student_steps=steps)
    assert list(method.steps.times) == reference.timesteps.tolist()
    assert method.steps.noise == "fresh" and set(method.steps.times) <= set(method.intervals[:, 0].tolist())


@pytest.mark.parametrize("grid", ["trailing", "karras"])
@pytest.mark.parametrize("schedule", [VP, Flow()])
def test_substeps_divide_the_grid_and_do_not_move_it(schedule, grid):
    model = PixelDenoiser(tiny_unet(11), schedule, "v_prediction")
    kinds = {"grid": grid, "grid_steps": 25}
    whole, parts = (
        Consistency(Task(model, ClassConditions(10), task().data), Consistency.Config(substeps=h, **kinds)).intervals
        for h in (1, 4)
    )
    torch.testing.assert_close(parts[:, [0, -1]], whole)
    assert parts.shape == (25, 5) and bool((parts.diff() < 0).all())
    assert torch.equal(parts[1:, 0], parts[:-1, -1])


def test_guidance_is_that_of_the_teacher_alone():
    method = consistency(guidance_scale=3.0, substeps=2, grid_steps=20, eta=0.4, target_decay=0.0, metric="l2")
    sample = draw()
    loss = method.loss(STUDENT, sample)
    x0, condition = method.data.batch(sample)
    times = method.intervals[(sample.stratified("interval") * 20).long()]
    with torch.no_grad():
        x_t = method.teacher.noised(x0, times[:, 0], sample.normal("eps", (1, 8, 8)))
        x_m = solve_between(
            Guided(method.teacher, 3.0), x_t, times, condition, 0.4, "ddim",
            lambda step: sample.normal(f"substep{step}", (1, 8, 8)),
        )  # fmt: skip
        ends = [
            method.clean(method.roles["student"], x, t, condition) for x, t in ((x_t, times[:, 0]), (x_m, times[:, -1]))
        ]
    torch.testing.assert_close(loss.total.detach(), (ends[0] - ends[1]).square().mean())


def test_each_phase_moves_its_own_role_only():
    method = consistency(**SCOTT)
    judge, student = method.phases(0)
    assert (judge.trains, student.trains) == (("discriminator",), ("student",))
    method.loss(judge, draw(stream="discriminator/0")).total.backward()
    assert all(p.grad is None for p in method.roles["student"].parameters())
    assert all(p.grad is not None for p in method.roles["discriminator"].parameters())
    method.roles["discriminator"].requires_grad_(False)
    with_term = method.loss(student, draw())
    with_term.total.backward()
    found = weights_gradient(method)
    method.config.adversarial_weight = 0.0
    method.roles["student"].zero_grad()
    method.loss(student, draw()).total.backward()
    assert (found - weights_gradient(method)).abs().max() > 1e-6
    assert all(p.grad is None for p in method.teacher.parameters()) and all(
        p.grad is None for p in method.target.parameters()
    )


def weights_gradient(method) -> torch.Tensor:
    gradients = [p.grad.flatten() for p in method.roles["student"].parameters() if p.grad is not None]
    return torch.cat(gradients).clone()


# Training.


def test_accumulation_changes_nothing_beyond_rounding(tmp_path):
    results = []
    for micro in (1, 4):
        method = consistency(**SCOTT)
        trained(method, tmp_path / str(micro), 2, micro_batches=micro)
        results.append((weights(method.roles["student"]), weights(method.target)))
    for whole, parts in zip(*results, strict=True):
        assert (whole - parts).abs().mean() < 1e-6


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    whole, first = consistency(**SCOTT), consistency(**SCOTT)
    trained(whole, tmp_path / "whole", 4)
    part = trained(first, tmp_path / "parts", 2)
    with part.run:  # as when a run ends
        part.save()
    second = consistency(**SCOTT)
    loop = trainer(second, tmp_path / "parts", resume=True)
    loop.restore()
    assert loop.step == 2 and torch.equal(weights(second.target), weights(first.target))
    for _ in range(2):
        loop._train_step()
        loop.step += 1
    for one, other in (
        (whole.target, second.target),
        *((whole.roles[name], second.roles[name]) for name in whole.roles),
    ):
        assert torch.equal(weights(one), weights(other))


def test_adapters_have_an_adapter_as_target_or_none(tmp_path):
    pytest.importorskip("peft")
    for decay in (0.9, 0.0):
        real = teacher()
        shared = SharedBase(real, AdapterConfig(rank=4))
        config = Consistency.Config(target_decay=decay, guidance_scale=2.0)
        method = Consistency(task(teacher=real, shared=shared), config)
        before = {name: value.clone() for name, value in real.state_dict().items()}
        initial = weights(method.roles["student"])
        trained(method, tmp_path / str(decay), 1)
        moved = weights(method.roles["student"])
        assert not torch.equal(moved, initial)
        assert all(torch.equal(value, before[name]) for name, value in real.state_dict().items())
        if decay:
            torch.testing.assert_close(weights(method.target), 0.9 * initial + 0.1 * moved)
            assert set(method.extra_state()) == set(method.roles["student"].state_dict())
        else:
            assert method.target is None and method.extra_state() == {}


def test_the_spread_of_one_step_is_logged(tmp_path):
    method = consistency()
    method.begin(tmp_path)
    values = method.validate(method.roles["student"])
    assert set(values) == {"one_step_std_ratio", "one_step_drift"}
    assert values["one_step_std_ratio"] > 0


# Faults.


def test_it_asks_for_data():
    with pytest.raises(UsageError, match="give --data"):
        Consistency(task(data=None), Consistency.Config())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"grid": "leading"}, "method.grid"),
        ({"metric": "l1"}, "method.metric"),
        ({"noise_family": "er-sde"}, "noise family"),
        ({"eta": 1.5}, "eta"),
        ({"substeps": 0}, "method.substeps"),
        ({"boundary": 0.0}, "method.boundary"),
        ({"target_decay": 1.0}, "method.target_decay"),
        ({"adversarial_weight": -1.0}, "method.adversarial_weight"),
        ({"adversarial_time": 2.0}, "method.adversarial_time"),
        ({"student_start": 0.5}, "pure noise"),
        ({"grid_steps": 3}, "method.grid_steps"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        Consistency.Config(**settings)
