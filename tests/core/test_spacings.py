import warnings

import diffusers
import pytest
import torch
from diffusers.schedulers import AysSchedules

from diffaccel.core.errors import UsageError
from diffaccel.core.grids import make_grid
from diffaccel.core.schedule import EDM, Flow, VPCosine, VPLinear, from_diffusers
from diffaccel.core.spacings import AYS_SIGMAS, Options

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DISCRETE = from_diffusers(SD)


def stock_levels(stock, steps):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        stock.set_timesteps(steps)
    return stock.sigmas


@pytest.mark.parametrize("steps", [1, 2, 10, 33])
@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("cls", [diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler])
def test_levels_on_a_table_equal_diffusers(cls, kind, steps):
    for config in (SD, {"beta_schedule": "squaredcos_cap_v2"}):
        stock = cls(**config, timestep_spacing="linspace", **{f"use_{kind}_sigmas": True})
        if cls is diffusers.EulerDiscreteScheduler and steps == 1:
            continue  # takes its range from the one level that its spacing gives
        grid = make_grid(from_diffusers(stock), steps, kind)
        torch.testing.assert_close(torch.tensor(grid.rho), stock_levels(stock, steps), rtol=5e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 10, 33])
def test_uniform_lambda_is_what_diffusers_computes_for_lu(steps):
    stock = diffusers.DPMSolverMultistepScheduler(**SD, use_lu_lambdas=True)
    grid = make_grid(DISCRETE, steps, "log-snr")
    torch.testing.assert_close(torch.tensor(grid.rho), stock_levels(stock, steps), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [2, 10, 33])
@pytest.mark.parametrize(("kind", "rho"), [("karras", 7.0), ("karras", 3.0), ("exponential", 7.0)])
@pytest.mark.parametrize("cls", [diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler])
def test_levels_of_edm_equal_diffusers(cls, kind, rho, steps):
    stock = cls(sigma_schedule=kind, rho=rho)
    grid = make_grid(EDM(), steps, kind, options=Options(power=rho))
    torch.testing.assert_close(torch.tensor(grid.rho), stock_levels(stock, steps), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(torch.tensor(grid.times[:-1]), stock.timesteps, rtol=1e-5, atol=1e-5)


def test_exponential_is_log_snr_except_on_flows():
    assert make_grid(DISCRETE, 9, "exponential").times == pytest.approx(make_grid(DISCRETE, 9, "log-snr").times)
    sigma = torch.tensor(make_grid(Flow(), 9, "exponential").sigma[:-1])
    rho = torch.tensor(make_grid(Flow(), 9, "log-snr").rho[1:-1])
    for level in (sigma, rho):
        steps = level.log().diff()
        torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=1e-4, atol=1e-6)


def test_log_snr_and_quadratic():
    log_rho = torch.tensor(make_grid(VPLinear(), 8, "log-snr", end="sigma_min").rho).log()
    torch.testing.assert_close(log_rho.diff(), log_rho.diff().mean().expand(8), rtol=1e-4, atol=0)
    for power in (None, 3.0, 0.7):
        kappa = power or 2.0
        for schedule in (VPLinear(), Flow(), EDM(), DISCRETE):
            grid = make_grid(schedule, 10, "quadratic", end="sigma_min", options=Options(power=power))
            roots = torch.tensor([max(t - schedule.t_clean, 0.0) ** (1 / kappa) for t in grid.times]).diff()
            torch.testing.assert_close(roots, roots.mean().expand(10), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "name", "schedule"),
    [
        ("ays-sd15", "StableDiffusion", DISCRETE),
        ("ays-sdxl", "StableDiffusionXL", DISCRETE),
        ("ays-svd", "StableDiffusionVideo", EDM(0.002, 700.0, 1.0)),
    ],
)
def test_align_your_steps(kind, name, schedule):
    table = AysSchedules[f"{name}Sigmas"]
    assert (*AYS_SIGMAS[kind], 0.0) == tuple(table)
    grid = make_grid(schedule, 10, kind)
    assert grid.rho == pytest.approx(table, rel=1e-4)
    if f"{name}Timesteps" in AysSchedules:
        assert grid.times[:-1] == pytest.approx(AysSchedules[f"{name}Timesteps"], abs=1.0)
    # Other numbers of steps lie on the same curve in log rho, whose last point is where the run ends.
    assert make_grid(schedule, 20, kind).rho[:-1:2] == pytest.approx(grid.rho[:-1])
    assert make_grid(schedule, 5, kind).rho[:-1] == pytest.approx(grid.rho[:-1:2])
    middle = make_grid(schedule, 20, kind, end="sigma_min").rho[1::2]
    assert middle[:-1] == pytest.approx([(a * b) ** 0.5 for a, b in zip(grid.rho, grid.rho[1:-1], strict=False)])
    lowest = float(schedule.rho(schedule.t_min))
    assert middle[-1] == pytest.approx((grid.rho[-2] * lowest) ** 0.5)


def test_align_your_steps_keeps_to_the_range_of_the_model():
    for schedule in (from_diffusers({"trained_betas": [0.1, 0.3]}), VPLinear(), from_diffusers({})):
        low, high = (float(schedule.rho(t)) for t in (schedule.t_min, schedule.t_max))
        for kind, table in AYS_SIGMAS.items():
            inside = [level for level in table[1:] if low < level < high]
            grid = make_grid(schedule, len(inside) + 1, kind)
            assert grid.rho[:-1] == pytest.approx([high, *inside])


@pytest.mark.parametrize("power", [0, -1.0, float("nan"), float("inf")])
def test_powers_must_be_positive(power):
    with pytest.raises(UsageError, match=r"grid_power.*above 0"):
        Options(power=power)


def test_fast_gives_every_schedule_the_same_levels():
    """They are those of the linear VP schedule: uniform in t^(1/1.75), from rho = max(20, 4 per call) at most."""
    reference = VPLinear(t_min=0.0)
    for schedule in (VPLinear(), VPCosine(), EDM(0.002, 80.0), from_diffusers({})):
        for steps, start in ((4, 20.0), (8, 32.0)):
            rho = torch.tensor(make_grid(schedule, steps, "fast").rho[:-1], dtype=torch.float64)
            roots = reference.t_from_rho(torch.cat([rho, torch.zeros(1)])) ** (1 / 1.75)
            torch.testing.assert_close(
                roots.diff(), roots.diff().mean().expand(steps), rtol=3e-2, atol=0
            )  # EDM ends at σ_min
            assert float(rho[0]) == pytest.approx(start)
    assert make_grid(VPLinear(), 60, "fast").rho[0] == pytest.approx(float(VPLinear().rho(1.0)))
    zero_snr = from_diffusers({"rescale_betas_zero_snr": True})
    assert make_grid(zero_snr, 5, "fast").times[0] == 999.0
    assert make_grid(Flow(), 5, "fast", shift=3.0).times == make_grid(Flow(), 5, "trailing", shift=3.0).times
    assert make_grid(VPLinear(), 5, "fast", options=Options(start=12.0)).rho[0] == pytest.approx(12.0)
    steep = make_grid(VPLinear(), 5, "fast", options=Options(power=3.0))
    assert steep.rho[3] < make_grid(VPLinear(), 5, "fast").rho[3]
