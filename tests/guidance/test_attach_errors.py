"""Where a rule cannot act exactly it says so, with the cause and the remedy; no image is silently another one."""

import copy
import re

import diffusers
import pytest
import torch
from pipelines import GUIDED, PIPELINES, check_close, rows, unrecognised

from diffaccel import APG, CFG, AutoGuidance, Interval, PerpNeg, Rescale, enable_guidance, guide
from diffaccel.core.errors import GuidanceError, UsageError
from diffaccel.guidance.attach import guidance_of

SD = PIPELINES["sd"]
SCALE = 5.0


def refusal(text: str, **kwargs):
    return pytest.raises(GuidanceError, match=re.escape(text), **kwargs)


@pytest.mark.parametrize("name", GUIDED)
def test_a_call_without_the_branch_that_the_rule_needs(name):
    case, pipe = GUIDED[name], GUIDED[name].build()
    remedy = (
        f"call it with {case.scales[-1]} above 1{' and a negative_prompt' if case.negatives(1) else ''} (the rule's"
    )
    for rule in (CFG(SCALE), APG(SCALE), Interval(APG(SCALE), sigma_range=(1e6, 1e7)), Rescale(CFG(SCALE))):
        for candidate in (pipe, unrecognised(case.build())):
            with guide(candidate, rule), refusal(remedy):
                case.call(candidate, **case.guided(1.0))


def test_a_scale_without_a_negative_prompt():
    case = PIPELINES["flux"]
    with guide(case.build(), CFG(SCALE)) as guidance, refusal("FluxPipeline runs without its unconditional branch"):
        case.call(guidance.pipe, true_cfg_scale=SCALE)


def test_a_pipeline_without_guidance():
    case = PIPELINES["ddpm"]
    pipe = case.build()
    with guide(pipe, CFG(SCALE)), refusal("DDPMPipeline has no guidance of its own"):
        case.call(pipe)
    with guide(pipe, CFG(1.0)):
        check_close(case.call(pipe, seed=[0, 1]), case.call(case.build(), seed=[0, 1]), 0)


@pytest.mark.parametrize("name", ["sd", "sdxl", "ltx"])
def test_guidance_rescale(name):
    case, pipe = PIPELINES[name], PIPELINES[name].build()
    rescaled = case.call(pipe, guidance_scale=SCALE, guidance_rescale=0.7)
    plain = case.call(pipe, guidance_scale=SCALE)
    remedy = "guidance_rescale=0.0 (for its effect, guide by diffaccel.Rescale(rule, factor=0.7))"
    with guide(pipe, CFG(SCALE)), refusal(remedy):
        case.call(pipe, guidance_scale=SCALE, guidance_rescale=0.7)
    with guide(pipe, Rescale(CFG(SCALE), 0.7)):
        check_close(case.call(pipe, guidance_scale=2.0), rescaled, 1e-6)
    with guide(pipe, CFG(SCALE), layout="uncond-cond"):  # replaces it
        check_close(case.call(pipe, guidance_scale=2.0, guidance_rescale=0.7), plain, 0)


def changed_pipeline(change):
    """Stable Diffusion with a class that changes the prediction before the step."""

    class Changed(diffusers.StableDiffusionPipeline):
        def __call__(self, *args, **kwargs):
            scheduler = self.scheduler
            self.scheduler = Changing(scheduler)
            try:
                return super().__call__(*args, **kwargs)
            finally:
                self.scheduler = scheduler

    class Changing:
        def __init__(self, scheduler):
            self.__dict__["scheduler"] = scheduler

        def __getattr__(self, name):
            return getattr(self.scheduler, name)

        def step(self, model_output, *args, **kwargs):
            return self.scheduler.step(change(model_output), *args, **kwargs)

    pipe = SD.build()
    pipe.__class__ = Changed
    return pipe


def test_a_prediction_that_is_changed_before_the_step():
    def token_norm(output):
        return output / output.norm(dim=1, keepdim=True)

    pipe = changed_pipeline(token_norm)
    with guide(pipe, CFG(SCALE)), refusal("is not classifier-free guidance"):
        SD.call(pipe, guidance_scale=SCALE)
    with guide(pipe, CFG(SCALE), layout="uncond-cond"):
        check_close(SD.call(pipe, guidance_scale=2.0), SD.call(SD.build(), guidance_scale=SCALE), 0)
    with guide(pipe, CFG(1.0), layout="uncond-cond"):
        check_close(SD.call(pipe, guidance_scale=2.0), SD.call(SD.build(), guidance_scale=1.0), 1e-6)
    pipe = changed_pipeline(lambda output: -output)  # the rule's prediction is negated in turn
    own = SD.call(pipe, guidance_scale=SCALE)
    with guide(pipe, CFG(SCALE)):
        check_close(SD.call(pipe, guidance_scale=2.0), own, 0)


