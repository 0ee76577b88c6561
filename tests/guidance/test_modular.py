"""Rules in modular pipelines, against diffusers' own guiders and against the same rules in classic pipelines."""

import copy
import logging
from functools import partial

import diffusers
import pytest
import torch
from modular import MODULAR
from pipelines import BETAS, PIPELINES, check_close

import diffaccel
from diffaccel import APG, CFG, AutoGuidance, CFGPlusPlus, CFGZeroStar, Interval, PerpNeg, Rescale, RuleGuider, guide
from diffaccel.core.errors import GuidanceError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning")

FAMILIES = list(MODULAR)
TWO_STEPS = APG(6.0, eta=0.3, norm_threshold=2.0, momentum=-0.6)  # remembers, projects and caps, in x0 space


def theirs(case, guider, **arguments):
    """The result of one of diffusers' guiders."""
    return case.call(with_guider(case.build(), guider), **arguments)


def with_guider(pipe, guider):
    """The pipeline with a guider in every place for one."""
    pipe.update_components(**{name: guider for name in pipe.component_names if name.startswith("guider")})
    return pipe


def ours(case, rule, pipe=None, **arguments):
    pipe = pipe or case.build()
    with guide(pipe, rule):
        return case.call(pipe, **arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_cfg_is_diffusers_in_every_bit(family):
    case = MODULAR[family]
    want = theirs(case, diffusers.ClassifierFreeGuidance(guidance_scale=6.0))
    assert torch.equal(ours(case, CFG(6.0)), want)
    assert torch.equal(theirs(case, RuleGuider(CFG(6.0))), want)
    assert float((ours(case, CFG(1.0)) - want).abs().max()) > 0.01, "guidance has no effect here"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("original", [False, True])
def test_raw_apg_is_diffusers(family, original):
    """Their original formulation adds scale differences to c, so that scale + 1 is ours."""
    case, numbers = MODULAR[family], {"eta": 0.3, "momentum": -0.6, "norm_threshold": 2.0}
    want = theirs(
        case,
        diffusers.AdaptiveProjectedGuidance(
            guidance_scale=6.0, eta=0.3, adaptive_projected_guidance_momentum=-0.6,
            adaptive_projected_guidance_rescale=2.0, use_original_formulation=original,
        ),
    )  # fmt: skip
    anchored = {"scale": 7.0, "anchor": "cond"} if original else {"scale": 6.0, "anchor": "uncond"}
    check_close(ours(case, APG(space="raw", **anchored, **numbers)), want, 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("zeros", [0, 1])
def test_cfg_zero_star_is_diffusers(family, zeros):
    case, rule = MODULAR[family], CFGZeroStar(6.0, zero_init_steps=zeros)
    if family == "sdxl" and zeros:
        with pytest.raises(GuidanceError, match="flow models"):
            ours(case, rule)
    elif family == "qwen" and zeros:
        assert ours(case, rule).isnan().all(), "theirs divides by the norm of 0 too"
    else:
        want = theirs(case, diffusers.ClassifierFreeZeroStarGuidance(guidance_scale=6.0, zero_init_steps=zeros))
        check_close(ours(case, rule), want, 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_apg_that_keeps_everything_is_cfg(family):
    check_close(ours(MODULAR[family], APG(6.0, eta=1.0, momentum=0.0)), ours(MODULAR[family], CFG(6.0)), 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_samples_alone(family):
    case = MODULAR[family]
    alone = [ours(case, TWO_STEPS, seeds=(seed,)) for seed in (0, 1)]
    check_close(ours(case, TWO_STEPS), torch.cat(alone), 2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_negatives_equal_to_the_unconditional_branch_change_nothing(family):
    case = MODULAR[family]
    given = case.arguments(2)
    negative = {name.removeprefix("negative_"): given[name] for name in given if name.startswith("negative_")}
    assert torch.equal(ours(case, PerpNeg(6.0, negative)), ours(case, CFG(6.0)))


SCHEDULERS = {
    "euler": partial(diffusers.EulerDiscreteScheduler, **BETAS),  # scales what the network sees
    "ddim": partial(diffusers.DDIMScheduler, **BETAS, clip_sample=False),
    "multistep": partial(diffusers.DPMSolverMultistepScheduler, **BETAS),
    "heun": partial(diffusers.HeunDiscreteScheduler, **BETAS),
    "ours": partial(diffaccel.UniPCScheduler, **BETAS),
}


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "heun"])
@pytest.mark.parametrize(
    "rule", [TWO_STEPS, CFGPlusPlus(0.6), Interval(Rescale(APG(6.0)), sigma_range=(0.5, 8.0))], ids=lambda r: type(r).__name__
)  # fmt: skip
def test_sdxl_is_the_classic_pipeline(scheduler, rule):
    check_classic(rule, SCHEDULERS[scheduler])


def test_two_evaluations_per_step_are_the_classic_pipeline():
    check_classic(TWO_STEPS, SCHEDULERS["heun"])


@pytest.mark.parametrize("rule", ["autoguidance", "perp-neg"])
def test_branches_of_their_own_are_those_of_the_classic_pipeline(rule):
    weak, given = copy.deepcopy(PIPELINES["sdxl"].build().unet), MODULAR["sdxl"].arguments(2)
    with torch.no_grad():
        weak.conv_out.weight.mul_(0.7)
    negative = {name: given[name].flip(-1) for name in ("prompt_embeds", "pooled_prompt_embeds")}
    check_classic(AutoGuidance(2.0, weak) if rule == "autoguidance" else PerpNeg(6.0, negative), SCHEDULERS["euler"])


def check_classic(rule, scheduler):
    case = MODULAR["sdxl"]
    modular, classic = case.build(scheduler()), PIPELINES["sdxl"].build()
    classic.scheduler = scheduler()
    with guide(classic, rule):
        want = PIPELINES["sdxl"].call(classic, seed=[0, 1], latents=case.noise(0, 1))
    check_close(ours(case, rule, modular), want)


def test_ddim_with_noise_of_its_own():
    case, noise = MODULAR["sdxl"], {"eta": 0.5, "latents": MODULAR["sdxl"].noise(0, 1)}
    classic = PIPELINES["sdxl"].build()
    classic.scheduler = SCHEDULERS["ddim"]()
    with guide(classic, CFGPlusPlus(0.6)):
        want = PIPELINES["sdxl"].call(classic, seed=[0, 1], **noise)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    check_close(ours(case, CFGPlusPlus(0.6), case.build(SCHEDULERS["ddim"]()), generator=generators, **noise), want)


def test_a_scheduler_exchanged_while_guided():
    case = MODULAR["sdxl"]
    pipe = case.build(SCHEDULERS["ddim"]())
    with guide(pipe, TWO_STEPS):
        first = case.call(pipe)
        pipe.update_components(scheduler=SCHEDULERS["euler"]())
        second = case.call(pipe)
        assert type(pipe.scheduler) is diffusers.EulerDiscreteScheduler
    for name, got in (("ddim", first), ("euler", second)):
        assert torch.equal(got, ours(case, TWO_STEPS, case.build(SCHEDULERS[name]())))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_interval_spares_calls_and_switches_on_midway(family):
    case, rule = MODULAR[family], Interval(CFG(6.0), fraction_range=(0.5, 0.75))
    pipe = case.build()
    with case.counted(pipe) as calls:
        got = ours(case, rule, pipe)
    assert calls == [2, 2, 2, 2, 2], "cond, cond, cond and uncond, cond"
    want = theirs(case, diffusers.ClassifierFreeGuidance(guidance_scale=6.0, start=0.5, stop=0.75))
    assert torch.equal(got, want)


def test_a_run_that_starts_midway():
    case = MODULAR["sdxl"]

    def call(pipe, rule=None):
        generators = [torch.Generator().manual_seed(seed) for seed in (2, 3)]
        given = {"image_latents": case.noise(0, 1), "latents": None, "strength": 0.5, "generator": generators}
        return case.call(pipe, steps=8, **given) if rule is None else ours(case, rule, pipe, steps=8, **given)

    pipe, half = case.build(), Interval(CFG(6.0), fraction_range=(0.5, 1.0))
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0))
    want = call(pipe)
    assert torch.equal(call(pipe, CFG(6.0)), want)
    check_close(call(pipe, APG(6.0, eta=1.0, momentum=0.0)), want, 1e-6)
    with case.counted(pipe) as calls:
        call(pipe, half)
    assert len(calls) == 4 + 2


def test_evaluations_are_counted_where_a_step_has_two():
    case, scheduler = MODULAR["sdxl"], SCHEDULERS["heun"]
    pipe = case.build(scheduler())
    with case.counted(pipe) as calls:
        ours(case, Interval(CFG(6.0), fraction_range=(0.0, 5 / 7)), pipe)
    assert len(calls) == 7 + 5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["guide", "component"])
