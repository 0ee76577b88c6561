import math

import diffusers
import pytest
import torch

from diffaccel.core.errors import UsageError
from diffaccel.core.schedule import VE, Flow, VPCosine, VPDiscrete, VPLinear, from_diffusers

SCHEDULES = [VPLinear(), VPCosine(), VE(), Flow(), from_diffusers({}), from_diffusers({"beta_schedule": "sigmoid"})]


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid", "num_train_timesteps": 200},
        {"trained_betas": [0.1, 0.3, 0.4]},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    ],
)
def test_table_equals_diffusers(config):
    stock = diffusers.DDPMScheduler(**config)
    table = from_diffusers(stock).alphas_cumprod
    assert torch.equal(table, from_diffusers(dict(stock.config)).alphas_cumprod)
    last = -1 if config.get("rescale_betas_zero_snr") else len(table)  # diffusers leaves exactly 0 there
    torch.testing.assert_close(table[:last].float(), stock.alphas_cumprod[:last], rtol=5e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_time_and_noise_level_are_inverse(schedule):
    t = torch.linspace(schedule.t_min, schedule.t_max, 37, dtype=torch.float64)
    finite = torch.isfinite(schedule.rho(t))
    torch.testing.assert_close(schedule.t_from_rho(schedule.rho(t))[finite], t[finite], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(schedule.t_from_lambda(schedule.lambda_(t))[finite], t[finite], rtol=1e-9, atol=1e-9)
    alpha, sigma = schedule.level(t)
    torch.testing.assert_close((sigma / alpha)[finite], schedule.rho(t)[finite])
    assert bool((schedule.rho(t).diff() > 0).all())
    assert float(schedule.time(0.0)) == pytest.approx(schedule.t_min)
    assert float(schedule.time(1.0)) == pytest.approx(schedule.t_max)


def test_levels_at_the_ends():
    for schedule in SCHEDULES:
        alpha, sigma = schedule.level_from_rho(torch.tensor(0.0))
        assert float(alpha) == 1.0 and float(sigma) == 0.0
    alpha, sigma = Flow().level(torch.tensor([1000.0, 250.0]))
    assert alpha.tolist() == [0.0, 0.75] and sigma.tolist() == [1.0, 0.25]
    alpha, sigma = from_diffusers({}).level_from_rho(torch.tensor(math.inf))
    assert float(alpha) == 0.0 and float(sigma) == 1.0


def test_vp_keeps_variance_and_linear_beta_integrates_to_log_alpha():
    t = torch.linspace(0.01, 1.0, 9, dtype=torch.float64)
    for schedule in (VPLinear(), VPCosine()):
        alpha, sigma = schedule.level(t)
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    expected = torch.exp(-0.25 * t**2 * 19.9 - 0.5 * t * 0.1)
    torch.testing.assert_close(VPLinear().alpha(t), expected)


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), Flow),
        (diffusers.EDMEulerScheduler(), VE),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), Flow),
        (diffusers.DDIMScheduler(), VPDiscrete),
    ],
)
def test_kind_of_a_diffusers_scheduler(scheduler, kind):
    assert isinstance(from_diffusers(scheduler), kind)


def test_errors_name_what_is_valid():
    with pytest.raises(UsageError, match="scaled_linear"):
        from_diffusers({"beta_schedule": "scaled_liner"})
    with pytest.raises(UsageError, match="decreasing"):
        VPDiscrete([0.5, 0.9])
