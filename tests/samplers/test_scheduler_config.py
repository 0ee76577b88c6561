"""How configurations of other schedulers are read; see test_schedule.py for the noise schedules themselves."""

import inspect

import diffusers
import pytest

from diffaccel.core.errors import UsageError
from diffaccel.core.schedule import EDM, from_diffusers, network_output
from diffaccel.core.spacings import Options
from diffaccel.samplers.config import common, grid_name, grid_options, translated, validate

DEFAULTS = {name: p.default for name, p in inspect.signature(common).parameters.items()}
SVD = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction",
    "sigma_min": 0.002, "sigma_max": 700.0, "timestep_type": "continuous", "use_karras_sigmas": True,
}  # fmt: skip


def settled(stock, **changes):
    """The configuration that a scheduler here gets from a stock one."""
    config = translated({**stock.config, **changes})
    used = {key: value for key, value in config.items() if key not in config["_use_default_values"]}
    result = {**DEFAULTS, **used}
    validate(result)
    return result


@pytest.mark.parametrize(
    ("switch", "grid"),
    [
        ("use_karras_sigmas", "karras"),
        ("use_exponential_sigmas", "exponential"),
        ("use_beta_sigmas", "beta"),
        ("use_lu_lambdas", "log-snr"),
    ],
)
def test_switches_of_diffusers_name_grids_and_grid_wins(switch, grid):
    config = settled(diffusers.DPMSolverMultistepScheduler(**{switch: True}))
    assert grid_name(config) == grid
    assert grid_name({**config, "grid": "quadratic"}) == "quadratic"
    assert grid_name({**config, switch: False}) == "trailing"


def test_flow_switches_are_read():
    config = settled(diffusers.FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True, shift=3.0))
    assert grid_name(config) == "beta" and config["flow_shift"] == 3.0 and network_output(config) == "flow_prediction"


def test_exponents():
    assert grid_options(DEFAULTS) == Options(0, None)
    assert grid_options({**DEFAULTS, "grid": "quadratic", "rho": 5.0}).power is None
    assert grid_options({**DEFAULTS, "grid": "karras", "rho": 5.0}).power == 5.0
    assert grid_options({**DEFAULTS, "grid": "karras", "rho": 5.0, "grid_power": 3.0}).power == 3.0


@pytest.mark.parametrize("cls", [diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler])
def test_edm_schedulers_are_read_and_can_read_back(cls):
    for arguments in ({}, {"sigma_data": 1.0, "sigma_schedule": "exponential", "prediction_type": "v_prediction"}):
        stock = cls(sigma_max=60.0, rho=6.0, **arguments)
        config = settled(stock)
        schedule = from_diffusers(config)
        assert isinstance(schedule, EDM)
        assert (schedule.sigma_max, schedule.sigma_data) == (60.0, stock.config.sigma_data)
        assert grid_name(config) == stock.config.sigma_schedule
        assert network_output(config) == ("edm_v" if arguments else "edm")
        if not arguments:
            assert grid_options(config).power == 6.0
        back = cls.from_config(config)
        for key in ("sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho", "prediction_type"):
            assert back.config[key] == stock.config[key]


def test_stable_video_diffusion_is_read_and_can_be_read_back():
    stock = diffusers.EulerDiscreteScheduler.from_config(SVD)
    for limits in ({}, {"sigma_min": None, "sigma_max": None}):
        config = settled(stock, **limits)
        assert isinstance(from_diffusers(config), EDM) and config["sigma_data"] == 1.0
        assert grid_name(config) == "karras" and network_output(config) == "edm_v"
        back = diffusers.EulerDiscreteScheduler.from_config(config)
        assert {key: back.config[key] for key in SVD} == {**SVD, **limits}


def test_a_class_default_of_the_model_is_carried_over():
    """TCD's default betas are those of Stable Diffusion; ours, and most others, those of DDPM."""
    config = settled(diffusers.TCDScheduler())
    assert (config["beta_start"], config["beta_schedule"]) == (0.00085, "scaled_linear")
    assert config["timestep_spacing"] == "trailing"
    assert network_output(config) == "epsilon" and config["timestep_type"] == "discrete"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of"),
        ({"grid_power": 0}, "above 0"),
        ({"timestep_type": "cont"}, "continuous, discrete"),
        ({"sigma_schedule": "linear"}, "exponential, karras"),
        ({"grid": "ays"}, "ays-sd15, ays-sdxl, ays-svd"),
    ],
)
def test_bad_values(config, words):
    with pytest.raises(UsageError, match=words):
        validate({**DEFAULTS, **config})


def test_what_cannot_be_honoured_is_refused():
    with pytest.raises(UsageError, match="set them to None"):
        translated(diffusers.EulerDiscreteScheduler(sigma_max=5.0, use_karras_sigmas=True).config)
    assert (
        translated(diffusers.EulerDiscreteScheduler(timestep_type="continuous").config)["timestep_type"] == "discrete"
    )
    with pytest.raises(UsageError, match="invert_sigmas"):
        translated(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config)
