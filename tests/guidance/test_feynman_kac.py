"""Feynman-Kac correctors: samples of a one-dimensional mixture against the density that guidance names, and the drawing."""

import diffusers
import pytest
import torch
from pipelines import PIPELINES

from diffaccel import CFG, FeynmanKac, Interval, guide
from diffaccel.core.errors import UsageError
from diffaccel.guidance.context import Context, Level, Target
from diffaccel.guidance.feynman_kac import systematic
from diffaccel.guidance.levels import level_of, target_of
from diffaccel.samplers.registry import SAMPLERS

pytestmark = pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning")

# weights, means and variances of the data, without and with the condition
UNCOND = torch.tensor([[0.5, 0.5], [-2.0, 2.0], [0.5, 0.5]], dtype=torch.float64)
COND = torch.tensor([[0.4, 0.6], [-1.5, 2.0], [0.5, 0.5]], dtype=torch.float64)
SAMPLERS_WITH_NOISE = {
    "ddpm": lambda: diffusers.DDPMScheduler(clip_sample=False),
    "euler ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(beta_start=1e-4, beta_end=0.02),
    "ours": lambda: SAMPLERS["ddpm"].build(),
}


def epsilon(mixture, x, level) -> torch.Tensor:
    """The exact ε of a mixture at x (B, 1)."""
    weights, means, variances = mixture
    marginal, residual = level.alpha**2 * variances + level.sigma**2, x - level.alpha * means
    share = torch.softmax(weights.log() - 0.5 * residual**2 / marginal - 0.5 * marginal.log(), 1)
    return level.sigma * (share * residual / marginal).sum(1, keepdim=True)


def moments(x, weight) -> torch.Tensor:
    """Means of x, x² and x > 0 over points x (…, K) with weights that sum to 1 over K, (…, 3)."""
    return torch.stack([(weight * value).sum(-1) for value in (x, x**2, x > 0)], -1)


def target(scale: float) -> torch.Tensor:
    """The same of q_u^(1−w)·q_c^w, by quadrature."""
    x = torch.linspace(-15, 15, 30001, dtype=torch.float64)

    def log_density(mixture):
        weights, means, variances = mixture[..., None]
        return torch.logsumexp(weights.log() - 0.5 * (x - means) ** 2 / variances - 0.5 * variances.log(), 0)

    return moments(x, torch.softmax((1 - scale) * log_density(UNCOND) + scale * log_density(COND), 0))


def sampled(scheduler, rule, groups: int, steps: int) -> torch.Tensor:
    """Samples (groups, particles) of a run."""
    scheduler.set_timesteps(steps)
    generator, memory = torch.Generator().manual_seed(0), {}
    x = torch.randn(groups * rule.particles, 1, generator=generator, dtype=torch.float64) * scheduler.init_noise_sigma
    for step, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, t)
        level, after = level_of(scheduler, t), target_of(scheduler, t)
        context = Context(step, steps, lambda level=level: level, x, lambda after=after: after, memory)
        predictions = {name: epsilon(m, level.scale * x, level) for name, m in (("cond", COND), ("uncond", UNCOND))}
        x = scheduler.step(rule(predictions, context), t, x, generator=generator, return_dict=False)[0]
        x = rule.correct(x, context)
    return x.reshape(groups, rule.particles)


@pytest.mark.parametrize("name", SAMPLERS_WITH_NOISE)
def test_weights_lead_to_the_density_that_guidance_names(name):
    thresholds = {1.0: True, 0.0: False} if name == "ddpm" else {1.0: True}  # with 0 nothing is ever drawn anew
    for threshold, correct in thresholds.items():
        rule = FeynmanKac(3.0, particles=500, clamp=None, threshold=threshold)
        x = sampled(SAMPLERS_WITH_NOISE[name](), rule, 40, 200)
        found = moments(x, torch.full_like(x, 1 / 500))
        errors = (found.mean(0) - target(3.0)).abs() / (found.std(0) / 40**0.5)
        assert (errors < 3).all() if correct else (errors > 20).all(), errors


