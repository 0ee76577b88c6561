"""Searched plans in every kind of pipeline: from noise, from a picture, in half precision, saved and loaded."""

import copy
import functools
import json

import diffusers
import pytest
import torch
from pipelines import IMAGE_TO_IMAGE, INPAINTING, PIPELINES, check_close

from diffaccel.core.errors import UsageError
from diffaccel.core.grids import make_grid
from diffaccel.core.schedule import from_diffusers
from diffaccel.samplers.log_snr import unipc_plan
from diffaccel.samplers.searched import PlanFile, SearchedScheduler, model_config
from diffaccel.samplers.usf import Decision, SolverSchedule

STEPS = (
    Decision(), Decision(2, "velocity", "angle", corrector="implicit"), Decision(3, "data", corrector="pseudo"),
    Decision(2, start=2), Decision(2, "data"),
)  # fmt: skip
NFE = 6


def plan_for(case, raw: bool = False, skip_first: bool = False) -> PlanFile:
    """A plan of `NFE` calls on the noise schedule of a pipeline, with one node that is called twice; or a raw one."""
    config = case.build().scheduler.config
    schedule = from_diffusers(case.build().scheduler)
    if raw:
        return PlanFile(unipc_plan(make_grid(schedule, NFE), 2), None, model_config(config))
    times = tuple(float(schedule.time(share)) for share in (1.0, 0.85, 0.6, 0.35, 0.1))
    steps = (Decision(corrector="implicit"), *STEPS[1:]) if skip_first else STEPS
    decisions = SolverSchedule(times, steps, skip_first=skip_first)
    return PlanFile(decisions.compile(schedule), decisions, model_config(config))


def build(case, file: PlanFile):
    """The pipeline with the plan as its scheduler."""
    pipe = case.build()
    pipe.scheduler = SearchedScheduler.from_config(pipe.scheduler.config, plan=file.to_dict())
    return pipe


def strength_for(case, calls: int) -> float:
    """With which a pipeline makes this many of `NFE` calls; those for VP round down, those for flows up."""
    return min(1.0, (calls + (0.01 if case.family == "vp" else -0.01)) / NFE)


@functools.cache
def fine(name: str) -> torch.Tensor:
    """What the pipeline converges to."""
    return PIPELINES[name].call(PIPELINES[name].build("ddim", timestep_spacing="trailing"), 32)


WAYS = [(name, kind) for name in PIPELINES for kind in ("decided", "raw")]
WAYS += [(name, "skip_first") for name, case in PIPELINES.items() if case.family != "flow"]


@pytest.mark.parametrize(("name", "kind"), WAYS)
def test_a_plan_runs_in_every_pipeline(name, kind):
    case = PIPELINES[name]
    file = plan_for(case, **({} if kind == "decided" else {kind: True}))
    pipe = build(case, file)
    with case.watched(pipe) as evaluations:
        result = case.call(pipe, file.plan.nfe)
    assert len(evaluations) == file.plan.nfe == NFE == pipe.scheduler.step_index
    assert pipe.scheduler.init_noise_sigma == file.plan.initial
    assert bool(torch.isfinite(result).all())
    if kind != "skip_first":  # untrained networks do not say x0 = 0
        assert float(torch.cosine_similarity(result.flatten(), fine(name).flatten(), 0)) > 0.9
    with pytest.raises(UsageError, match="num_inference_steps=6 instead of 4"):
        case.call(pipe, 4)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_saved_pipeline_keeps_its_plan(name, tmp_path):
    case = PIPELINES[name]
    file = plan_for(case, skip_first=case.family != "flow")
    pipe = build(case, file)
    expected = case.call(pipe, NFE)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffaccel", "SearchedScheduler"]
    absent = {part: None for part, value in index.items() if value == [None, None]}
    loaded = type(pipe).from_pretrained(tmp_path, **absent)
    assert loaded.scheduler.file == file
    loaded.set_progress_bar_config(disable=True)
    for weight in getattr(loaded, case.network).parameters():
        weight.data = weight.data.clone()  # files leave them unaligned, which changes the last bits of a product
    check_close(case.call(loaded, NFE), expected, 1e-6)


