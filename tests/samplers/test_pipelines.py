"""Drop-in use: every sampler in every kind of pipeline."""

import functools

import diffusers
import pytest
import torch
from pipelines import PIPELINES, check_close, is_stochastic, one_of_each_class

import diffaccel
from diffaccel.core.schedule import from_diffusers
from diffaccel.samplers.registry import SAMPLERS

VP = [name for name, case in PIPELINES.items() if case.family == "vp"]
OWN = ("SearchedScheduler", "FewStepScheduler")  # have a plan, or a list of times
CLASSES = [name for name in diffaccel.__all__ if name.endswith("Scheduler") and name not in OWN]
STEPS = 4


@functools.cache
def fine(name: str) -> torch.Tensor:
    """What the pipeline converges to."""
    case = PIPELINES[name]
    return case.call(case.build("ddim", timestep_spacing="trailing"), 64)


@functools.cache
def released(name: str) -> torch.Tensor:
    case = PIPELINES[name]
    return case.call(case.build())


def few(name: str) -> int:
    return 8 if name == "svd" else STEPS  # its noise starts at σ = 700, too far for Runge–Kutta in 4 steps


def check_result(name: str, result: torch.Tensor, stochastic: bool = False) -> None:
    """Not merely finite: few steps land near the many, in size and, without noise on the way, in direction.

    An untrained network leaves x/α as it is, so a grid that begins at a cleaner level ends up smaller.
    """
    assert bool(torch.isfinite(result).all())
    size, cosine = result.norm() / fine(name).norm(), torch.cosine_similarity(result.flatten(), fine(name).flatten(), 0)
    assert 0.05 < float(size) < 2.5
    assert stochastic or float(cosine) > 0.9


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_in_every_pipeline(sampler, name):
    case, calls = PIPELINES[name], SAMPLERS[sampler].nfe_per_step
    pipe = case.build(sampler)
    with case.watched(pipe) as evaluations:
        result = case.call(pipe, few(name))
    check_result(name, result, is_stochastic(sampler))
    assert len(evaluations) == len(pipe.scheduler.timesteps) == pipe.scheduler.step_index
    assert (few(name) - 1) * calls < len(evaluations) <= few(name) * calls


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("cls", CLASSES)
def test_the_documented_swap(cls, name):
    case = PIPELINES[name]
    pipe = case.build()
    pipe.scheduler = getattr(diffaccel, cls).from_config(pipe.scheduler.config)
    check_result(name, case.call(pipe, few(name)))


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_is_ddim(sampler, name):
    case, clean = PIPELINES[name], {"set_alpha_to_one": True}  # SD says False, which only DDIM reads
    pipe = case.build(sampler, **(clean if sampler in ("ddim", "ddpm") else {}))
    with case.watched(pipe) as evaluations:
        result = case.call(pipe, 1)
    assert len(evaluations) == 1
    check_close(result, case.call(case.build("ddim", grid=pipe.scheduler.config.grid, **clean), 1), 1e-4)


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("sampler", one_of_each_class())
def test_switching_back_restores_the_stock_result(sampler, name):
    case = PIPELINES[name]
    pipe = case.build()
    stock, pipe.scheduler = pipe.scheduler, SAMPLERS[sampler].build(pipe.scheduler.config)
    case.call(pipe, 2)
    pipe.scheduler = type(stock).from_config(pipe.scheduler.config)
    check_close(case.call(pipe), released(name), 0)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("name", [name for name in VP if name != "cogvideox"])
def test_ddim_equals_stock_ddim(name, spacing):
    case = PIPELINES[name]
    pipe = case.build()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing=spacing, steps_offset=1, clip_sample=False
    )
    expected = case.call(pipe)
    pipe.scheduler = diffaccel.DDIMScheduler.from_config(pipe.scheduler.config)
    check_close(case.call(pipe), expected)


def test_ddim_equals_the_scheduler_of_cogvideox():
    """v-prediction up to zero terminal SNR, on a schedule bent by ``snr_shift_scale``."""
    case = PIPELINES["cogvideox"]
    # Terminal SNR is 0 there and a tiny positive number here.
    check_close(case.call(case.build("ddim")), released("cogvideox"), 1e-4)


@pytest.mark.parametrize("name", ["sd3", "flux", "flux-dynamic", "ltx"])
def test_ddim_equals_flow_match_euler(name):
    case = PIPELINES[name]
    # Without sigmas of the caller's, stock SD3 shifts twice.
    arguments = {"sigmas": torch.linspace(1, 1 / STEPS, STEPS).tolist()} if name == "sd3" else {}
    expected = case.call(case.build(), **arguments)
    check_close(case.call(case.build("ddim"), **arguments), expected)


def test_ddim_equals_the_euler_scheduler_of_stable_video_diffusion():
    """v-prediction at continuous noise levels of EDM."""
    case = PIPELINES["svd"]
    check_close(case.call(case.build("ddim")), released("svd"))


def test_ddim_equals_flow_match_euler_where_sigmas_are_left_to_the_scheduler():
    case = PIPELINES["wan"]
    pipe = case.build()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    expected = case.call(pipe)
    pipe.scheduler = diffaccel.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    check_close(case.call(pipe), expected)


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_explicit_timesteps_and_sigmas_of_vp_pipelines(sampler, name):
    case, times = PIPELINES[name], [900, 500, 200, 30]
    pipe = case.build(sampler)
    by_times = case.call(pipe, steps=None, timesteps=times)
    check_nodes(sampler, pipe.scheduler, times)
    sigmas = from_diffusers(pipe.scheduler).rho(times).tolist()
    by_sigmas = case.call(pipe, steps=None, sigmas=sigmas)
    check_nodes(sampler, pipe.scheduler, times)
    check_close(by_sigmas, by_times, 1e-4)
    assert bool(torch.isfinite(by_times).all())


@pytest.mark.parametrize("name", ["sd3", "flux", "flux-dynamic"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_explicit_sigmas_of_flow_pipelines(sampler, name):
    case, sigmas = PIPELINES[name], [1.0, 0.6, 0.3]
    pipe, stock = case.build(sampler), case.build()
    case.call(stock, steps=None, sigmas=sigmas)
    with case.watched(pipe) as evaluations:
        result = case.call(pipe, steps=None, sigmas=sigmas)
    check_result(name, result, is_stochastic(sampler))
    check_nodes(sampler, pipe.scheduler, stock.scheduler.timesteps.tolist())
    assert len(evaluations) == len(pipe.scheduler.timesteps)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_explicit_sigmas_of_stable_video_diffusion(sampler):
    case, sigmas = PIPELINES["svd"], [500.0, 40.0, 3.0, 0.2]
    pipe = case.build(sampler)
    assert bool(torch.isfinite(case.call(pipe, steps=None, sigmas=sigmas)).all())
    starts = pipe.scheduler.sigmas[:-1][:: SAMPLERS[sampler].nfe_per_step]
    assert starts.tolist() == pytest.approx(sigmas, rel=1e-5)


def check_nodes(sampler: str, scheduler, times: list[float]) -> None:
    """The steps start at these times."""
    assert scheduler.timesteps[:: SAMPLERS[sampler].nfe_per_step].tolist() == pytest.approx(times)
