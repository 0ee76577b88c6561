"""What only shows in half precision, in unusual pipelines or late in a run."""

import copy
import functools

import diffusers
import pytest
import torch
from pipelines import PIPELINES, check_close

from diffaccel import CFG, AutoGuidance, CFGPlusPlus, Interval, PerpNeg, guide
from diffaccel.core.errors import GuidanceError
from diffaccel.guidance.base import COND, UNCOND, Extra, Rule
from diffaccel.guidance.conditions import Condition
from diffaccel.guidance.layouts import recognise
from diffaccel.guidance.levels import target_of
from diffaccel.guidance.standins import stand_in
from diffaccel.samplers.registry import SAMPLERS

SD = PIPELINES["sd"]
SCALE = 5.0


def noise(seed: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("distance", [0.1, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_does_not_excuse_rescaled_guidance(dtype, distance):
    """Nearly equal branches leave little to rescale, but more than half precision rounds away."""
    c = noise(0, 2, 4, 8, 8)
    u = c + distance * noise(1, *c.shape)
    guided = u + SCALE * (c - u)
    ratio = c.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
    outputs = [torch.cat([u, c]).to(dtype)]
    assert recognise(outputs, guided.to(dtype)).layout == "uncond-cond"
    with pytest.raises(GuidanceError, match="not classifier-free guidance"):
        recognise(outputs, ((0.7 * ratio + 0.3) * guided).to(dtype))


def interpolated(c: torch.Tensor, u: torch.Tensor, scale: float) -> torch.Tensor:
    """Guidance as a formula that rounds by much where the branches differ by little."""
    return scale * c + (1.0 - scale) * u


def one_step_apart(u: torch.Tensor, count: int) -> torch.Tensor:
    """The bfloat16 tensor with the next number in the first ``count`` places."""
    c = u.clone()
    c.view(torch.int16).flatten()[:count] += 1
    return c


@pytest.mark.parametrize("scale", [1.05, 2.0, 7.5])
def test_rounding_never_exchanges_the_branches(scale):
    refused = 0
    for seed in range(60):
        u = noise(seed, 1, 4, 8, 8, dtype=torch.bfloat16)
        c = one_step_apart(u, 2)
        for layout, outputs in (("uncond-cond", [u, c]), ("cond-uncond", [c, u])):
            outputs, result = [torch.cat(outputs)], interpolated(c, u, scale)
            assert recognise(outputs, result, layout).layout == layout
            try:
                assert recognise(outputs, result).layout == layout
            except GuidanceError as refusal:
                assert "does not tell which is which" in str(refusal)
                refused += 1
    assert refused


def test_a_frame_of_a_video_whose_branches_agree_does_not_decide():
    """A scale for every frame always fits a little better; of that frame it would be rounding alone."""
    for seed in range(20):
        u, c = noise(seed, 2, 1, 3, 4, 8, 8, dtype=torch.bfloat16)
        c[:, 0] = one_step_apart(u[:, 0], 1)
        result = interpolated(c, u, 7.5)
        assert recognise([torch.cat([u, c])], result).layout == "uncond-cond"
        assert recognise([c, u], result).layout == "cond, uncond"


class Negating(diffusers.StableDiffusionPipeline):
    """Takes the negated output of its network, as Z-Image does."""

    @functools.wraps(diffusers.StableDiffusionPipeline.__call__)
    def __call__(self, *args, **kwargs):
        scheduler = self.scheduler
        negating = stand_in(scheduler, step=lambda _, output, *rest, **more: scheduler.step(-output, *rest, **more))
        vars(self)["scheduler"] = negating
        try:
            return super().__call__(*args, **kwargs)
        finally:
            vars(self)["scheduler"] = scheduler


def changed(network, factor: float):
    """A copy of a UNet with its output multiplied."""
    network = copy.deepcopy(network)
    with torch.no_grad():
        for weight in network.conv_out.parameters():
            weight.mul_(factor)
    return network


@pytest.mark.parametrize(
    "rule",
    [lambda sign, unet: AutoGuidance(SCALE, changed(unet, 0.5)), lambda sign, unet: PerpNeg(SCALE, "a blurry dog")],
    ids=["AutoGuidance", "PerpNeg"],
)
def test_further_branches_have_the_sign_of_the_pipeline(rule):
    """A network of the opposite sign in a pipeline that negates is the plain one, in every bit."""
    results = []
    for sign, cls in ((1, diffusers.StableDiffusionPipeline), (-1, Negating)):
        pipe = SD.build()
        pipe.__class__, pipe.unet = cls, changed(pipe.unet, sign)
        with guide(pipe, rule(sign, pipe.unet)):
            results.append(SD.call(pipe, seed=[0, 1], guidance_scale=3.0))
    check_close(results[1], results[0], 0)


def test_the_state_is_corrected_where_both_its_copies_are_stepped():
    """CFG++ on DiT, from one network call to the next: x0 of the guided prediction, noise of u."""
    case, pipe, inputs, outputs, scale = PIPELINES["dit"], PIPELINES["dit"].build(), [], [], 0.6

    def keep(_, args, kwargs, output):
        inputs.append(args[0].double().chunk(2)[0])
        outputs.append(output[0].double()[:, :4].chunk(2))

    handle = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    with guide(pipe, CFGPlusPlus(scale)):
        case.call(pipe, steps=4, seed=[0, 1], guidance_scale=4.0)
    handle.remove()
    signals = [float(pipe.scheduler.alphas_cumprod[t]) for t in pipe.scheduler.timesteps]
    for index, (now, after) in enumerate(zip(signals, signals[1:], strict=False)):
        c, u = outputs[index]
        x0 = (inputs[index] - (1 - now) ** 0.5 * (u + scale * (c - u))) / now**0.5
        check_close(inputs[index + 1], after**0.5 * x0 + (1 - after) ** 0.5 * u, 1e-5)


def test_eta_of_a_scheduler_that_ignores_it_changes_nothing():
    case, pipe = PIPELINES["cogvideox"], PIPELINES["cogvideox"].build()
    with guide(pipe, CFGPlusPlus(0.6)):
        without, given = (case.call(pipe, guidance_scale=3.0, eta=eta) for eta in (0.0, 1.0))
    check_close(given, without, 0)


class Recorder(Rule):
    """Conditional predictions; keeps what it was given, with one further branch."""

    requires = frozenset({COND, UNCOND, "again"})

    def __init__(self):
        self.seen = []

    def extra(self, branch):
        return Extra()

    def __call__(self, predictions, context):
        self.seen.append(predictions)
        return predictions[COND]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rules_compute_in_float32_at_least(dtype):
    pipe, rule = copy.deepcopy(SD.build()), Recorder()
    with guide(pipe.to(dtype=dtype), rule):
        assert SD.call(pipe, steps=2, guidance_scale=3.0).dtype == dtype
    wanted = torch.promote_types(dtype, torch.float32)
    assert [{name: value.dtype for name, value in seen.items()} for seen in rule.seen[:2]] == [
        dict.fromkeys((COND, UNCOND, "again"), wanted)
    ] * 2


def test_fractions_are_of_the_evaluations_that_are_made():
    """The other half of the schedule belongs to a refiner."""
    case, rows = PIPELINES["sdxl"], []
    pipe = case.build()
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
    names = ("down_block_additional_residuals", "mid_block_additional_residual", "controlnet_block_samples")
    first, now = ({"text": value, **dict.fromkeys(names, value)} for value in "ab")
    x = torch.ones(1, 4)
    args, kwargs = Condition((x,), first, 1).applied((x,), now, "cond, uncond")
    assert kwargs == {**now, "text": "a"}


VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STOCK = [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")]


def built(name: str):
    """A scheduler of diffusers or of this package at 20 steps; None where CFG++ is refused, or it cannot be built."""
    try:
        scheduler = SAMPLERS[name].build(VP) if name in SAMPLERS else getattr(diffusers, name)()
        scheduler.set_timesteps(20)
        target_of(scheduler, scheduler.timesteps[0])
    except Exception:
        return None
    return scheduler