@pytest.mark.parametrize("name", ["sd", "cogvideox", "sd3", "wan", "svd"])
def test_a_file_knows_the_model_it_was_made_for(name, tmp_path):
    """Without the pipeline's configuration the one in the file says the same about noise and network."""
    case = PIPELINES[name]
    plan_for(case).save(tmp_path / "plan.json")
    pipe = case.build()
    pipe.scheduler = SearchedScheduler.from_file(tmp_path / "plan.json", pipe.scheduler.config)
    expected = case.call(pipe, NFE)
    pipe.scheduler = SearchedScheduler.from_file(tmp_path / "plan.json")
    check_close(case.call(pipe, NFE), expected, 0)
    other = PIPELINES["ddpm" if name != "ddpm" else "sd"].build().scheduler.config
    with pytest.raises(UsageError, match="another noise schedule"):
        SearchedScheduler.from_file(tmp_path / "plan.json", other)


@pytest.mark.parametrize("name", ["sd", "flux", "svd"])
def test_swapping_there_and_back(name):
    case = PIPELINES[name]
    pipe = case.build()
    stock, expected = type(pipe.scheduler), case.call(pipe, 4)
    pipe.scheduler = SearchedScheduler.from_config(pipe.scheduler.config, plan=plan_for(case).to_dict())
    searched = case.call(pipe, NFE)
    pipe.scheduler = stock.from_config(pipe.scheduler.config)
    check_close(case.call(pipe, 4), expected, 0)
    pipe.scheduler = SearchedScheduler.from_config(pipe.scheduler.config)
    check_close(case.call(pipe, NFE), searched, 0)


@pytest.mark.parametrize("raw", [False, True], ids=["decided", "raw"])
@pytest.mark.parametrize("name", IMAGE_TO_IMAGE)
def test_image_to_image_begins_at_any_call(name, raw):
    """At both calls of a node that has two, too; only the calls that remain are made."""
    case = IMAGE_TO_IMAGE[name]
    file = plan_for(case, raw)
    for left in range(1, NFE + 1):
        pipe = build(case, file)
        with case.watched(pipe) as evaluations:
            result = case.call(pipe, NFE, strength=strength_for(case, left))
        assert bool(torch.isfinite(result).all())
        scheduler = pipe.scheduler
        assert scheduler.step_index == NFE and scheduler.begin_index == NFE - left and len(evaluations) == left


@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("name", INPAINTING)
def test_inpainting_keeps_the_rest_of_the_picture(name, skip_first):
    case = INPAINTING[name]
    for left in (2, 3, 4, NFE):
        pipe = build(case, plan_for(case, skip_first=skip_first))
        with case.watched(pipe) as evaluations:
            result = case.call(pipe, NFE, strength=strength_for(case, left))
        kept = case.call(case.build(), 4, strength=0.5)[..., 4:]
        assert len(evaluations) == left
        check_close(result[..., 4:], kept, 1e-6)


@pytest.mark.parametrize("name", INPAINTING)
def test_what_a_pipeline_changes_between_steps_counts(name):
    """Inpainting puts the known half back after every step: first-order decisions are DDIM there as well."""
    case = INPAINTING[name]
    pipe = case.build("ddim", set_alpha_to_one=True)
    expected = case.call(pipe, 5, strength=1.0)
    schedule, times = from_diffusers(pipe.scheduler), tuple(pipe.scheduler.timesteps.double().tolist())
    decisions = SolverSchedule(times, (Decision(),) * 5)
    file = PlanFile(decisions.compile(schedule), decisions, model_config(pipe.scheduler.config))
    check_close(case.call(build(case, file), 5, strength=1.0), expected, 1e-4)


@pytest.mark.parametrize(("name", "dtype"), [("flux", torch.float16), ("sd", torch.bfloat16), ("sd3", torch.bfloat16)])
def test_half_precision(name, dtype):
    case = PIPELINES[name]
    pipe, half = build(case, plan_for(case)), copy.deepcopy(case.build()).to(dtype)
    exact = case.call(pipe, NFE)
    half.scheduler = copy.deepcopy(pipe.scheduler)
    result = case.call(half, NFE)
    assert result.dtype == dtype
    assert float((result - exact).norm() / exact.norm()) < 0.2


def test_a_run_split_between_base_and_refiner():
    base, refiner = PIPELINES["sdxl"], IMAGE_TO_IMAGE["sdxl"]
    first, second = build(base, plan_for(base)), build(refiner, plan_for(refiner))
    with base.watched(first) as before:
        latents = base.call(first, NFE, denoising_end=0.5)
    with refiner.watched(second) as after:
        result = refiner.call(second, NFE, image=latents, denoising_start=0.5)
    assert before and after and len(before) + len(after) == NFE
    assert bool(torch.isfinite(result).all()) and isinstance(second, diffusers.StableDiffusionXLImg2ImgPipeline)