def step_of(level=None, after=None, memory=None) -> Context:
    level, after = level or Level(0.6, 0.8, "epsilon"), after or Target(0.8, 0.6, 0.4)
    return Context(0, 10, lambda: level, None, lambda: after, {} if memory is None else memory)


def predictions(rows: int = 6) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(rows, 4, 2, 2, generator=generator) for name in ("cond", "uncond")}


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_there_is_nothing_to_correct_at_scales_0_and_1(scale):
    rule, now = FeynmanKac(scale, particles=3, clamp=None), step_of()
    rule(predictions(), now)
    state = torch.arange(6.0)
    assert rule.correct(state, now).equal(state)


def test_weights_mean_the_same_in_every_family_and_parametrisation():
    """The step from ρ = 4/3 to 3/4, the same two densities."""
    rule, eps = FeynmanKac(3.0, particles=3, clamp=None), predictions()
    wanted = rule.increments(eps["cond"], eps["uncond"], step_of())
    rho = 4 / 3
    for level, after in (
        (Level(0.6, 0.8, "epsilon", scale=0.6), Target(1.0, 0.75, 0.4)),  # carried as x0 + ρ·ε
        (Level(0.6, 0.8, "v_prediction"), Target(0.8, 0.6, 0.4)),
        (Level(1 / (1 + rho), rho / (1 + rho), "flow_prediction"), Target(1 / 1.75, 0.75 / 1.75, 0.1)),
    ):
        b = level.affine("epsilon")[1]
        torch.testing.assert_close(rule.increments(eps["cond"] / b, eps["uncond"] / b, step_of(level, after)), wanted)
    squares = (eps["cond"] - eps["uncond"]).square().sum((1, 2, 3)).reshape(2, 3)
    torch.testing.assert_close(wanted, (3.0 * (1 - (0.75 / rho) ** 2) * squares).to(wanted.dtype))


def test_a_clamp_bounds_the_change_about_the_mean_of_the_prompt():
    eps, exact = predictions(), FeynmanKac(3.0, particles=3, clamp=None)
    rise = exact.increments(eps["cond"], eps["uncond"], step_of())
    clamped = FeynmanKac(3.0, particles=3, clamp=2.0).increments(eps["cond"], eps["uncond"], step_of())
    torch.testing.assert_close(clamped, (rise - rise.mean(1, keepdim=True)).clamp(-2, 2))


def test_a_draw_is_systematic():
    weights = torch.softmax(torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 1)
    mean = torch.zeros_like(weights)
    for offset in torch.linspace(0, 1, 1001)[:-1]:
        drawn = systematic(weights, offset.expand(50, 1))
        counts = torch.nn.functional.one_hot(drawn, 7).sum(1)
        assert (counts >= (7 * weights).floor()).all() and (counts <= (7 * weights).ceil()).all()
        mean += counts / 1000
    torch.testing.assert_close(mean, 7 * weights, rtol=0, atol=5e-3)
    equal = torch.full((1, 4), 0.25)
    assert systematic(equal, torch.tensor([[0.5]])).tolist() == [[0, 1, 2, 3]]


def test_draws_stay_within_a_prompt_and_follow_the_seed():
    logs = torch.tensor([[0.0, -50.0, -50.0], [-50.0, -50.0, 0.0]], dtype=torch.float64)
    state = torch.arange(6.0)
    assert FeynmanKac(particles=3).correct(state, step_of(memory={"log_weights": logs})).tolist() == [0, 0, 0, 5, 5, 5]
    mild = 0.5 * torch.arange(60, dtype=torch.float64).reshape(2, 30).sin()
    found = [
        FeynmanKac(particles=30, seed=seed).correct(torch.arange(60), step_of(memory={"log_weights": mild}))
        for seed in (0, 0, 1)
    ]
    assert found[0].equal(found[1]) and not found[0].equal(found[2])


