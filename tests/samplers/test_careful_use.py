"""What must not go wrong quietly: unusual settings, other families, siblings' configurations."""

import copy
import inspect

import diffusers
import pytest
import torch

import diffaccel
from diffaccel.core.errors import UsageError
from diffaccel.core.grids import make_grid
from diffaccel.core.schedule import Flow, from_diffusers
from diffaccel.samplers.adams import ghvb_plan
from diffaccel.samplers.config import COMMON
from diffaccel.samplers.deis import deis_plan
from diffaccel.samplers.multistep import VARIABLES
from diffaccel.samplers.registry import SAMPLERS, get_sampler
from diffaccel.samplers.sample import sample
from diffaccel.testing import check_scheduler, reference_solution, spectral_mixture

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"prediction_type": "flow_prediction"}
CORRECTED = [
    (diffaccel.UniPCScheduler, {"solver_type": "bh1"}),
    (diffaccel.UniPCScheduler, {"predict_x0": False, "solver_order": 3}),
    (diffaccel.DEISScheduler, {"core": "data", "corrector": True}),
    (diffaccel.DEISScheduler, {"variable": "log-rho", "corrector": True}),
    (diffaccel.FlowAdamsScheduler, {"momentum": "nesterov", "solver_order": 4}),
    (diffaccel.DPMSolverScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    (diffaccel.DDIMScheduler, {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min"}),
]


@pytest.mark.parametrize(("cls", "options"), CORRECTED, ids=[f"{c.__name__} {o}" for c, o in CORRECTED])
def test_conformance_with_options(cls, options):
    check_scheduler(cls, **options)


@pytest.mark.parametrize("core", ["noise", "data", "velocity"])
@pytest.mark.parametrize("variable", VARIABLES)
def test_every_core_and_variable_starts_from_pure_noise(core, variable):
    grid = make_grid(Flow(), 5)
    for plan in (deis_plan(grid, 2, variable, core=core, corrector=True), ghvb_plan(grid, 2.5, core, variable)):
        assert plan.nfe == 5  # every coefficient is checked to be finite


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if not name.startswith("rho")])
@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
def test_few_steps_stay_near_the_data(name, betas):
    """Whatever the schedule, ten steps give samples of the data's spread (no rule may run away near pure noise)."""
    config = {"beta_schedule": betas, "prediction_type": "sample", "rescale_betas_zero_snr": betas == "linear"}
    scheduler = get_sampler(name).build(config)
    scheduler.set_timesteps(10)
    teacher = spectral_mixture(scheduler.noise_schedule, 16)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 16, dtype=torch.float64, generator=generator)
    spread = float(teacher.draw(2000, generator).std())
    x = sample(teacher, x, scheduler.current_plan, noise=lambda _, shape: torch.randn(shape, generator=generator))
    assert 0.6 * spread < float(x.std()) < 1.5 * spread


