import warnings

import diffusers
import pytest
import torch
from analytic import exact_run, two_modes
from torch.utils._python_dispatch import TorchDispatchMode

from diffaccel.core.errors import UsageError
from diffaccel.core.grids import make_grid
from diffaccel.core.schedule import from_diffusers
from diffaccel.samplers.deis import deis_plan
from diffaccel.samplers.registry import SAMPLERS, get_sampler
from diffaccel.samplers.sample import sample
from diffaccel.samplers.scheduler import DDIMScheduler, DEISScheduler, FlowAdamsScheduler
from diffaccel.testing import check_scheduler
from diffaccel.testing.schedulers import network, run

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def noise(*shape, seed=0):
    return torch.randn(*(shape or (2, 3, 4, 4)), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SAMPLERS)
def test_conformance(name):
    check_scheduler(SAMPLERS[name].load(), **SAMPLERS[name].defaults)


def test_conformance_with_noise():
    check_scheduler(DDIMScheduler, eta=1.0)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_equals_diffusers(spacing, eta):
    config = {**SD, "timestep_spacing": spacing, "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
    stock, ours = diffusers.DDIMScheduler(**config), DDIMScheduler(**config, eta=eta)
    stock.set_timesteps(10)
    x, generator = noise(), torch.Generator().manual_seed(4)
    left = x
    for t in stock.timesteps:
        left = stock.step(network(left, t), t, left, eta=eta, generator=generator).prev_sample
    right = run(ours, x, 10, torch.Generator().manual_seed(4))
    torch.testing.assert_close(right, left, rtol=1e-5, atol=1e-5)


def test_clipped_ddim_equals_diffusers_with_consistent_noise():
    stock, ours = diffusers.DDIMScheduler(), DDIMScheduler(clip_sample=True, timestep_spacing="leading")
    stock.set_timesteps(10)
    left = x = noise()
    for t in stock.timesteps:
        left = stock.step(network(left, t), t, left, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(run(ours, x, 10), left, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("order", "tolerance"), [(1, 2e-6), (2, 1e-5), (3, 1e-4)])
def test_log_rho_equals_diffusers_deis(order, tolerance):
    config = {**SD, "timestep_spacing": "linspace", "solver_order": order, "lower_order_final": False}
    stock = diffusers.DEISMultistepScheduler(**config)
    ours = DEISScheduler(**config, variable="log-rho", final_sigmas_type="sigma_min")
    x = noise(6, 2).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        stock.set_timesteps(10)
        expected = exact_run(stock, x)
    ours.set_timesteps(10)
    torch.testing.assert_close(exact_run(ours, x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mu", [None, 0.9])
def test_flow_ddim_equals_flow_match_euler(mu):
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=mu is not None)
    ours = DDIMScheduler.from_config(stock.config)
    sigmas = torch.linspace(1, 0.125, 8).tolist()
    for arguments in ({"num_inference_steps": 8}, {"sigmas": sigmas}):
        stock.set_timesteps(sigmas=sigmas, mu=mu)
        ours.set_timesteps(**arguments, mu=mu)
        assert float(ours.sigmas[-1]) == 0.0 and ours.timesteps.dtype == torch.float32
        left = right = noise()
        for t, own in zip(stock.timesteps, ours.timesteps, strict=True):
            left = stock.step(network(left, t), t, left).prev_sample
            right = ours.step(network(right, own), own, right).prev_sample
        torch.testing.assert_close(right, left, rtol=1e-5, atol=1e-5)
    assert not ours.config.use_flow_sigmas  # FLUX-type pipelines would drop their own sigmas
    again = diffusers.FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    back = DDIMScheduler.from_config(again.config).config
    assert again.config.shift == 3.0 and back.prediction_type == "flow_prediction" and back.flow_shift == 3.0


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_every_prediction_type_gives_the_plan_of_the_sampler(kind):
    config = FLOW if kind == "flow_prediction" else {**SD, "prediction_type": kind}
    scheduler = DEISScheduler(**config)
    scheduler.set_timesteps(8)
    schedule = from_diffusers(scheduler)
    x = noise(5, 2).double()
    expected = sample(two_modes(schedule), x, deis_plan(make_grid(schedule, 8), 2, core=None))
    torch.testing.assert_close(exact_run(scheduler, x), expected, rtol=1e-8, atol=1e-8)


def test_zero_terminal_snr_is_accurate_in_single_precision():
    scheduler = DEISScheduler(**SD, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    scheduler.set_timesteps(10)
    x = noise(8, 2)
    exact = exact_run(scheduler, x.double())
    torch.testing.assert_close(exact_run(scheduler, x).double(), exact, rtol=2e-5, atol=2e-5)


def test_one_step_is_one_weighted_sum_without_reading_the_timestep():
    """A timestep that may not be read (as if on a busy device) still works, and history stays as short as needed."""
    scheduler = DEISScheduler(**SD, solver_order=2)
    scheduler.set_timesteps(6)
    x = noise()
    for index, t in enumerate(scheduler.timesteps):
        t.__class__ = type("Unreadable", (torch.Tensor,), {"__float__": None, "item": None, "__int__": None})
        x = scheduler.step(x * 0.1, t, x).prev_sample
        assert scheduler.step_index == index + 1
    assert len(scheduler._run._outputs) == 2 and len(scheduler._run._states) == 1


class NoHostReads(TorchDispatchMode):
    """Fails on what would make a GPU's host wait: a tensor read as a Python number, or as a mask's size."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("config", [SD, FLOW], ids=["VP", "flow"])
def test_no_step_reads_a_tensor_on_the_host(name, config):
    scheduler, x, generator = SAMPLERS[name].build(config), noise(), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(6)
    with pytest.raises(AssertionError, match="scalar"), NoHostReads():
        x.max().item()
    with NoHostReads():
        for t in scheduler.timesteps:
            x = scheduler.step(x * 0.1, t, x, generator=generator, return_dict=False)[0]


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_waits_for_the_gpu(name):
    scheduler, x = SAMPLERS[name].build(SD), noise().cuda()
    scheduler.set_timesteps(6, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in scheduler.timesteps:
            x = scheduler.step(x * 0.1, t, x, generator=generator, return_dict=False)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_finished_run_starts_again_and_whole_times_are_integers():
    scheduler, x = DEISScheduler(**SD), noise()
    first = run(scheduler, x, 5)
    again = x
    for t in scheduler.timesteps:
        again = scheduler.step(network(again, t), int(t), again).prev_sample
    assert torch.equal(first, again) and scheduler.timesteps.dtype == torch.int64
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [999, 799, 599, 399, 199]
    karras = DEISScheduler(**SD, use_karras_sigmas=True)
    karras.set_timesteps(5)
    assert karras.timesteps.dtype == torch.float32


def test_dynamic_thresholding_bounds_the_result():
    scheduler = DDIMScheduler(thresholding=True, sample_max_value=1.5)
    scheduler.set_timesteps(4)
    x = noise() * 3
    for t in scheduler.timesteps:
        x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
    assert float(x.abs().max()) <= 1.0


def test_add_noise_at_any_time_on_a_batch():
    scheduler, stock, x, eps = DDIMScheduler(**SD), diffusers.DDIMScheduler(**SD), noise(), noise(seed=1)
    times = torch.tensor([13, 801])
    torch.testing.assert_close(scheduler.add_noise(x, eps, times), stock.add_noise(x, eps, times), rtol=1e-4, atol=1e-5)
    assert scheduler.add_noise(x.half(), eps, times).dtype == torch.float16


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DDIMScheduler(timestep_spacing="karras"), "leading, linspace, trailing"),
        (lambda: DDIMScheduler(final_sigmas_type="none"), "sigma_min, zero"),
        (lambda: DDIMScheduler(grid="karas"), "Did you mean 'karras'"),
        (lambda: DDIMScheduler(use_karras_sigmas=True, use_exponential_sigmas=True), "only one"),
        (lambda: DEISScheduler(solver_order=5), "1, 2, 3 or 4"),
        (lambda: DEISScheduler(variable="time"), "log-rho"),
        (lambda: DDIMScheduler(eta=2.0).set_timesteps(3), "eta"),
        (lambda: DDIMScheduler(**FLOW, use_dynamic_shifting=True).set_timesteps(3), "pass mu"),
        (lambda: DDIMScheduler().set_timesteps(timesteps=[1, 2]), "strictly decreasing"),
        (lambda: DDIMScheduler().set_timesteps(), "at least 1"),
        (lambda: get_sampler("dei"), "Did you mean 'deis'"),
    ],
)
def test_errors_say_what_is_allowed(call, words):
    with pytest.raises(UsageError, match=words):
        call()


def test_errors_of_step():
    scheduler, x = DDIMScheduler(**FLOW), noise()
    with pytest.raises(UsageError, match="set_timesteps"):
        scheduler.step(x, 1.0, x)
    scheduler.set_timesteps(4)
    with pytest.raises(UsageError, match="floats"):
        scheduler.step(x, 0, x)
    with pytest.raises(UsageError, match="variance"):
        scheduler.step(x.repeat(1, 2, 1, 1), scheduler.timesteps[0], x)
    scheduler.set_begin_index(4)
    with pytest.raises(UsageError, match="call 4 of 4"):
        scheduler.step(x, scheduler.timesteps[0], x)
    blind = DDIMScheduler(use_flow_sigmas=True)
    blind.set_timesteps(4)
    with pytest.raises(UsageError, match="alpha is 0"):
        blind.step(x, blind.timesteps[0], x)


def test_registry_builds_what_it_says():
    stock = diffusers.PNDMScheduler(**SD, steps_offset=1)
    for name, sampler in SAMPLERS.items():
        scheduler = sampler.build(stock.config)
        assert scheduler.config.beta_schedule == "scaled_linear" and sampler.name == name and sampler.summary
        assert sampler.defaults.items() <= dict(scheduler.config).items()
        assert scheduler.config.grid == (sampler.vp_grid or ("fast" if name == "flow-adams" else None))
        assert sampler.build(stock.config, timestep_spacing="leading").config.grid is None
        assert sampler.build(diffusers.FlowMatchEulerDiscreteScheduler().config).config.grid in (None, "fast")
        scheduler.set_timesteps(7)
        assert len(scheduler.timesteps) == 6 * sampler.nfe_per_step + 1 and scheduler.order == sampler.nfe_per_step


def test_flow_adams_knows_its_grid_and_minds_guidance():
    stock = diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1)
    scheduler = FlowAdamsScheduler.from_config(stock.config)
    scheduler.set_timesteps(6)
    assert scheduler.timesteps.dtype == torch.float32 and float(scheduler.timesteps[0]) == 999.0
    named = FlowAdamsScheduler.from_config(stock.config, timestep_spacing="trailing")
    named.set_timesteps(5)
    assert named.timesteps.tolist() == [999, 799, 599, 399, 199]
    assert named.config.grid is None and DDIMScheduler.from_config(scheduler.config).config.grid is None
    grid = make_grid(scheduler.noise_schedule, 8, "fast")
    expected = deis_plan(grid, 1, "angle", core="velocity", corrector=True, momentum="heavy-ball", beta=1 - 1 / 16)
    assert FlowAdamsScheduler().plan(grid) == expected == FlowAdamsScheduler(guidance_scale=2.0).plan(grid)
    guided = deis_plan(grid, 1, "angle", core="velocity", momentum="heavy-ball", beta=0.8)
    assert FlowAdamsScheduler(guidance_scale=15.0).plan(grid).rows == guided.rows
    assert FlowAdamsScheduler(guidance_scale=15.0, corrector=True).plan(grid).rows != guided.rows
    with pytest.raises(UsageError, match="beta"):
        FlowAdamsScheduler(beta=1.5)


def test_corrector_and_noise_exclude_each_other():
    with pytest.raises(UsageError, match="corrector"):
        DEISScheduler(eta=1.0, corrector=True).set_timesteps(4)
