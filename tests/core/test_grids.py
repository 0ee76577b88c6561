import math
import warnings

import diffusers
import numpy as np
import pytest
import torch

from diffaccel.core.errors import UsageError
from diffaccel.core.grids import GRIDS, Grid, Options, make_grid, shift_from_mu
from diffaccel.core.schedule import EDM, VE, Flow, VPCosine, VPLinear, from_diffusers

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DISCRETE = from_diffusers(SD)
SCHEDULES = [
    DISCRETE,
    from_diffusers({**SD, "rescale_betas_zero_snr": True}),
    from_diffusers({"trained_betas": [0.1, 0.3]}),
    VPLinear(),
    VPCosine(),
    VE(),
    EDM(),
    EDM(0.002, 700.0, 1.0),
    Flow(),
]
STEPS = (1, 2, 3, 5, 10, 50, 100, 999, 1000)


def whole(grid):
    return [int(t) for t in grid.times[:-1]]


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_every_grid_is_decreasing_and_ends_where_it_should(kind, end):
    for schedule in SCHEDULES:
        if kind.startswith("ays") and isinstance(schedule, Flow):
            with pytest.raises(UsageError, match=r"VP and EDM.*'trailing'"):
                make_grid(schedule, 10, kind, end=end)
            continue
        for steps in STEPS:
            grid = make_grid(schedule, steps, kind, end=end, options=Options(steps_offset=1))
            assert grid.steps == steps and all(a > b for a, b in zip(grid.rho, grid.rho[1:], strict=False))
            assert schedule.t_min <= grid.times[-2] and grid.times[0] <= schedule.t_max
            if kind == "fast" and float(schedule.rho(schedule.t_max)) < 1000 and not isinstance(schedule, VE):
                assert grid.rho[0] == pytest.approx(min(float(schedule.rho(schedule.t_max)), max(20, 4 * steps)))
            elif kind != "leading":
                assert grid.times[0] == pytest.approx(schedule.t_max)
            if end == "zero":
                assert (grid.alpha[-1], grid.sigma[-1], grid.times[-1]) == (1.0, 0.0, schedule.t_end)
            else:
                assert grid.times[-1] == schedule.t_min
                assert grid.rho[-1] == pytest.approx(float(schedule.rho(schedule.t_min)))


@pytest.mark.parametrize("kind", [kind for kind in GRIDS if not kind.startswith("ays")])
@pytest.mark.parametrize(("shift", "terminal"), [(0.3, None), (3.0, None), (0.5, 0.1), (3.0, 0.02)])
def test_every_shifted_grid_is_decreasing(kind, shift, terminal):
    for steps in STEPS:
        for end in ("zero", "sigma_min"):
            grid = make_grid(Flow(), steps, kind, end=end, shift=shift, shift_terminal=terminal)
            assert grid.steps == steps and all(math.isfinite(t) for t in grid.times)
            assert kind == "leading" or (grid.alpha[0], grid.sigma[0]) == (0.0, 1.0)
            if terminal and steps > 1:
                assert grid.sigma[-2] == pytest.approx(terminal)


def test_an_edm_run_ends_in_the_scale_of_the_data():
    grid = make_grid(EDM(0.002, 80.0, 0.5), 5, "karras", end="sigma_min")
    assert (grid.alpha[-1], grid.sigma[-1]) == pytest.approx((1.0, 0.002))
    assert grid.alpha[0] == pytest.approx((80.0**2 + 0.25) ** -0.5) and grid.sigma[0] == pytest.approx(1.0, abs=1e-4)


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


@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("arguments", [{"mu": 0.8}, {"shift": 3.0}, {"shift": 3.0, "shift_terminal": 0.1}])
@pytest.mark.parametrize("explicit", [True, False])
def test_rules_in_noise_on_a_shifted_flow_equal_flow_match_euler(kind, arguments, explicit):
    mu, terminal = arguments.get("mu"), arguments.get("shift_terminal")
    stock = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=arguments.get("shift", 1.0),
        use_dynamic_shifting=mu is not None,
        shift_terminal=terminal,
        **{f"use_{kind}_sigmas": True},
    )
    # Without explicit sigmas a static shift moves the lower end twice there; given the table's ends it moves once.
    sigmas = np.linspace(1.0, 0.125 if explicit else 0.001, 8)
    stock.set_timesteps(sigmas=sigmas, mu=mu)
    shift = shift_from_mu(mu) if mu else arguments["shift"]
    grid = make_grid(
        Flow(), None if explicit else 8, kind, shift=shift, shift_terminal=terminal, sigmas=sigmas if explicit else None
    )
    torch.testing.assert_close(torch.tensor(grid.sigma), stock.sigmas, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(torch.tensor(grid.times[:-1]), stock.timesteps, rtol=2e-6, atol=1e-4)


def test_explicit_levels():
    ays = [14.6146, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]
    grid = make_grid(DISCRETE, sigmas=ays)
    assert grid.steps == 10 and grid.rho == pytest.approx(ays, rel=1e-5)
    assert make_grid(DISCRETE, sigmas=ays, kind="karras").times == grid.times
    assert whole(make_grid(DISCRETE, timesteps=[999, 500, 20])) == [999, 500, 20]
    again = make_grid(DISCRETE, sigmas=make_grid(DISCRETE, 10).rho)
    assert again.times == make_grid(DISCRETE, 10).times
    tail = again.tail(4)
    assert tail.steps == 6 and tail.times == again.times[4:]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "container",
    [list, tuple, np.array, lambda v: np.array(v[::-1])[::-1], torch.tensor, lambda v: [torch.tensor(x) for x in v]],
    ids=["list", "tuple", "array", "reversed-array", "tensor", "list-of-tensors"],
)
def test_explicit_levels_in_any_container(schedule, container):
    expected = make_grid(schedule, 5, "linspace")
    times, rho = list(expected.times[:-1]), list(expected.sigma if isinstance(schedule, Flow) else expected.rho)
    for arguments in ({"timesteps": container(times)}, {"sigmas": container(rho)}, {"sigmas": container(rho[:-1])}):
        assert make_grid(schedule, **arguments).times == pytest.approx(expected.times, rel=2e-5, abs=2e-5)


def test_explicit_levels_of_pipelines():
    sigmas = np.linspace(1.0, 1 / 4, 4)  # FLUX
    assert make_grid(Flow(), sigmas=sigmas).sigma == pytest.approx((1.0, 0.75, 0.5, 0.25, 0.0))
    assert make_grid(Flow(), 4, sigmas=sigmas).times == make_grid(Flow(), 4).times
    edm = EDM()
    published = torch.tensor(make_grid(edm, 7, "karras").times[:-1], dtype=torch.float32)  # rounded beyond the ends
    assert make_grid(edm, timesteps=published).times[0] <= edm.t_max


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
        ({"sigmas": [[1.0, 0.5]]}, "non-empty"),
        ({"sigmas": 1.0}, "lists"),
        ({"sigmas": ["a"]}, "numbers"),
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
    with pytest.raises(UsageError, match="above 0"):
        make_grid(Flow(), 4, shift=0.0)
    with pytest.raises(UsageError, match="exponential"):
        shift_from_mu(1.0, "cubic")
    with pytest.raises(UsageError, match="two nodes"):
        Grid(Flow(), (1.0,), (0.0,), (1.0,))