def test_a_noise_core_corrector_leaves_steps_near_pure_noise_alone():
    schedule = from_diffusers({"beta_schedule": "squaredcos_cap_v2"})
    teacher = spectral_mixture(schedule, 16)
    x = torch.randn(100, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = reference_solution(teacher, x, float(schedule.rho(schedule.t_max)), 0.0, 300)
    plain, corrected = (
        float((sample(teacher, x, deis_plan(make_grid(schedule, 8), 2, corrector=on)) - exact).norm())
        for on in (False, True)
    )
    assert corrected < 1.5 * plain


def test_a_named_sampler_is_that_sampler_on_any_configuration():
    for name, sampler in SAMPLERS.items():
        alone = sampler.build(SD)
        for other in SAMPLERS.values():
            built = sampler.build(other.build(SD).config)
            assert {k: v for k, v in built.config.items() if k in sampler.defaults} == dict(sampler.defaults), name
            own = set(inspect.signature(sampler.load().__init__).parameters) - COMMON - {"set_alpha_to_one"}
            assert {k: built.config[k] for k in own - {"self"}} == {k: alone.config[k] for k in own - {"self"}}, name
    pixart = diffusers.DPMSolverMultistepScheduler(**SD, solver_order=2, lower_order_final=True)
    built = get_sampler("deis").build({**pixart.config, "_use_default_values": []})
    assert built.config.solver_order == 3 and not built.config.lower_order_final


def test_the_grid_of_a_named_sampler():
    build = get_sampler("deis").build
    assert build(SD).config.grid == "fast" == build(SD, grid_power=3.0).config.grid
    assert build(SD, use_karras_sigmas=False).config.grid == "fast"
    assert build(diffaccel.DEISScheduler(grid="karras").config).config.grid == "karras"
    assert build({**SD, "use_karras_sigmas": True}).config.grid is None
    assert build(SD, use_karras_sigmas=True).config.grid is None


def test_siblings_read_each_others_saved_configurations(tmp_path):
    for index, sampler in enumerate(SAMPLERS.values()):
        sampler.build(SD).save_config(tmp_path / str(index))
        for cls in {other.load() for other in SAMPLERS.values()}:
            cls.from_pretrained(tmp_path / str(index)).set_timesteps(4)


@pytest.mark.parametrize("value", [{"shift": 5.0}, {"flow_shift": 5.0}])
def test_either_name_of_the_shift_counts(value):
    for stock in (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
    ):
        scheduler = diffaccel.DDIMScheduler.from_config(stock.config, **value)
        scheduler.set_timesteps(2)
        assert float(scheduler.sigmas[1]) == pytest.approx(5.0 / 6.0)


def test_other_families_are_refused_or_known():
    rf = diffusers.LTXEulerAncestralRFScheduler()
    assert isinstance(diffaccel.DDIMScheduler.from_config(rf.config).noise_schedule, Flow)
    for other in (
        diffusers.DDPMWuerstchenScheduler(),
        diffusers.KarrasVeScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ):
        with pytest.raises(UsageError, match=r"cannot be used|own scheduler"):
            diffaccel.DDIMScheduler.from_config(other.config)


def test_the_remembered_output_is_not_the_callers_buffer():
    scheduler = diffaccel.FlowAdamsScheduler(**FLOW)
    ends = []
    for fresh in (True, False):
        scheduler.set_timesteps(5)
        x, buffer = torch.ones(1, 4), torch.empty(1, 4)
        for t in scheduler.timesteps:
            output = torch.sin(x) if fresh else buffer.copy_(torch.sin(x))
            x = scheduler.step(output, t, x).prev_sample
        ends.append(x)
    assert torch.equal(*ends)


def test_a_refused_call_leaves_the_scheduler_as_it_was():
    scheduler, x = diffaccel.DEISScheduler(**SD), torch.ones(1, 4)
    scheduler.set_timesteps(4)
    before = copy.deepcopy(scheduler)
    with pytest.raises(UsageError):
        scheduler.set_timesteps(timesteps=[1, 2])
    left, right = (s.step(x, s.timesteps[0], x).prev_sample for s in (before, scheduler))
    assert torch.equal(left, right) and scheduler.num_inference_steps == 4


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_runge_kutta_may_begin_inside_its_last_step(steps):
    scheduler = diffaccel.RhoRKScheduler(prediction_type="sample", final_sigmas_type="sigma_min")
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(2 * steps - 1)
    x = scheduler.step(torch.zeros(1, 2), scheduler.timesteps[-1], torch.ones(1, 2)).prev_sample
    assert bool(torch.isfinite(x).all())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: diffaccel.DEISScheduler(solver_order=2.0), "solver_order must be int"),
        (lambda: diffaccel.DEISScheduler(solver_order=True), "solver_order must be int"),
        (lambda: diffaccel.DEISScheduler(eta="x"), "eta must be float"),
        (lambda: diffaccel.UniPCScheduler(corrector="maybe"), "corrector must be bool"),
        (lambda: diffaccel.DDIMScheduler(grid=["karras"]), "grid must be str"),
        (lambda: diffaccel.DDIMScheduler(num_train_timesteps=1000.0), "num_train_timesteps must be int"),
        (lambda: diffaccel.DEISScheduler(eta=-1.0), "at least 0"),
        (lambda: diffaccel.DEISScheduler(eta=1.0, corrector=True), "corrector"),
        (lambda: diffaccel.DEISScheduler(eta=1.0, momentum="heavy-ball"), "Momentum is for eta = 0"),
        (lambda: diffaccel.IPNDMScheduler(beta=0.5), "belongs to momentum"),
        (lambda: diffaccel.FlowAdamsScheduler(**SD, grid_start=0.001).set_timesteps(4), "grid_start"),
    ],
)
def test_bad_values_are_named(call, words):
    with pytest.raises(UsageError, match=words):
        call()


def test_numbers_of_numpy_and_ends_that_are_spelt_out():
    numpy = pytest.importorskip("numpy")
    scheduler = diffaccel.DEISScheduler(**FLOW)
    scheduler.set_timesteps(numpy.int64(5))
    assert len(scheduler.timesteps) == 5
    scheduler.set_timesteps(timesteps=[1000.0, 500.0, 0.0])
    assert scheduler.timesteps.tolist() == [1000.0, 500.0]
    for steps in (1000, 1001):
        leading = diffaccel.DDIMScheduler(timestep_spacing="leading", steps_offset=1)
        leading.set_timesteps(steps)
        assert len(leading.timesteps) == steps and float(leading.timesteps[0]) > 990