def test_calls_agree_also_after_one_that_failed(family, how):
    case = MODULAR[family]
    pipe = case.build()
    network, seen = getattr(pipe, case.network), []

    def fail(*_):
        seen.append(None)
        if len(seen) == 4:
            raise RuntimeError("in the middle")

    want = ours(case, TWO_STEPS)
    if how == "guide":
        diffaccel.enable_guidance(pipe, TWO_STEPS)
    else:
        with_guider(pipe, RuleGuider(TWO_STEPS, pipe))
    assert torch.equal(case.call(pipe), want) and torch.equal(case.call(pipe), want)
    if family != "wan2.2":  # whose first expert has two calls only
        handle = network.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            case.call(pipe)
        handle.remove()
    assert torch.equal(case.call(pipe), want)
    assert not network._forward_pre_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family):
    """The state that the network sees is rounded, and still the scheduler's."""
    case = MODULAR[family]
    pipe = case.build()
    for name in case.networks(pipe):
        setattr(pipe, name, copy.deepcopy(getattr(pipe, name)).to(torch.bfloat16))
    given = {name: halved(value) for name, value in {**case.arguments(2), "latents": case.noise(0, 1)}.items()}
    cfg, apg = (ours(case, rule, pipe, **given) for rule in (CFG(6.0), APG(6.0, eta=1.0, momentum=0.0)))
    assert (apg.double() - cfg).norm() < 0.01 * cfg.double().norm()


