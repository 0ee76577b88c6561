"""DPM-Solver++ and UniPC against diffusers' own."""

import warnings

import diffusers
import pytest
import torch
from analytic import exact_run

from diffaccel.core.errors import UsageError
from diffaccel.core.schedule import from_diffusers
from diffaccel.samplers.scheduler import DPMSolverScheduler, UniPCScheduler

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def end_points(make_stock, ours, steps):
    """What the two make of the same noise with an exact teacher; stock sigmas are float32."""
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy 2, and algorithm_type="dpmsolver"
        stock = make_stock()
        stock.set_timesteps(steps)
        expected = exact_run(stock, x)
    ours.set_timesteps(timesteps=stock.timesteps.tolist())  # its linspace and leading are not those of DDIM
    return exact_run(ours, x), expected


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
def test_second_order_equals_diffusers_dpm_solver(spacing, lower):
    config = {**SD, "timestep_spacing": spacing, "steps_offset": 1, "lower_order_final": lower}
    found, expected = end_points(
        lambda: diffusers.DPMSolverMultistepScheduler(**config), DPMSolverScheduler(**config), 9
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_noise_prediction_equals_diffusers_dpm_solver():
    config = {**SD, "timestep_spacing": "linspace", "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    found, expected = end_points(
        lambda: diffusers.DPMSolverMultistepScheduler(**config), DPMSolverScheduler(**config), 9
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("corrector", [True, False])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_equals_diffusers(order, solver_type, corrector):
    config = {**SD, "timestep_spacing": "linspace", "solver_order": order, "solver_type": solver_type}
    if solver_type == "bh1":  # diffusers gives NaN on a step to σ = 0
        config["final_sigmas_type"] = "sigma_min"
    disabled = [] if corrector else list(range(99))
    found, expected = end_points(
        lambda: diffusers.UniPCMultistepScheduler(**config, disable_corrector=disabled),
        UniPCScheduler(**config, corrector=corrector),
        9,
    )
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


def test_unipc_with_noise_prediction_equals_diffusers():
    config = {**SD, "timestep_spacing": "linspace", "predict_x0": False, "final_sigmas_type": "sigma_min"}
    found, expected = end_points(lambda: diffusers.UniPCMultistepScheduler(**config), UniPCScheduler(**config), 9)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


def test_diffusers_third_order_is_second_order():
    """Its second difference lacks a factor 2, so ours agrees with it only as far as second order goes."""
    config = {**SD, "timestep_spacing": "linspace", "solver_order": 3}
    found, expected = end_points(
        lambda: diffusers.DPMSolverMultistepScheduler(**config), DPMSolverScheduler(**config), 12
    )
    assert 1e-4 < float((found - expected).abs().max()) < 0.2


def test_the_stochastic_algorithm_adds_the_noise_of_diffusers():
    config = {**SD, "timestep_spacing": "trailing", "algorithm_type": "sde-dpmsolver++"}
    stock, ours = diffusers.DPMSolverMultistepScheduler(**config), DPMSolverScheduler(**config)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ends = []
    for scheduler in (stock, ours):
        generator, state = torch.Generator().manual_seed(1), x
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            scheduler.set_timesteps(6)
        for t in scheduler.timesteps:
            state = scheduler.step(0.3 * state, t, state, generator=generator).prev_sample
        ends.append(state)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4)


def test_foreign_solver_types_pass_and_others_are_refused():
    stock = diffusers.DPMSolverMultistepScheduler(**SD, solver_type="heun", solver_order=3)
    assert UniPCScheduler.from_config(stock.config).plan is not None
    deis = diffusers.DEISMultistepScheduler(**SD, algorithm_type="deis", solver_type="logrho")
    assert from_diffusers(DPMSolverScheduler.from_config(deis.config)).t_max == 999
    for call, words in (
        (lambda: UniPCScheduler(solver_type="bh3"), "bh1, bh2"),
        (lambda: UniPCScheduler(solver_order=4), "1, 2 or 3"),
        (lambda: DPMSolverScheduler(solver_order=0), "1, 2 or 3"),
        (lambda: DPMSolverScheduler(algorithm_type="dpm"), r"dpmsolver\+\+"),
    ):
        with pytest.raises(UsageError, match=words):
            call()
