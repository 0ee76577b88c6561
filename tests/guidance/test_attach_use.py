"""Guidance beside everything else that people do with pipelines."""

import copy
import gc
import weakref

import accelerate
import diffusers
import pytest
import torch
from pipelines import GUIDED, IMAGE_TO_IMAGE, PIPELINES, check_close

import diffaccel
from diffaccel import APG, CFG, Interval, disable_guidance, enable_guidance, guide
from diffaccel.core.errors import GuidanceError
from diffaccel.guidance.attach import guidance_of
from diffaccel.samplers.registry import SAMPLERS

SCALE = 5.0
SD = PIPELINES["sd"]
STEEP = APG(SCALE, norm_threshold=0.5)


def sd_call(pipe, scale: float = 2.0, seed=(0, 1), **arguments) -> torch.Tensor:
    return SD.call(pipe, seed=list(seed), guidance_scale=scale, **arguments)


def own_copy():
    return copy.deepcopy(SD.build())


@pytest.mark.parametrize("name", ["sd", "sd3"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_with_every_sampler(sampler, name):
    case = PIPELINES[name]
    pipe = case.build(sampler)
    own = case.call(pipe, 2, [0, 1], guidance_scale=SCALE)
    conditional = case.call(pipe, 2, [0, 1], guidance_scale=1.0)
    for rule, want, tolerance in (
        (CFG(SCALE), own, 0),
        (APG(SCALE, eta=1.0, momentum=0.0), own, 1e-5),
        (Interval(CFG(SCALE), sigma_range=(1e6, 1e7)), conditional, 0),
    ):
        with guide(pipe, rule):
            check_close(case.call(pipe, 2, [0, 1], guidance_scale=2.0), want, tolerance)


@pytest.mark.parametrize("how", ["module", "in place"])
def test_compiled(how):
    case = PIPELINES["pixart"]
    pipe = copy.deepcopy(case.build())
    with guide(pipe, Interval(CFG(SCALE), fraction_range=(0.5, 1))):
        want = case.call(pipe, guidance_scale=2.0)
        if how == "module":
            pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        else:
            pipe.transformer.compile(backend="eager")
        compiled = pipe.transformer
        check_close(case.call(pipe, guidance_scale=2.0), want, 1e-6)
    assert pipe.transformer is compiled


@pytest.mark.parametrize("how", ["cpu_offload", "hooks"])
def test_offloaded(how):
    pipe = own_copy()
    want = sd_call(pipe, SCALE)
    if how == "cpu_offload":
        accelerate.cpu_offload(pipe.unet, execution_device="cpu")
    else:  # as enable_model_cpu_offload installs them, which wants an accelerator
        pipe.unet, hook = accelerate.cpu_offload_with_hook(pipe.unet, execution_device="cpu")
        pipe._all_hooks = [hook]
    for _ in range(2):
        with guide(pipe, CFG(SCALE)):
            check_close(sd_call(pipe), want, 0)
    check_close(sd_call(pipe, SCALE), want, 0)


def test_with_an_adapter():
    pytest.importorskip("peft")
    from peft import LoraConfig

    pipe = own_copy()
    plain = sd_call(pipe, SCALE)
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]), "one")
    own = sd_call(pipe, SCALE)
    assert not torch.equal(own, plain)
    with guide(pipe, CFG(SCALE)):
        check_close(sd_call(pipe), own, 0)
        pipe.unet.disable_adapters()
        check_close(sd_call(pipe), plain, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "wan", "dit"])
def test_half_precision(name, dtype):
    case, pipe = GUIDED[name], copy.deepcopy(GUIDED[name].build())
    precise = case.call(pipe, seed=[0, 1], **case.guided(SCALE, 2)).float()
    pipe.to(dtype)
    own = case.call(pipe, seed=[0, 1], **case.guided(SCALE, 2))
    for rule in (CFG(SCALE), APG(SCALE, eta=1.0, momentum=0.0), Interval(CFG(SCALE), fraction_range=(0, 1))):
        with guide(pipe, rule):
            got = case.call(pipe, seed=[0, 1], **case.guided(2.0, 2))
        assert got.dtype == own.dtype
        # Rules compute in float32, the pipeline rounds in between: no further from the truth, but not the same.
        assert (got.float() - precise).norm() <= 1.2 * (own.float() - precise).norm()


