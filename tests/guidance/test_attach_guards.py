"""What only shows in half precision, in unusual pipelines or late in a run."""

import copy
import functools

import diffusers
import pytest
import torch
from pipelines import PIPELINES, check_close

from diffaccel import CFG, AutoGuidance, CFGPlusPlus, Interval, PerpNeg, guide
from diffaccel.core.errors import GuidanceError
from diffaccel.core.prediction import convert
from diffaccel.core.standins import stand_in
from diffaccel.guidance.base import COND, UNCOND, Extra
from diffaccel.guidance.layouts import recognise
from diffaccel.guidance.levels import level_of, target_of
from diffaccel.samplers.registry import SAMPLERS

SD = PIPELINES["sd"]
SCALE = 5.0


def noise(seed: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_does_not_excuse_rescaled_guidance(dtype):
    """Nearly equal branches leave little to rescale, but more than half precision rounds away."""
    c = noise(0, 2, 4, 8, 8)
    u = c + 0.1 * noise(1, *c.shape)
    guided = u + SCALE * (c - u)
    ratio = c.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
    outputs = [torch.cat([u, c]).to(dtype)]
    assert recognise(outputs, guided.to(dtype)).layout == "uncond-cond"
    with pytest.raises(GuidanceError, match="not classifier-free guidance"):
        recognise(outputs, ((0.7 * ratio + 0.3) * guided).to(dtype))


def nearly(u: torch.Tensor, places: int) -> torch.Tensor:
    """The float16 tensor with the next number in its first places, which rounding to bfloat16 does not tell apart."""
    c = u.clone()
    c.view(torch.int16).flatten()[:places] += 1
    return c


def test_rounding_near_a_scale_of_one_never_exchanges_the_branches():
    for seed in range(20):
        u = noise(seed, 1, 4, 8, 8, dtype=torch.float16)
        outputs, result = [torch.cat([u, c := nearly(u, 4)])], torch.lerp(u.bfloat16(), c.bfloat16(), 1.05)
        assert recognise(outputs, result, "uncond-cond").layout == "uncond-cond"
        with pytest.raises(GuidanceError, match="does not tell which is which"):
            recognise(outputs, result)


def test_a_frame_of_a_video_whose_branches_agree_does_not_decide():
    """A scale for every frame always fits a little better; of that frame it would be rounding alone."""
    for seed in range(20):
        u, c = noise(seed, 2, 1, 3, 4, 8, 8, dtype=torch.float16)
        c[:, 0] = nearly(u[:, 0], 1)
        outputs, result = [torch.cat([u, c])], torch.lerp(u.bfloat16(), c.bfloat16(), 1.5)
        assert recognise(outputs, result, per_frame=True).layout == "uncond-cond"


class Negating(diffusers.StableDiffusionPipeline):
    """Takes the negated output of its network, as Z-Image does."""

    @functools.wraps(diffusers.StableDiffusionPipeline.__call__)
    def __call__(self, *args, **kwargs):
        own = self.scheduler
        vars(self)["scheduler"] = stand_in(own, step=lambda _, output, *rest, **more: own.step(-output, *rest, **more))
        try:
            return super().__call__(*args, **kwargs)
        finally:
            vars(self)["scheduler"] = own


def changed(network, factor: float):
    """A copy of a UNet with its output multiplied."""
    network = copy.deepcopy(network)
    with torch.no_grad():
        for weight in network.conv_out.parameters():
            weight.mul_(factor)
    return network


def test_further_branches_have_the_sign_of_the_pipeline():
    """A network of the opposite sign in a pipeline that negates is the plain one, in every bit."""
    for rule in (lambda unet: AutoGuidance(SCALE, changed(unet, 0.5)), lambda unet: PerpNeg(SCALE, "a blurry dog")):
        results = []
        for sign, cls in ((1, type("Plain", (diffusers.StableDiffusionPipeline,), {})), (-1, Negating)):
            pipe = SD.build()
            pipe.__class__, pipe.unet = cls, changed(pipe.unet, sign)
            with guide(pipe, rule(pipe.unet)):
                results.append(SD.call(pipe, seed=[0, 1], guidance_scale=3.0))
        check_close(*results, 0)


def test_the_state_is_corrected_where_both_its_copies_are_stepped():
    """CFG++ on DiT, from one network call to the next: x0 of the guided prediction, noise of u."""
    pipe, calls, scale = PIPELINES["dit"].build(), [], 0.6

    def keep(module, args, output):
        calls.append([tensor.double()[:, :4].chunk(2) for tensor in (args[0], output[0])])

    handle = pipe.transformer.register_forward_hook(keep)
    with guide(pipe, CFGPlusPlus(scale)):
        PIPELINES["dit"].call(pipe, seed=[0, 1], guidance_scale=4.0)
    handle.remove()
    signals = [float(pipe.scheduler.alphas_cumprod[t]) for t in pipe.scheduler.timesteps]
    for now, after, ((x, _), (c, u)), ((stepped, _), _) in zip(signals, signals[1:], calls, calls[1:], strict=False):
        x0 = (x - (1 - now) ** 0.5 * (u + scale * (c - u))) / now**0.5
        check_close(stepped, after**0.5 * x0 + (1 - after) ** 0.5 * u, 1e-5)


def test_eta_of_a_scheduler_that_ignores_it_changes_nothing():
    case, pipe = PIPELINES["cogvideox"], PIPELINES["cogvideox"].build()
    with guide(pipe, CFGPlusPlus(0.6)):
        without, given = (case.call(pipe, guidance_scale=3.0, eta=eta) for eta in (0.0, 1.0))
    check_close(given, without, 0)


class Recorder(CFG):
    """Keeps the types of what it is given, with one further branch."""

    requires, seen = frozenset({COND, UNCOND, "again"}), []

    def extra(self, branch):
        return Extra()

    def __call__(self, predictions, context):
        self.seen.append({name: value.dtype for name, value in predictions.items()})
        return super().__call__(predictions, context)


def test_rules_compute_in_float32_at_least():
    pipe, rule = copy.deepcopy(SD.build()).to(dtype=torch.bfloat16), Recorder(SCALE)
    with guide(pipe, rule):
        assert SD.call(pipe, steps=2, guidance_scale=3.0).dtype == torch.bfloat16
    assert rule.seen and all(seen == dict.fromkeys(rule.requires, torch.float32) for seen in rule.seen)


def test_fractions_are_of_the_evaluations_that_are_made():
    """The other half of the schedule belongs to a refiner."""
    case, pipe, rows = PIPELINES["sdxl"], PIPELINES["sdxl"].build(), []
    handle = pipe.unet.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    with guide(pipe, Interval(CFG(SCALE), fraction_range=(0.5, 1.0))):
        case.call(pipe, steps=8, denoising_end=0.5, guidance_scale=3.0)
    handle.remove()
    assert rows == [1, 1, 2, 2]


def test_negatives_go_with_the_residuals_of_their_own_evaluation():
    """A negative like the prompt takes nothing away, unless its control is that of another state."""
    parts = SD.build().components
    net = diffusers.ControlNetModel.from_unet(parts["unet"]).eval()
    with torch.no_grad():
        for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            block.weight.copy_(noise(0, *block.weight.shape))  # an untrained one adds nothing
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=net, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    results = []
    for rule in (CFG(SCALE), PerpNeg(SCALE, negatives="a cat")):
        with guide(pipe, rule):
            results.append(SD.call(pipe, seed=[0, 1], image=torch.ones(2, 3, 8, 8), guidance_scale=3.0))
    check_close(results[1], results[0])


def built(build):
    """A scheduler at 20 steps; None for one that CFG++ refuses, or another kind of thing."""
    try:
        scheduler = build()
        scheduler.set_timesteps(20)
        return target_of(scheduler, scheduler.timesteps[0]) and scheduler
    except (GuidanceError, AttributeError, ImportError, LookupError, TypeError, ValueError):
        return None


@pytest.mark.filterwarnings("ignore")  # of schedulers that are only looked at
def test_every_scheduler_that_cfg_plus_plus_takes_goes_on_from_the_corrected_state():
    """A kick is taken for noise where the data is one point. UniPC of diffusers goes on from what it kept itself."""
    builds = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}
    builds |= {name: sampler.build for name, sampler in SAMPLERS.items()}
    schedulers = {name: found for name, build in builds.items() if (found := built(build))}
    assert {"DDIMScheduler", "DPMSolverMultistepScheduler", "ddim", "unipc"} <= schedulers.keys()
    for name, scheduler in schedulers.items():
        x = noise(0, 1, 1, 4, 4, dtype=torch.float64) * float(getattr(scheduler, "init_noise_sigma", 1.0))
        for index, t in enumerate(scheduler.timesteps[:13]):
            level, target = level_of(scheduler, t), target_of(scheduler, t)
            after = []
            for each, state in ((copy.deepcopy(scheduler), x + 0.01), (scheduler, x)):
                native, point = level.scale * state, torch.full_like(x, 0.3)
                output = convert(point, native, "sample", level.prediction_type, level.alpha, level.sigma)
                with torch.random.fork_rng(devices=()):
                    torch.manual_seed(index)
                    after.append(each.step(output, t, state, return_dict=False)[0].double())
            x = after[1]
            share = float((after[0] - x).mean()) / (0.01 * target.kept * level.scale / level.sigma)
            assert 0.25 < share < 1.5, f"{name} at step {index}: {share:.2g} of what first order says"