def test_layouts_that_are_not_those_of_the_pipeline():
    with pytest.raises(UsageError, match=r"layout must be one of 'uncond-cond', .*; got 'cond-unkond'"):
        guide(SD.build(), CFG(), layout="cond-unkond")
    with refusal("StableDiffusionPipeline has the layout 'uncond-cond', not 'cond-uncond': leave layout= out."):
        guide(SD.build(), CFG(), layout="cond-uncond")
    for wrong, cause in (
        ("cond-uncond", "has the layout 'uncond-cond'"),
        ("cond, uncond", "runs its branches in one call"),
    ):
        pipe = unrecognised(SD.build())
        for rule in (CFG(SCALE), CFG(1.0)):
            with guide(pipe, rule, layout=wrong), refusal(cause):
                SD.call(pipe, guidance_scale=2.0)
    with guide(SD.build(), CFG(SCALE), layout="uncond-cond") as guidance:
        check_close(SD.call(guidance.pipe, guidance_scale=2.0), SD.call(SD.build(), guidance_scale=SCALE), 0)


def test_things_that_cannot_be_guided():
    for thing in (object(), torch.nn.Linear(1, 1), None):
        with pytest.raises(UsageError, match="guide takes a diffusers pipeline with a scheduler; got"):
            guide(thing, CFG())
    for rule in (7.5, CFG, "cfg"):
        with pytest.raises(UsageError, match="guide takes a rule, such as"):
            guide(SD.build(), rule)


def test_guided_twice():
    pipe = SD.build()
    with guide(pipe, CFG(SCALE)) as guidance:
        for again in (guidance.enable, lambda: enable_guidance(pipe, APG(SCALE)), guide(pipe, CFG(2.0)).enable):
            with refusal("guided already; end that first, with disable_guidance(pipe)"):
                again()
        assert guidance_of(pipe) is guidance
    assert guidance_of(pipe) is None


def test_a_call_inside_its_own_call():
    pipe = SD.build()

    def callback(pipe, step, time, tensors):
        SD.call(pipe, guidance_scale=2.0)

    with guide(pipe, CFG(SCALE)):
        with refusal("cannot be called inside its own call"):
            SD.call(pipe, guidance_scale=2.0, callback_on_step_end=callback)
        check_close(SD.call(pipe, guidance_scale=2.0), SD.call(SD.build(), guidance_scale=SCALE), 0)


class OwnSteps(diffusers.StableDiffusionPipeline):
    """Calls its network as often as it is told, and steps by itself."""

    calls, steps, slower = 1, False, 1

    def __call__(self, guidance_scale: float = 7.5):
        x, text, output = torch.ones(2, 4, 8, 8), rows(4, 3, 16), torch.ones(4, 4, 8, 8)
        self.scheduler.set_timesteps(2)
        for time in self.scheduler.timesteps:
            for _ in range(self.calls):
                output = self.unet(torch.cat([x, x]), self.slower * time, encoder_hidden_states=text).sample
            if self.steps:
                x = self.scheduler.step(output.chunk(2)[0], time, x).prev_sample
        return (x - output.chunk(2)[0],)


@pytest.mark.parametrize(
    ("calls", "steps", "cause"),
    [
        (1, False, "three times without a step"),
        (3, True, "three times without a step"),
        (2, True, "The network predicted 4 and 4 samples for a step of 2"),
        (0, True, "steps its PNDMScheduler in a way that guidance does not know"),
    ],
)
def test_pipelines_whose_steps_are_their_own(calls, steps, cause):
    pipe = SD.build()
    pipe.__class__ = type("OwnSteps", (OwnSteps,), {"calls": calls, "steps": steps})
    with guide(pipe, CFG(SCALE)), refusal(cause):
        pipe()