def test_arguments_of_the_call():
    pipe, seen = SD.build(), []

    def callback(pipe, step, time, tensors):
        seen.append(step)
        return {"latents": 0.9 * tensors["latents"]}

    for arguments in (
        {"callback_on_step_end": callback},
        {"prompt": ["a cat", "a dog"], "negative_prompt": ["a", "b"]},
        {"return_dict": False},
        {"eta": 0.5},
    ):
        own = sd_call(pipe, SCALE, **arguments)
        with guide(pipe, CFG(SCALE)):
            check_close(sd_call(pipe, **arguments), own, 0)
    assert seen == 2 * [0, 1, 2, 3, 4]  # PNDM's four steps take five evaluations
    several = {"prompt": "a cat", "num_images_per_prompt": 2, "generator": torch.Generator().manual_seed(0)}
    call = {**SD.arguments(1), **several, "num_inference_steps": 3}
    own = pipe(**call, guidance_scale=SCALE).images
    call["generator"].manual_seed(0)
    with guide(pipe, CFG(SCALE)):
        check_close(pipe(**call, guidance_scale=2.0).images, own, 0)
    assert len(own) == 2


def test_a_prompt_that_is_its_own_negative():
    """The branches agree and tell nothing, and nothing needs to be told."""
    case = PIPELINES["sd"]
    for cls in (diffusers.StableDiffusionPipeline, type("Unknown", (diffusers.StableDiffusionPipeline,), {})):
        pipe = case.build()
        pipe.__class__ = cls
        conditional = sd_call(pipe, 1.0)
        with guide(pipe, CFG(SCALE)) as guidance:
            check_close(sd_call(pipe, 2.0, negative_prompt=["a cat"] * 2), conditional, 1e-6)
            check_close(sd_call(pipe, 2.0, seed=[0]), sd_call(pipe, 7.0, seed=[0]), 0)
        assert guidance.layout == "uncond-cond"


def test_saved_meanwhile(tmp_path):
    pipe = SD.build("deis")
    with guide(pipe, CFG(SCALE)):
        sd_call(pipe)
        pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is diffusers.StableDiffusionPipeline
    assert {name: type(value) for name, value in loaded.components.items()} == {
        name: type(value) for name, value in pipe.components.items()
    }
    check_close(sd_call(loaded, SCALE), sd_call(pipe, SCALE), 0)


def test_copies_are_not_guided():
    pipe = SD.build()
    plain = sd_call(pipe)
    with guide(pipe, CFG(SCALE)):
        copies = [copy.copy(pipe), copy.deepcopy(pipe), diffusers.AutoPipelineForText2Image.from_pipe(pipe)]
        assert guidance_of(pipe) is not None
        for other in copies:
            assert type(other) is diffusers.StableDiffusionPipeline and guidance_of(other) is None
            other.set_progress_bar_config(disable=True)
            check_close(sd_call(other), plain, 0)
            with guide(other, CFG(SCALE)):
                check_close(sd_call(other), sd_call(pipe), 0)
        moved = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, requires_safety_checker=False)
        moved.set_progress_bar_config(disable=True)
        case = IMAGE_TO_IMAGE["sd"]
        check_close(case.call(moved), case.call(case.build()), 0)


def test_networks_copied_during_a_call_are_plain():
    pipe, copies = SD.build(), []

    def callback(pipe, step, time, tensors):
        copies.extend((copy.deepcopy(pipe.unet), copy.copy(pipe.scheduler)))
        return {}

    with guide(pipe, CFG(SCALE)):
        sd_call(pipe, steps=1, callback_on_step_end=callback)
    assert {type(item) for item in copies} == {diffusers.UNet2DConditionModel, diffusers.PNDMScheduler}


