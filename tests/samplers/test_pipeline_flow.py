"""Flow pipelines: the way ends at the clean image, and every evaluation counts."""

import itertools

import pytest
import torch
from pipelines import PIPELINES

from diffaccel.samplers.registry import SAMPLERS

NAMES = [case.name for case in PIPELINES.values() if case.family == "flow"]


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_levels_fall_from_noise_to_the_clean_image(sampler, name, steps):
    case = PIPELINES[name]
    pipe = case.build(sampler)
    case.call(pipe, steps)
    scheduler = pipe.scheduler
    starts = scheduler.sigmas[:-1][:: scheduler.stages]
    nodes = [*starts.tolist(), float(scheduler.sigmas[-1])]
    assert nodes[0] == 1.0 and nodes[-1] == 0.0 and len(nodes) == steps + 1
    assert all(later < earlier for earlier, later in itertools.pairwise(nodes))
    torch.testing.assert_close(scheduler.timesteps, scheduler.sigmas[:-1] * 1000)
    if name == "ltx" and steps > 1:
        assert nodes[-2] == pytest.approx(0.1)  # shift_terminal


@pytest.mark.parametrize("name", ["sd3", "wan", "ltx"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_evaluation_is_wasted(sampler, name):
    """Stock UniPC and DEIS spend their last evaluation on a step of length 0."""
    case = PIPELINES[name]
    pipe = case.build(sampler)
    expected, calls = case.call(pipe, 3), len(pipe.scheduler.timesteps)
    for changed in range(calls):
        with case.watched(pipe, lambda index, output, changed=changed: output + 0.1 * (index == changed)):
            effect = float((case.call(pipe, 3) - expected).abs().max())
        assert effect > 1e-3, f"evaluation {changed} of {calls} has no effect"