def test_a_network_that_the_scheduler_never_hears_of():
    pipe = SD.build()
    pipe.__class__ = type("Once", (OwnSteps,), {})
    pipe.scheduler.set_timesteps = lambda count: None
    pipe.scheduler.timesteps = torch.tensor([1])
    with guide(pipe, CFG(1.0)), refusal("its images are not guided by this rule"):
        pipe()
    assert not isinstance(vars(pipe)["unet"], OwnSteps) and type(pipe.unet) is diffusers.UNet2DConditionModel


def test_three_branches():
    components = SD.build().components
    unet = diffusers.UNet2DConditionModel.from_config(components["unet"].config, in_channels=8).eval()
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(
        **{**components, "unet": unet}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a cat", "image": torch.zeros(1, 3, 8, 8), "num_inference_steps": 2, "output_type": "latent"}
    with (
        guide(pipe, CFG(SCALE)),
        refusal("predicted 3 samples for a step of 1; only one or two branches can be guided"),
    ):
        pipe(**call)


def test_branches_that_agree_cannot_be_told_apart_for_a_third_one():
    pipe = unrecognised(SD.build())
    same = {"prompt": "", "guidance_scale": 2.0}
    with guide(pipe, PerpNeg(SCALE, negatives="a dog")), refusal("pass layout="):
        SD.call(pipe, **same)
    known = SD.build()
    with guide(known, PerpNeg(SCALE, negatives="a dog")):
        want = SD.call(known, **same)
    with guide(pipe, PerpNeg(SCALE, negatives="a dog"), layout="uncond-cond"):
        check_close(SD.call(pipe, **same), want, 0)
    weak = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        weak.conv_out.weight.mul_(0.5)
    rule = AutoGuidance(SCALE, model=weak)  # needs no u, so it acts on either branch
    with guide(pipe, rule), guide(known, rule):
        check_close(SD.call(pipe, **same), SD.call(known, prompt="", guidance_scale=1.0), 1e-6)


def test_levels_that_are_not_known_ahead():
    pipe = SD.build()
    pipe.__class__ = type("Slower", (OwnSteps,), {"steps": True, "slower": 2})
    with guide(pipe, Interval(CFG(1.0), sigma_range=(0, 1))), refusal("use Interval(fraction_range=(start, stop))"):
        pipe()


def test_a_pipeline_that_ends_its_unconditional_branch():
    cutoff = diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    pipe = SD.build("ddim")
    with guide(pipe, CFG(SCALE)), refusal("ended its unconditional branch after 3 evaluations"):
        SD.call(pipe, guidance_scale=5.0, callback_on_step_end=cutoff)
    rule = Interval(CFG(SCALE), fraction_range=(0, 0.75))
    with guide(pipe, rule):
        want = SD.call(pipe, guidance_scale=5.0)
        check_close(SD.call(pipe, guidance_scale=5.0, callback_on_step_end=cutoff), want, 1e-6)


def test_a_rule_that_never_acts_is_named(caplog):
    pipe = SD.build("ddim")
    with guide(pipe, Interval(CFG(SCALE), sigma_range=(1e5, 1e6))):
        SD.call(pipe, guidance_scale=5.0)
    assert "acted in none of the 4 evaluations" in caplog.text
    caplog.clear()
    for rule in (CFG(1.0), Interval(CFG(SCALE), fraction_range=(0, 0.05)), AutoGuidance(SCALE, model=pipe.unet)):
        with guide(pipe, rule):
            SD.call(pipe, guidance_scale=5.0)
    assert not caplog.text


def test_another_level_than_was_foreseen(monkeypatch):
    pipe = SD.build()
    monkeypatch.setattr("diffaccel.guidance.run._position", lambda *_: 2)
    with guide(pipe, Interval(CFG(SCALE), sigma_range=(0, 1))), refusal("was foreseen to step at timestep"):
        SD.call(pipe, guidance_scale=2.0)


def test_a_further_branch_of_a_network_whose_samples_depend_on_each_other():
    pipe = unrecognised(SD.build())
    rule = AutoGuidance(SCALE, model=copy.deepcopy(pipe.unet))
    with guide(pipe, rule):
        plain = SD.call(pipe, guidance_scale=2.0)
    check_close(plain, SD.call(pipe, guidance_scale=1.0), 1e-6)
    with (
        guide(pipe, rule),
        SD.watched(pipe, lambda index, output: output + output.mean(0, keepdim=True)),
        refusal("cannot be called for one of its two branches"),
    ):
        SD.call(pipe, guidance_scale=2.0)
