"""Pipelines that begin in the middle: image to image, inpainting, SDXL in two parts."""

import diffusers
import pytest
import torch
from pipelines import IMAGE_TO_IMAGE, INPAINTING, PIPELINES, check_close

import diffaccel
from diffaccel.samplers.registry import SAMPLERS

STEPS = 4


def steps_left(case, strength: float) -> int:
    """The pipelines' own rounding."""
    if case.family == "vp":
        return min(int(STEPS * strength), STEPS)
    return STEPS - int(STEPS - STEPS * strength)


def run_from(case, sampler: str, strength: float) -> torch.Tensor:
    """Call with ``strength`` and check that just the steps that remain are made."""
    pipe, per_step = case.build(sampler), SAMPLERS[sampler].nfe_per_step
    with case.watched(pipe) as evaluations:
        result = case.call(pipe, STEPS, strength=strength)
    scheduler, calls = pipe.scheduler, len(pipe.scheduler.timesteps)
    assert bool(torch.isfinite(result).all())
    assert scheduler.step_index == calls == scheduler.begin_index + len(evaluations)
    if per_step == 1:
        assert len(evaluations) == steps_left(case, strength)
    else:  # pipelines that pass sigmas count calls as steps
        assert abs(len(evaluations) - strength * calls) <= per_step
    return result


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.3])
@pytest.mark.parametrize("name", IMAGE_TO_IMAGE)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_to_image(sampler, name, strength):
    case = IMAGE_TO_IMAGE[name]
    run_from(case, sampler, strength)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", IMAGE_TO_IMAGE)
def test_image_to_image_equals_stock(name, strength):
    case = IMAGE_TO_IMAGE[name]
    pipe = case.build()
    arguments = {"strength": strength}
    if case.family == "vp":
        pipe.scheduler = diffusers.DDIMScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False
        )
    elif name == "sd3":  # without sigmas of the caller's it shifts twice
        arguments["sigmas"] = torch.linspace(1, 1 / STEPS, STEPS).tolist()
    expected = case.call(pipe, STEPS, **arguments)
    pipe.scheduler = diffaccel.DDIMScheduler.from_config(pipe.scheduler.config)
    check_close(case.call(pipe, STEPS, **arguments), expected)


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("name", INPAINTING)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inpainting_keeps_the_rest_of_the_picture(sampler, name, strength):
    case = INPAINTING[name]
    result = run_from(case, sampler, strength)
    kept = case.call(case.build(), STEPS, strength=strength)[..., 4:]
    check_close(result[..., 4:], kept, 1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_shared_run_of_base_and_refiner(sampler):
    base, refiner = PIPELINES["sdxl"], IMAGE_TO_IMAGE["sdxl"]
    pipe, second, whole = base.build(sampler), refiner.build(sampler), base.build(sampler)
    with base.watched(pipe) as before:
        latents = base.call(pipe, 6, denoising_end=0.5)
    with refiner.watched(second) as after:
        result = refiner.call(second, 6, image=latents, denoising_start=0.5)
    expected = base.call(whole, 6)
    missing = len(whole.scheduler.timesteps) - len(before) - len(after)
    assert before and after and missing in (0, -1)  # the refiner repeats a call rather than begin amid a step of two
    assert bool(torch.isfinite(result).all())
    if sampler == "ddim":  # without memory nothing is lost between the two
        check_close(result, expected)
