"""What one call leaves behind for the next, for a neighbour in the batch and for another pipeline: nothing."""

import copy
import functools

import pytest
import torch
from pipelines import PIPELINES, check_close, is_stochastic

from diffaccel.samplers.registry import SAMPLERS

# With and without generator, begin index, explicit sigmas and mu; images, packed tokens and video.
WAYS = ["sdxl", "dit", "flux-dynamic", "wan"]
STEPS = 4


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_call_leaves_nothing_behind(sampler, name):
    case = PIPELINES[name]
    pipe = case.build(sampler)
    config = dict(pipe.scheduler.config)
    first = case.call(pipe, STEPS)
    case.call(pipe, 2, seed=1)
    check_close(case.call(pipe, STEPS), first, 0)

    def stop(index, output):
        if index == 1:
            raise KeyboardInterrupt
        return output

    with pytest.raises(KeyboardInterrupt), case.watched(pipe, stop):
        case.call(pipe, STEPS)
    check_close(case.call(pipe, STEPS), first, 0)
    assert dict(pipe.scheduler.config) == config


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_two_pipelines_at_once(sampler, name):
    """The second starts and finishes while the first is under way, with a copy of its busy scheduler."""
    case = PIPELINES[name]
    pipe, other = case.build(sampler), case.build()
    expected, other_expected = case.call(pipe, STEPS), case.call(pipe, 3, seed=1)
    others = []

    def meanwhile(index, output):
        if index == 2 and not others:
            others.append(None)
            other.scheduler = copy.deepcopy(pipe.scheduler)
            others[0] = case.call(other, 3, seed=1)
        return output

    with case.watched(pipe, meanwhile):
        check_close(case.call(pipe, STEPS), expected, 0)
    check_close(others[0], other_expected, 0)


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        (sampler, name)
        for sampler in SAMPLERS
        for name in ("sd", "ddpm", "cogvideox", *WAYS)
        if PIPELINES[name].seeded or not is_stochastic(sampler)
    ],
)
def test_a_batch_is_its_samples(sampler, name):
    case = PIPELINES[name]
    pipe = case.build(sampler)
    alone = [case.call(pipe, 3, seed=seed) for seed in (0, 1)]
    check_close(case.call(pipe, 3, seed=[0, 1]), torch.cat(alone), 5e-5)


@functools.cache
def in_precision(name: str, dtype: torch.dtype):
    return copy.deepcopy(PIPELINES[name].build()).to(dtype)


HALVES = [(name, torch.bfloat16) for name in ("sd", "ddpm", "classes", "animatediff", "sd3")]


@pytest.mark.parametrize(("name", "dtype"), [*HALVES, ("flux", torch.float16)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_half_precision(sampler, name, dtype):
    case, half = PIPELINES[name], in_precision(name, dtype)
    pipe = case.build(sampler)
    exact = case.call(pipe, 3)
    half.scheduler = pipe.scheduler
    result = case.call(half, 3)
    assert result.dtype == dtype and bool(torch.isfinite(result).all())
    error = float((result - exact).norm() / exact.norm())
    assert error < 0.2 or SAMPLERS[sampler].nfe_per_step > 1  # differences of stages amplify the network's rounding