def test_only_groups_of_few_effective_samples_are_drawn_anew_and_forget_their_weights():
    logs = torch.tensor([[0.0, -0.1, 0.1], [0.0, -9.0, -9.0]], dtype=torch.float64)
    memory = {"log_weights": logs}
    state = FeynmanKac(particles=3, threshold=0.5).correct(torch.arange(6.0), step_of(memory=memory))
    assert state.tolist() == [0, 1, 2, 3, 3, 3]
    assert memory["log_weights"][0].equal(logs[0]) and memory["log_weights"][1].tolist() == [0, 0, 0]
    state = torch.arange(6.0)
    assert FeynmanKac(particles=3).correct(state, step_of(after=Target(1, 0, 0), memory=dict(memory))) is state


def test_weights_are_gathered_inside_a_range_of_noise_only():
    for sigma_range, gathers in (((1.0, 2.0), True), ((2.0, 9.0), False)):
        now, rule = step_of(), FeynmanKac(3.0, particles=3, sigma_range=sigma_range)
        guided = rule(predictions(), now)
        assert ("log_weights" in now.memory) == gathers
        assert guided.equal(CFG(3.0)(predictions(), now))


def test_a_pipeline_with_particles():
    case = PIPELINES["sd"]
    pipe = case.build()
    pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    rules = [CFG(90.0), FeynmanKac(90.0, particles=1), FeynmanKac(90.0, clamp=None)]
    rules += [Interval(FeynmanKac(90.0), sigma_range=(0.1, 1e3))]
    results = []
    for rule in rules:
        with guide(pipe, rule):
            results.append(case.call(pipe, steps=6, prompt=["a cat", "a dog"], num_images_per_prompt=4))
    assert results[1].equal(results[0])
    assert not results[2].equal(results[0]) and not results[3].equal(results[0])
    with guide(pipe, FeynmanKac(4.0, particles=3)), pytest.raises(UsageError, match="num_images_per_prompt=3"):
        case.call(pipe, steps=2, num_images_per_prompt=4)


@pytest.mark.parametrize(
    ("arguments", "fits"),
    [
        ({"num_images_per_prompt": 2, "prompt": ["a", "b"]}, True),
        ({"num_videos_per_prompt": 2, "prompt": "a"}, True),
        ({"num_images_per_prompt": 1, "prompt": ["a", "b"]}, False),
        ({"num_images_per_prompt": 4}, False),
        ({"class_labels": [3, 3, 1, 1]}, True),
        ({"class_labels": torch.tensor([3, 3])}, True),
        ({"class_labels": [3, 1, 3, 1]}, False),
        ({"class_labels": [3, 3, 3]}, False),
        ({"class_labels": None, "batch_size": 2}, False),
        ({"class_labels": 3}, False),
        ({}, False),
    ],
    ids=str,
)
def test_a_call_makes_as_many_of_each_prompt(arguments, fits):
    for rule in (FeynmanKac(particles=2), Interval(FeynmanKac(particles=2), fraction_range=(0.0, 0.5))):
        if fits:
            rule.check(arguments)
        else:
            with pytest.raises(UsageError, match="num_images_per_prompt=2"):
                rule.check(arguments)


def test_ddim_is_ancestral_by_the_eta_of_the_call():
    case = PIPELINES["sd"]
    pipe = case.build()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    with guide(pipe, FeynmanKac(4.0, particles=2)):
        assert case.call(pipe, steps=3, num_images_per_prompt=2, eta=1.0).isfinite().all()
        with pytest.raises(UsageError, match="adds noise"):
            case.call(pipe, steps=3, num_images_per_prompt=2)


@pytest.mark.parametrize("sampler", [None, "ddim", "deis-sde", "rho-heun"])
def test_samplers_without_noise_or_with_a_memory_are_refused(sampler):
    case = PIPELINES["sd"]
    pipe = case.build(sampler)
    with guide(pipe, FeynmanKac(4.0, particles=2)), pytest.raises(UsageError):
        case.call(pipe, steps=4, num_images_per_prompt=2)


@pytest.mark.parametrize(
    "options",
    [
        {"particles": 0},
        {"particles": 2.5},
        {"clamp": -1.0},
        {"threshold": 1.5},
        {"sigma_range": (2, 1)},
        {"scale": "3"},
    ],
    ids=str,
)
def test_bad_values_are_refused(options):
    with pytest.raises(UsageError):
        FeynmanKac(**options)
