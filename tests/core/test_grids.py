import math
import warnings

import diffusers
import pytest
import torch

from diffaccel.core.errors import UsageError
from diffaccel.core.grids import GRIDS, Grid, Options, make_grid, shift_from_mu
from diffaccel.core.schedule import VE, Flow, VPCosine, VPLinear, from_diffusers

DISCRETE = from_diffusers({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
SCHEDULES = [DISCRETE, VPLinear(), VPCosine(), VE(), Flow(), from_diffusers({"trained_betas": [0.1, 0.3]})]


def whole(grid):
    return [int(t) for t in grid.times[:-1]]


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_every_grid_is_decreasing_and_ends_where_it_should(kind, end):
    for schedule in SCHEDULES:
        for steps in (1, 2, 3, 10, 999, 1000):
            grid = make_grid(schedule, steps, kind, end=end, options=Options(steps_offset=1))
            assert grid.steps == steps and all(a > b for a, b in zip(grid.rho, grid.rho[1:], strict=False))
            assert schedule.t_min <= grid.times[-2] and grid.times[0] <= schedule.t_max
            if kind != "leading":
                assert grid.times[0] == pytest.approx(schedule.t_max)
            if end == "zero":
                assert (grid.alpha[-1], grid.sigma[-1]) == (1.0, 0.0)
            else:
                assert grid.times[-1] == schedule.t_min


@pytest.mark.parametrize("steps", [5, 10, 50])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_discrete_spacings_equal_diffusers(spacing, steps):
    stock = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    stock.set_timesteps(steps)
    grid = make_grid(DISCRETE, steps, spacing, options=Options(steps_offset=1))
    assert whole(grid) == stock.timesteps.tolist()


@pytest.mark.parametrize("steps", [5, 10, 25])
def test_linspace_down_to_sigma_min_equals_diffusers_deis(steps):
    stock = diffusers.DEISMultistepScheduler(timestep_spacing="linspace")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        stock.set_timesteps(steps)
    grid = make_grid(from_diffusers(stock), steps, "linspace", end="sigma_min")
    assert whole(grid) == stock.timesteps.tolist()
    torch.testing.assert_close(torch.tensor(grid.rho), stock.sigmas, rtol=1e-4, atol=1e-6)


def test_karras_equals_diffusers():
    stock = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, use_karras_sigmas=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        stock.set_timesteps(10)
    grid = make_grid(DISCRETE, 10, "karras")
    torch.testing.assert_close(torch.tensor(grid.rho), stock.sigmas, rtol=1e-4, atol=1e-5)


def test_power_rule_and_log_snr():
    grid = make_grid(VPLinear(), 10, "quadratic", end="sigma_min")
    expected = [(1 + i / 10 * (math.sqrt(1e-3) - 1)) ** 2 for i in range(11)]
    assert grid.times == pytest.approx(expected)
    log_rho = torch.tensor(make_grid(VPLinear(), 8, "log-snr", end="sigma_min").rho).log()
    torch.testing.assert_close(log_rho.diff(), log_rho.diff().mean().expand(8), rtol=1e-4, atol=0)


@pytest.mark.parametrize("mu", [None, 0.8])
def test_flow_shift_equals_flow_match_euler(mu):
    shift = 3.0 if mu is None else shift_from_mu(mu)
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=mu is not None)
    sigmas = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    stock.set_timesteps(sigmas=sigmas.tolist(), mu=mu)
    for grid in (make_grid(Flow(), 10, shift=shift), make_grid(Flow(), sigmas=sigmas.tolist(), shift=shift)):
        torch.testing.assert_close(torch.tensor(grid.sigma), stock.sigmas, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(torch.tensor(grid.times[:-1]), stock.timesteps, rtol=1e-6, atol=1e-4)


def test_terminal_stretch_equals_flow_match_euler():
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0, shift_terminal=0.1)
    sigmas = torch.linspace(1, 0.2, 5, dtype=torch.float64).tolist()
    stock.set_timesteps(sigmas=sigmas)
    grid = make_grid(Flow(), sigmas=sigmas, shift=2.0, shift_terminal=0.1)
    torch.testing.assert_close(torch.tensor(grid.sigma), stock.sigmas, rtol=1e-6, atol=1e-7)


def test_explicit_levels():
    ays = [14.6146, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]
    grid = make_grid(DISCRETE, sigmas=ays)
    assert grid.steps == 10 and grid.rho == pytest.approx(ays, rel=1e-5)
    assert whole(make_grid(DISCRETE, timesteps=[999, 500, 20])) == [999, 500, 20]
    again = make_grid(DISCRETE, sigmas=make_grid(DISCRETE, 10).rho)
    assert again.times == make_grid(DISCRETE, 10).times
    tail = again.tail(4)
    assert tail.steps == 6 and tail.times == again.times[4:]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 0}, "at least 1"),
        ({"steps": 2.5}, "whole number"),
        ({"steps": 5, "kind": "karas"}, "Did you mean 'karras'"),
        ({"steps": 5, "end": "one"}, "sigma_min, zero"),
        ({"timesteps": [1, 2], "sigmas": [1.0]}, "either"),
        ({"timesteps": [10, 20]}, "strictly decreasing"),
        ({"timesteps": [1000, 20]}, "between 0 and 999"),
        ({"timesteps": []}, "non-empty"),
        ({"sigmas": [700.0, 1.0]}, "between"),
        ({"steps": 4, "sigmas": [5.0, 1.0]}, "2 timesteps or sigmas"),
    ],
)
def test_unusable_levels_are_refused(arguments, words):
    with pytest.raises(UsageError, match=words):
        make_grid(DISCRETE, **arguments)


def test_grid_and_shift_errors():
    with pytest.raises(UsageError, match=r"\(0, 1\]"):
        make_grid(Flow(), sigmas=[1.5, 0.5])
    with pytest.raises(UsageError, match="exponential"):
        shift_from_mu(1.0, "cubic")
    with pytest.raises(UsageError, match="two nodes"):
        Grid(Flow(), (1.0,), (0.0,), (1.0,))
