"""Noise levels read off schedulers, against a network whose data is one point μ: its x0 is μ wherever it is called."""

import inspect
from functools import partial

import diffusers
import pytest
import torch

from diffaccel.core.errors import GuidanceError, UsageError
from diffaccel.core.prediction import convert
from diffaccel.core.schedule import VPDiscrete, family, network_output
from diffaccel.guidance.levels import level_of, target_of
from diffaccel.samplers.registry import SAMPLERS

pytestmark = pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning")

MU = torch.linspace(-1.0, 1.0, 16, dtype=torch.float64).reshape(1, 1, 4, 4)
VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
SVD = {"prediction_type": "v_prediction", "timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0,
       "use_karras_sigmas": True}  # fmt: skip
KARRAS, EXPONENTIAL = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}

TWO, THREE = ("epsilon", "v_prediction"), ("epsilon", "v_prediction", "sample")
TYPES = {
    **dict.fromkeys(
        ("DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "LCM", "TCD", "EulerDiscrete", "HeunDiscrete"), THREE
    ),
    **dict.fromkeys(("CogVideoXDDIM", "CogVideoXDPM", "LMSDiscrete", "DPMSolverMultistep"), THREE),
    **dict.fromkeys(("DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver"), THREE),
    **dict.fromkeys(("EulerAncestralDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "PNDM", "EDMEuler"), TWO),
    "EDMDPMSolverMultistep": TWO,
    "UnCLIP": ("epsilon", "sample"),
    **dict.fromkeys(("FlowMatchEuler", "FlowMatchHeun", "FlowMapEuler"), (None,)),
}
DISCRETE = ("FlowMatchEuler", "FlowMatchHeun", "FlowMapEuler")


def make(name: str, **options):
    """A stock scheduler by the start of its name, clipping off."""
    cls = getattr(diffusers, f"{name}{'Discrete' if name in DISCRETE else ''}Scheduler")
    accepted = inspect.signature(cls.__init__).parameters
    given = {**VP, "clip_sample": False, "lower_order_final": True}
    given = {key: value for key, value in given.items() if key in accepted and name != "UnCLIP"}
    return cls(**{**given, **{key: value for key, value in options.items() if value is not None}})


# What the network is called with tells its level exactly: integers, or times that were not rounded.
EXACT_TIMES = [
    *((name, {"prediction_type": kind}) for name, kinds in TYPES.items() for kind in kinds),
    *((name, ZERO_SNR) for name in ("DDIM", "DDPM", "LCM", "TCD", "CogVideoXDDIM", "EulerDiscrete", "EulerAncestralDiscrete")),
    *((name, grid) for name in ("EulerDiscrete", "HeunDiscrete", "LMSDiscrete") for grid in (KARRAS, EXPONENTIAL)),
    *((name, {"shift": 3.0}) for name in DISCRETE),
    *((name, grid) for name in ("FlowMatchEuler", "FlowMatchLCM") for grid in ({}, KARRAS)),
    ("PNDM", {"skip_prk_steps": True}),
    ("EulerDiscrete", SVD),
    ("LTXEulerAncestralRF", {}),
    ("UniPCMultistep", {"timestep_spacing": "trailing", "solver_order": 3}),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistep", {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverSinglestep", {"solver_order": 3}),
]  # fmt: skip


def seen(scheduler, t: torch.Tensor) -> tuple[float, float]:
    """(α, σ) at which a network called with time t was trained."""
    kind = family(scheduler.config, type(scheduler).__name__)
    t = t.detach().double()
    if kind == "flow":
        return 1.0 - float(t) / 1000, float(t) / 1000
    if kind == "edm":
        rho = torch.exp(4.0 * t)
        scale = (rho**2 + scheduler.config.get("sigma_data", 1.0) ** 2) ** -0.5
        return float(scale), float(rho * scale)
    table = scheduler.alphas_cumprod.double()
    if t == t.round():
        return float(table[int(t)].sqrt()), float((1 - table[int(t)]).sqrt())
    return tuple(map(float, VPDiscrete(table).level(t)))


def advance(scheduler, output, t, x, old=None, **arguments):
    """(state, x0 that CogVideoXDPM wants back) after a step."""
    if "old_pred_original_sample" not in inspect.signature(scheduler.step).parameters:
        return scheduler.step(output, t, x, return_dict=False, **arguments)[0], None
    index = int((scheduler.timesteps == t).nonzero()[0])
    back = scheduler.timesteps[index - 1] if index else None
    return scheduler.step(output, old, t, back, x, return_dict=False)[:2]


def begin(scheduler, first: int | None, steps: int = 6):
    """(times of the run, its first state); an image-to-image run starts at ``first``."""
    scheduler.set_timesteps(steps)
    noise = torch.randn(MU.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if first is None:
        return scheduler.timesteps, noise * getattr(scheduler, "init_noise_sigma", 1.0)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    t = scheduler.timesteps[first]
    if hasattr(scheduler, "add_noise"):
        return scheduler.timesteps[first:], scheduler.add_noise(MU, noise, t[None])
    return scheduler.timesteps[first:], scheduler.scale_noise(MU, t[None], noise)


def point_mass(scheduler, x, t) -> torch.Tensor:
    """The raw output of the network for data that is μ alone, from what it sees."""
    native = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
    kind = network_output({**scheduler.config, "_class_name": type(scheduler).__name__})
    return convert(MU, native.double(), "sample", kind, *seen(scheduler, t))


def check_exact(scheduler, first: int | None) -> None:
    (times, x), old = begin(scheduler, first), None
    for t in times:
        output = point_mass(scheduler, x, t)
        of_x, of_output = level_of(scheduler, t).affine("sample")
        assert (of_x * x.double() + of_output * output - MU).abs().max() < 1e-4, f"at {float(t):g}"
        x, old = advance(scheduler, output, t, x, old)
    assert x.isfinite().all()


@pytest.mark.parametrize("first", [None, 2])
@pytest.mark.parametrize(("name", "options"), EXACT_TIMES, ids=str)
def test_the_level_is_that_of_the_networks_call(name, options, first):
    scheduler = make(name, **options)
    if first is not None and not (hasattr(scheduler, "add_noise") or hasattr(scheduler, "scale_noise")):
        first = None
    check_exact(scheduler, first)


OURS = [
    *((name, {**VP, "prediction_type": kind}) for name in SAMPLERS for kind in THREE if name != "flow-adams"),
    *((name, {**FLOW, **VP}) for name in SAMPLERS if name != "deis-log-rho"),
    ("ddim", {**VP, **ZERO_SNR}),
    *((name, {**SVD, **VP}) for name in ("ddim", "ddpm", "deis", "dpm-solver", "rho-heun")),
]


@pytest.mark.parametrize("first", [None, 2])
@pytest.mark.parametrize(("name", "config"), OURS, ids=str)
def test_the_level_inside_samplers_of_this_package(name, config, first):
    check_exact(SAMPLERS[name].build(config), first)


# With Karras, exponential and flow grids these round the time that the network is called with, but not the level that
# they take its output to be of. So their own conversion of any output is the referee.
ROUNDED = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver")
GRIDS = (KARRAS, EXPONENTIAL, {})


@pytest.mark.parametrize("first", [None, 2])
@pytest.mark.parametrize(
    "options", [*({"prediction_type": k, **g} for k, g in zip(THREE, GRIDS, strict=True)), FLOW], ids=str
)
@pytest.mark.parametrize("name", ROUNDED)
def test_the_level_is_that_of_the_schedulers_own_conversion(monkeypatch, name, options, first):
    scheduler = make(name, **options)
    original, converted = scheduler.convert_model_output, []

    def spying(*args, **kwargs):
        converted.append(original(*args, **kwargs))
        return converted[-1]

    monkeypatch.setattr(scheduler, "convert_model_output", spying)
    (times, x), generator = begin(scheduler, first), torch.Generator().manual_seed(1)
    target = "epsilon" if name == "DEISMultistep" else "sample"
    for t in times:
        output = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        of_x, of_output = level_of(scheduler, t).affine(target)
        before = x
        x = scheduler.step(output, t, x, return_dict=False)[0]
        torch.testing.assert_close(
            of_x * before.double() + of_output * output, converted[-1].double(), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("first", [None, 2])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("KDPM2Discrete", KARRAS),
        ("KDPM2AncestralDiscrete", KARRAS),
        ("KDPM2AncestralDiscrete", {"prediction_type": "v_prediction"}),
        ("EulerDiscrete", {"timestep_spacing": "trailing", "interpolation_type": "log_linear"}),
        ("EulerDiscrete", {"timestep_spacing": "trailing", **KARRAS}),
        ("EulerAncestralDiscrete", {}),
    ],
    ids=str,
)
def test_the_level_is_that_of_the_x0_that_a_scheduler_returns(name, options, first):
    scheduler = make(name, **options)
    (times, x), generator = begin(scheduler, first), torch.Generator().manual_seed(1)
    for t in times:
        output = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        of_x, of_output = level_of(scheduler, t).affine("sample")
        before = x
        x, x0 = scheduler.step(output, t, x, return_dict=False)
        torch.testing.assert_close(of_x * before.double() + of_output * output, x0.double(), rtol=1e-4, atol=1e-4)


def test_subclasses_are_what_they_extend():
    class Mine(diffusers.EulerDiscreteScheduler):
        pass

    check_exact(Mine(**VP), 2)


class _Unheard(diffusers.SchedulerMixin, diffusers.ConfigMixin):
    config_name = "scheduler_config.json"
    sigmas = timesteps = torch.ones(3)

    @diffusers.configuration_utils.register_to_config
    def __init__(self, beta_start: float = 0.1):
        pass


@pytest.mark.parametrize(
    "build",
    [
        partial(make, "DDIMInverse"),
        partial(make, "DPMSolverMultistepInverse"),
        partial(diffusers.FlowMatchEulerDiscreteScheduler, invert_sigmas=True),
        diffusers.IPNDMScheduler,
        diffusers.ScoreSdeVeScheduler,
        diffusers.KarrasVeScheduler,
        diffusers.CMStochasticIterativeScheduler,
        diffusers.DDPMWuerstchenScheduler,
        _Unheard,
    ],
)
def test_other_schedulers_are_refused(build):
    scheduler = build()
    for ask in (level_of, target_of):
        with pytest.raises(GuidanceError, match=type(scheduler).__name__):
            ask(scheduler, 1)


AFTER = [
    *(
        (name, {"prediction_type": kind})
        for name in ("DDIM", "DDIMParallel", "EulerDiscrete", "LMSDiscrete")
        for kind in TWO
    ),
    *((name, {"prediction_type": "sample"}) for name in ("CogVideoXDDIM", "DPMSolverMultistep")),
    *((name, {}) for name in ("DDPM", "DDPMParallel", "EulerAncestralDiscrete", "EDMEuler", "EDMDPMSolverMultistep")),
    *((name, {}) for name in ("FlowMatchEuler", "FlowMapEuler", "DEISMultistep")),
    *((name, ZERO_SNR) for name in ("DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete")),
    ("DDIM", {"set_alpha_to_one": False, "steps_offset": 1}),
    ("DDPM", {"timestep_spacing": "linspace"}),
    ("EulerDiscrete", SVD),
    ("EulerDiscrete", {**KARRAS, "final_sigmas_type": "sigma_min"}),
]


def check_after(scheduler, first, eta: float = 0.0) -> None:
    """State after each step == α'·μ + kept·ε + fresh noise, with ε that of the state before."""
    times, x = begin(scheduler, first)
    arguments = {"eta": eta} if eta else {}
    for t in times:
        level, target = level_of(scheduler, t), target_of(scheduler, t, eta)
        output = point_mass(scheduler, x, t)
        eps = (level.scale * x.double() - level.alpha * MU) / level.sigma
        fresh = (target.sigma**2 - target.kept**2) ** 0.5
        if fresh:
            arguments["generator"] = torch.Generator().manual_seed(3)
        noise = torch.randn(MU.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
        if scheduler.__module__ == "diffaccel":  # which draws in float32 whatever the dtype
            noise = torch.randn(MU.shape, generator=torch.Generator().manual_seed(3))
        x = advance(scheduler, output, t, x, **arguments)[0]
        torch.testing.assert_close(
            x.double(),
            target.alpha * MU + target.kept * eps + fresh * noise,
            rtol=1e-4,
            atol=1e-4 * max(1.0, target.sigma),
        )


@pytest.mark.parametrize("first", [None, 2])
@pytest.mark.parametrize(("name", "options"), AFTER, ids=str)
def test_the_level_after_a_step(name, options, first):
    if name == "LMSDiscrete":
        first = None  # begun later, its first step counts on derivatives that it does not have
    check_after(make(name, **options), first)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("name", ["DDIM", "DDIMParallel"])
def test_the_level_after_a_step_of_ddim_with_eta(name, eta):
    check_after(make(name), 1, eta)


@pytest.mark.parametrize("first", [None, 2])
@pytest.mark.parametrize("config", [VP, {**FLOW, **VP}, {**SVD, **VP}], ids=["vp", "flow", "edm"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "deis", "unipc"])
def test_the_level_after_a_step_of_samplers_of_this_package(name, config, first):
    check_after(SAMPLERS[name].build(config), first)


LOOKING_BACK = ("HeunDiscrete", "KDPM2Discrete", "PNDM", "LCM", "TCD", "SASolver", "DPMSolverSinglestep")


@pytest.mark.parametrize(
    "build",
    [
        *(partial(make, name) for name in LOOKING_BACK),
        partial(make, "DPMSolverMultistep", algorithm_type="sde-dpmsolver++"),
        partial(make, "FlowMatchEuler", stochastic_sampling=True),
        *(SAMPLERS[name].build for name in ("deis-sde", "rho-heun")),
    ],
)
def test_no_target_where_the_step_does_not_tell(build):
    scheduler = build()
    scheduler.set_timesteps(6)
    with pytest.raises(UsageError, match=type(scheduler).__name__):
        target_of(scheduler, scheduler.timesteps[0])