def test_two_pipelines_that_share_everything():
    guided, plain = SD.build(), SD.build()
    plain.scheduler = guided.scheduler
    want = sd_call(plain)
    with guide(guided, CFG(SCALE)):
        check_close(sd_call(plain), want, 0)
        check_close(sd_call(guided), sd_call(plain, SCALE), 0)
        with guide(plain, CFG(3.0)):
            check_close(sd_call(plain), sd_call(SD.build(), 3.0), 0)
            check_close(sd_call(guided), sd_call(SD.build(), SCALE), 0)
        check_close(sd_call(plain), want, 0)


def test_schedulers_and_networks_exchanged_meanwhile():
    pipe = SD.build()
    with guide(pipe, CFG(SCALE)):
        sd_call(pipe)
        pipe.scheduler = scheduler = diffaccel.DPMSolverScheduler.from_config(pipe.scheduler.config)
        other = SD.build()
        other.scheduler = copy.deepcopy(scheduler)
        check_close(sd_call(pipe), sd_call(other, SCALE), 0)
        assert pipe.scheduler is scheduler
        pipe.unet = copy.deepcopy(pipe.unet).requires_grad_(False)
        with torch.no_grad():
            next(pipe.unet.parameters()).mul_(0.5)
        guided = sd_call(pipe)
    check_close(sd_call(pipe, SCALE), guided, 0)

    def exchanging(pipe, step, time, tensors):
        pipe.unet = other
        return {}

    other = copy.deepcopy(pipe.unet)
    with guide(pipe, CFG(SCALE)), pytest.raises(GuidanceError, match="guidance does not know"):
        sd_call(pipe, callback_on_step_end=exchanging)
    assert pipe.unet is other


def test_switched_on_and_off():
    pipe = SD.build()
    before = sd_call(pipe)
    disable_guidance(pipe)  # nothing to do
    guidance = enable_guidance(pipe, CFG(SCALE))
    assert guidance_of(pipe) is guidance and isinstance(pipe, diffusers.StableDiffusionPipeline)
    check_close(sd_call(pipe), sd_call(SD.build(), SCALE), 0)
    disable_guidance(pipe)
    disable_guidance(pipe)
    assert guidance_of(pipe) is None and type(pipe) is diffusers.StableDiffusionPipeline
    check_close(sd_call(pipe), before, 0)
    with guidance:  # and again
        check_close(sd_call(pipe), sd_call(SD.build(), SCALE), 0)
        guidance.disable()
    check_close(sd_call(pipe), before, 0)


@pytest.mark.parametrize("name", ["sd", "cogvideox", "flux", "wan"])
def test_hooks_of_caching_and_copies_keep_nothing_of_a_run(name):
    case = GUIDED[name]
    pipe, memories = copy.deepcopy(case.build()), []

    class Remembering(CFG):
        def __call__(self, predictions, context):
            context.memory["kept"] = torch.ones(1)
            memories.append(weakref.ref(context.memory["kept"]))
            return super().__call__(predictions, context)

    gc.disable()
    try:
        with guide(pipe, Remembering(SCALE)):
            case.call(pipe, **case.guided(2.0, 1))
        assert memories and all(memory() is None for memory in memories)
    finally:
        gc.enable()
    twin = copy.deepcopy(getattr(pipe, case.network))
    registry = getattr(twin, "_diffusers_hook", None)
    assert registry is None or registry._module_ref is twin
    assert type(twin) is type(getattr(case.build(), case.network))


def test_nothing_is_kept_alive():
    pipe = own_copy()
    unet = weakref.ref(pipe.unet)
    with guide(pipe, STEEP):
        sd_call(pipe)
        del pipe.unet
        gc.collect()
        assert unet() is None


def test_a_pipeline_made_of_the_parts_of_a_guided_one_is_not_guided():
    pipe, plain = own_copy(), sd_call(SD.build())
    with guide(pipe, STEEP):
        twin = type(pipe)(**pipe.components, requires_safety_checker=False)
        twin.set_progress_bar_config(disable=True)
        assert guidance_of(twin) is None
        check_close(sd_call(twin), plain, 0)
        with guide(twin, CFG(SCALE)):
            check_close(sd_call(twin), sd_call(SD.build(), SCALE), 0)
        check_close(sd_call(twin), plain, 0)
