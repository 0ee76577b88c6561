import math

import diffusers
import pytest
import torch

from diffaccel.core.errors import UsageError
from diffaccel.core.schedule import EDM, VE, Flow, VPCosine, VPDiscrete, VPLinear, from_diffusers

SCHEDULES = [
    *(VPLinear(), VPCosine(), VE(), EDM(), EDM(0.002, 700.0, 1.0), Flow()),
    *(from_diffusers({}), from_diffusers({"beta_schedule": "sigmoid"})),
]
SVD = {  # Stable Video Diffusion
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction",
    "sigma_min": 0.002, "sigma_max": 700.0, "timestep_type": "continuous", "use_karras_sigmas": True,
}  # fmt: skip


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


@pytest.mark.parametrize("zero_snr", [False, True])
def test_shifted_table_equals_cogvideox(zero_snr):
    stock = diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=zero_snr)
    table, last = from_diffusers(stock).alphas_cumprod, -1 if zero_snr else 1000
    torch.testing.assert_close(table[:last], stock.alphas_cumprod[:last])


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
        alpha, sigma = schedule.end_from_rho(0.0)
        assert float(alpha) == 1.0 and float(sigma) == 0.0
        assert schedule.t_end <= schedule.t_clean <= schedule.t_min and schedule.t_end < schedule.t_min
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


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_is_what_preconditioning_feeds_the_network(sigma_data):
    stock = diffusers.EDMEulerScheduler(sigma_data=sigma_data)
    schedule, rho = from_diffusers(stock), torch.tensor([0.002, 0.3, 80.0], dtype=torch.float64)
    alpha, sigma = schedule.level_from_rho(rho)
    x0, eps = 0.7, -1.3
    torch.testing.assert_close(alpha * x0 + sigma * eps, stock.precondition_inputs(x0 + rho * eps, rho))
    torch.testing.assert_close(schedule.t_from_rho(rho), stock.precondition_noise(rho))
    torch.testing.assert_close(sigma**2 + sigma_data**2 * alpha**2, torch.ones(3, dtype=torch.float64))
    alpha, sigma = schedule.end_from_rho(rho)
    assert alpha.tolist() == [1.0] * 3 and torch.equal(sigma, rho)
    alpha, sigma = schedule.level_from_rho(torch.tensor(math.inf))
    assert float(alpha) == 0.0 and float(sigma) == 1.0


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), Flow),
        (diffusers.EDMEulerScheduler(), EDM),
        (dict(diffusers.EDMEulerScheduler().config), EDM),
        (dict(diffusers.EDMDPMSolverMultistepScheduler().config), EDM),
        (diffusers.EulerDiscreteScheduler.from_config(SVD), EDM),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous"), VPDiscrete),  # ignored unless it predicts v
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), Flow),
        (diffusers.DDIMScheduler(), VPDiscrete),
        ({"_class_name": "IPNDMScheduler", "beta_start": 1e-4}, VPDiscrete),  # ours
    ],
)
def test_kind_of_a_diffusers_scheduler(scheduler, kind):
    assert isinstance(from_diffusers(scheduler), kind)


def test_range_of_an_edm_model():
    svd = from_diffusers(SVD)
    assert (svd.sigma_min, svd.sigma_max, svd.sigma_data) == (0.002, 700.0, 1.0)
    playground = from_diffusers(diffusers.EDMEulerScheduler(sigma_max=60.0))
    assert (playground.sigma_min, playground.sigma_max, playground.sigma_data) == (0.002, 60.0, 0.5)
    open_ended = from_diffusers({**SVD, "sigma_min": None, "sigma_max": None})
    assert (open_ended.sigma_min, open_ended.sigma_max) == pytest.approx((0.0291672, 14.614641), rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        dict(diffusers.SCMScheduler().config),
        dict(diffusers.CMStochasticIterativeScheduler().config),
        dict(diffusers.ScoreSdeVeScheduler().config),
        {"_class_name": "IPNDMScheduler", "num_train_timesteps": 1000},
        {"_class_name": "CosineDPMSolverMultistepScheduler", "sigma_data": 1.0, "sigma_schedule": "exponential"},
        {"sigma_data": 1.0, "sigma_schedule": "exponential", "rho": 7.0, "solver_order": 2},
    ],
)
def test_other_kinds_are_refused(config):
    with pytest.raises(UsageError, match="neither VP, EDM nor a flow"):
        from_diffusers(config)


def test_errors_name_what_is_valid():
    with pytest.raises(UsageError, match="scaled_linear"):
        from_diffusers({"beta_schedule": "scaled_liner"})
    with pytest.raises(UsageError, match="decreasing"):
        VPDiscrete([0.5, 0.9])
    for arguments in ((0.0, 80.0), (2.0, 1.0), (0.1, 80.0, 0.0), (0.1, math.inf)):
        with pytest.raises(UsageError, match="0 < sigma_min < sigma_max"):
            EDM(*arguments)