def halved(value):
    if isinstance(value, list):
        return [halved(item) for item in value]
    return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def test_both_experts_are_guided():
    case = MODULAR["wan2.2"]
    pipe, calls = case.build(), []
    for name in case.networks(pipe):
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    ours(case, CFG(6.0), pipe)
    assert calls.count("transformer") == calls.count("transformer_2") == 4


def test_the_pipeline_keeps_its_guider():
    case = MODULAR["sdxl"]
    pipe = case.build()
    cls, before, config = type(pipe), dict(vars(pipe)), dict(pipe.config)
    unguided = case.call(pipe)
    weak = copy.deepcopy(pipe.unet)
    hook = pipe.unet.register_forward_hook(lambda *_: 1 / 0)
    negative = {name: case.arguments(2)[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    for rule in (TWO_STEPS, CFGPlusPlus(0.6), AutoGuidance(2.0, weak), PerpNeg(6.0, negative)):
        with pytest.raises(ZeroDivisionError), guide(pipe, rule):
            case.call(pipe)
    hook.remove()
    assert type(pipe) is cls and vars(pipe) == before and dict(pipe.config) == config
    assert "forward" not in vars(pipe.unet) and not pipe.unet._forward_pre_hooks
    assert torch.equal(case.call(pipe), unguided)


def test_saved_while_guided_is_the_pipeline(tmp_path):
    case = MODULAR["sd3"]
    pipe = case.build()
    with guide(pipe, CFG(6.0)):
        pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    assert {path.name for path in tmp_path.iterdir()} >= {"modular_model_index.json", "scheduler", "transformer"}
    assert type(pipe).__name__ in (tmp_path / "modular_model_index.json").read_text()
    with pytest.raises(UsageError, match="keep it in code"):
        RuleGuider(CFG(6.0)).save_pretrained(str(tmp_path))


def test_another_guider_from_one():
    guider = RuleGuider(CFG(6.0))
    assert guider.new().rule == CFG(6.0) and guider.new(rule=APG(5.0)).rule == APG(5.0)
    assert repr(guider) == "RuleGuider(CFG(scale=6.0))"


def test_a_disabled_guider_leaves_the_condition_alone():
    case = MODULAR["sd3"]  # SDXL enables its guider in every call
    pipe = case.build()
    pipe.update_components(guider=RuleGuider(CFG(6.0)))
    pipe.guider.disable()
    with case.counted(pipe) as calls:
        got = case.call(pipe)
    assert torch.equal(got, ours(case, CFG(1.0)))
    assert len(calls) == 4 and pipe.guider.num_conditions == 1


def test_the_branch_being_computed_is_known():
    """ControlNet's guess mode asks for it."""
    guider, network = RuleGuider(CFG(6.0)), torch.nn.Identity()
    guider.set_state(0, 4, torch.tensor(999))
    branches = guider.prepare_inputs({"embeds": (torch.ones(1), torch.zeros(1)), "shared": torch.ones(1)})
    assert [float(branch.embeds) for branch in branches] == [1, 0] and all(branch.shared == 1 for branch in branches)
    for conditional in (True, False):
        guider.prepare_models(network)
        assert guider.is_conditional is conditional and guider.is_unconditional is not conditional
        guider.cleanup_models(network)


def test_no_more_warnings_than_diffusers_has(monkeypatch):
    case, messages = MODULAR["sd3"], []
    pipe = case.build()
    log = logging.getLogger("diffusers.guiders.guider_utils")
    monkeypatch.setattr(log, "handle", lambda record: messages.append(record.getMessage()))
    ours(case, TWO_STEPS, pipe)
    RuleGuider(TWO_STEPS, pipe)
    assert not messages and not log.disabled
    diffusers.ClassifierFreeGuidance()
    assert len(messages) == 1


def test_a_guider_alone_refuses_what_it_cannot_do():
    case = MODULAR["sdxl"]
    for rule in (
        CFGPlusPlus(0.6),
        Interval(CFGPlusPlus(0.6), fraction_range=(0, 1)),
        AutoGuidance(2.0, torch.nn.Identity()),
    ):
        pipe = case.build()
        pipe.update_components(guider=RuleGuider(rule, pipe))
        with pytest.raises(GuidanceError, match="more than a guider"):
            case.call(pipe)
    pipe.update_components(guider=RuleGuider(APG(6.0)))
    with pytest.raises(GuidanceError, match=r"RuleGuider\(rule, pipe\)"):
        case.call(pipe)


def test_a_call_without_negatives_is_refused():
    for family in ("sdxl", "sd3"):  # blocks of others demand the argument
        case = MODULAR[family]
        pipe, given = case.build(), case.arguments(2)
        missing = {name: None for name in given if name.startswith("negative_")}
        with guide(pipe, CFG(6.0)), pytest.raises(GuidanceError, match="negative_prompt"):
            case.call(pipe, **missing)
        assert ours(case, CFG(1.0), pipe, **missing).isfinite().all()


def test_a_state_that_the_network_does_not_see_is_refused():
    """Rules in raw space do not mind."""
    case = MODULAR["sdxl"]
    pipe = case.build()
    pipe.unet = copy.deepcopy(pipe.unet)
    pipe.unet.register_forward_pre_hook(lambda _, args: (0.9 * args[0], *args[1:]))
    with pytest.raises(GuidanceError, match="do not know x"):
        ours(case, TWO_STEPS, pipe)
    assert ours(case, APG(6.0, space="raw"), pipe).isfinite().all()


def test_a_loop_without_steps_of_the_scheduler_is_refused():
    case = MODULAR["sd3"]
    pipe = case.build()
    del pipe._blocks.sub_blocks["denoise"].sub_blocks["after_denoiser"]
    for rule in (TWO_STEPS, CFGPlusPlus(0.6)):
        with pytest.raises(GuidanceError, match="do not know x"):
            ours(case, rule, pipe)
    assert ours(case, CFG(6.0), pipe).isfinite().all()


def test_a_prediction_changed_on_the_way_is_no_step_of_cfg_plus_plus():
    with pytest.raises(GuidanceError, match="changes the guided prediction"):
        ours(MODULAR["qwen"], CFGPlusPlus(0.6))


def test_a_rule_checks_the_call_with_its_defaults():
    seen = []

    class Checking(CFG):
        def check(self, arguments):
            seen.append(arguments)
            raise UsageError("not this call")

    pipe = MODULAR["sd3"].build()
    with pytest.raises(UsageError, match="not this call"):
        ours(MODULAR["sd3"], Checking(6.0), pipe, steps=3)
    assert seen[0]["num_inference_steps"] == 3 and seen[0]["num_images_per_prompt"] == 1
    assert type(pipe.guider) is diffusers.ClassifierFreeGuidance


def test_refused_pipelines_and_arguments():
    from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
    from diffusers.modular_pipelines.ltx2.modular_blocks_ltx2 import LTX2CoreDenoiseStep

    for blocks, words in ((FluxCoreDenoiseStep, "no guider"), (LTX2CoreDenoiseStep, "several modalities")):
        with pytest.raises(GuidanceError, match=words):
            guide(blocks().init_pipeline(), CFG(6.0))
    pipe = MODULAR["sd3"].build()
    with pytest.raises(UsageError, match="classic pipelines"):
        guide(pipe, CFG(6.0), layout="uncond-cond")
    with guide(pipe, CFG(6.0)), pytest.raises(GuidanceError, match="guided already"):
        guide(pipe, CFG(6.0)).enable()
    with pytest.raises(UsageError, match="RuleGuider takes a rule"):
        RuleGuider(6.0)
