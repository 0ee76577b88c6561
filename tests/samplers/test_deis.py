import math

import pytest
import torch
from analytic import grid_of, two_modes

from diffaccel.core.errors import UsageError
from diffaccel.core.grids import make_grid
from diffaccel.core.schedule import VE, Flow, VPLinear, from_diffusers
from diffaccel.samplers.ddim import ddim_plan
from diffaccel.samplers.deis import deis_plan
from diffaccel.samplers.multistep import VARIABLES, Core
from diffaccel.samplers.sample import sample
from diffaccel.testing import GaussianTeacher, reference_solution

SCHEDULES = [VPLinear(), VE(), Flow(), from_diffusers({}), from_diffusers({"rescale_betas_zero_snr": True})]


def cores_of(schedule):
    return ("noise", "data", "velocity") if isinstance(schedule, Flow) else ("noise", "data")


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_order_zero_is_ddim_and_every_order_is_finite(schedule, variable, end):
    grid = make_grid(schedule, 7, "karras", end=end)
    teacher = two_modes(schedule)
    x = schedule.initial_scale * torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ddim = sample(teacher, x, ddim_plan(grid))
    tolerance = 1e-13 if grid.alpha[0] == 0 or grid.rho[0] < 1000 else 1e-11
    for core in cores_of(schedule):
        deis = sample(teacher, x, deis_plan(grid, 0, variable, core=core))
        torch.testing.assert_close(deis, ddim, rtol=tolerance, atol=tolerance)
        assert bool(torch.isfinite(sample(teacher, x, deis_plan(grid, 3, variable, core=core))).all())


def _simpson(rho, values, measure):
    """∫ values d(measure) over log ρ by a fine Simpson rule."""
    weights = torch.ones(len(rho), dtype=torch.float64)
    weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
    return float((weights * measure * values).sum()) * float(rho.log().diff()[0]) / 3


@pytest.mark.parametrize("core", ["noise", "data", "velocity"])
@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_polynomials_are_integrated_exactly(core, variable, order):
    """The mean of z^k over a step, in the core's own measure, is reproduced by the weights for k ≤ order."""
    schedule = Flow() if core == "velocity" else VPLinear()
    grid, step = make_grid(schedule, 6, "quadratic", end="sigma_min"), 4
    weights = Core(core, grid).lagrange(step, range(step, step - order - 1, -1), variable)
    assert sum(weights) == pytest.approx(1.0, rel=1e-12)
    rho = torch.logspace(math.log10(grid.rho[step]), math.log10(grid.rho[step + 1]), 20001, dtype=torch.float64)
    measure = {"noise": rho, "data": -1 / rho, "velocity": rho / (1 + rho) ** 2}[core]
    places = {"t": schedule.t_from_rho, "rho": lambda r: r, "log-rho": torch.log, "angle": torch.arctan}[variable]
    nodes = places(torch.tensor(grid.rho, dtype=torch.float64))
    for power in range(order + 1):
        exact = _simpson(rho, places(rho) ** power, measure) / _simpson(rho, torch.ones_like(rho), measure)
        found = sum(w * float(nodes[step - j]) ** power for j, w in enumerate(weights))
        assert found == pytest.approx(exact, rel=1e-8)


def test_first_order_weights_have_their_closed_form():
    """z = ρ: w_1 = −Δ²/(2(ρ_n − ρ_{n−1})) (here divided by Δ)."""
    grid = make_grid(VPLinear(), 6, "quadratic")
    delta, before = grid.rho[4] - grid.rho[3], grid.rho[3] - grid.rho[2]
    assert Core("noise", grid).lagrange(3, (3, 2), "rho") == pytest.approx(
        (1 + delta / 2 / before, -delta / 2 / before)
    )


@pytest.mark.parametrize("schedule", [Flow(), from_diffusers({}), VE()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("variable", VARIABLES)
def test_weights_of_the_step_to_the_clean_image(schedule, variable):
    grid = make_grid(schedule, 5, "karras")
    for core in cores_of(schedule):
        weights = Core(core, grid).lagrange(4, (4, 3, 2, 1), variable)
        assert sum(weights) == pytest.approx(1.0, rel=1e-10)
        if variable == "log-rho":
            assert weights == (1.0, 0.0, 0.0, 0.0)


def test_paper_coefficients():
    """tAB3 on the quadratic CIFAR grid, 10 steps: independent quadrature of the paper's own integrand."""
    plan = deis_plan(make_grid(VPLinear(), 10, "quadratic", end="sigma_min"), 3, "t")
    assert plan.rows[3].states[0] == pytest.approx(1.76140, abs=1e-5)
    assert plan.rows[3].outputs == pytest.approx((-1.5387, 1.2237, -0.6328, 0.1286), abs=1e-4)
    assert plan.rows[9].outputs == pytest.approx((-0.0801, 0.0336, -0.0105, 0.0014), abs=1e-4)


@pytest.mark.parametrize("core", ["noise", "data", "velocity"])
def test_orders_improve_on_a_flow_and_the_first_call_is_pure_noise(core):
    schedule = Flow()
    teacher = two_modes(schedule)
    x = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = reference_solution(teacher, x, math.inf, 0.0, 600)
    grid = make_grid(schedule, 20)
    assert grid.alpha[0] == 0.0 and grid.sigma[-1] == 0.0
    errors = [float((sample(teacher, x, deis_plan(grid, k, core=core)) - exact).norm()) for k in range(3)]
    assert errors[1] < 0.7 * errors[0] and errors[2] < errors[1]


@pytest.mark.parametrize("core", ["noise", "data"])
@pytest.mark.parametrize(("schedule", "eta"), [(VPLinear(), 0.5), (VPLinear(), 1.0), (Flow(), 1.0)])
def test_the_stochastic_variants_sample_the_data(core, schedule, eta):
    """Mean and spread of a Gaussian, against its closed form."""
    teacher = GaussianTeacher([1.0, -2.0], [0.5, 0.2], schedule)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 2, dtype=torch.float64, generator=generator)
    plan = deis_plan(make_grid(schedule, 150, "quadratic"), 1, core=core, eta=eta)
    draws = sample(teacher, x, plan, noise=lambda _, shape: torch.randn(shape, generator=generator))
    torch.testing.assert_close(draws.mean(0), teacher.means[0], rtol=0.03, atol=0.03)
    torch.testing.assert_close(draws.std(0), torch.tensor([0.5, 0.2], dtype=torch.float64), rtol=0.08, atol=0)


@pytest.mark.parametrize("eta", [0.3, 1.0, 1.5])
def test_data_core_noise_keeps_the_marginals_at_any_step_size(eta):
    """With x0 known, a step from the marginal of its start lands on the marginal of its end, however long it is."""
    grid = make_grid(VPLinear(), 3, "quadratic", end="sigma_min")
    rule = Core("data", grid, eta)
    for i in range(3):
        ratio, width, noise = rule.span(i)
        assert ratio * grid.alpha[i] + width == pytest.approx(grid.alpha[i + 1])
        assert math.hypot(ratio * grid.sigma[i], noise) == pytest.approx(grid.sigma[i + 1])


def test_noise_core_noise_is_the_papers():
    grid = make_grid(VPLinear(), 10, "quadratic")
    for row, i in zip(deis_plan(grid, 0, eta=0.6).rows, range(9), strict=False):
        assert row.noise == pytest.approx(0.6 * grid.alpha[i + 1] * math.sqrt(grid.rho[i] ** 2 - grid.rho[i + 1] ** 2))
    assert deis_plan(grid, 0, eta=0.6).rows[-1].noise == 0.0  # it would stay in the image


def test_lower_order_final_and_errors():
    grid = make_grid(VPLinear(), 6, "quadratic")
    depths = [len(row.outputs) for row in deis_plan(grid, 3, lower_order_final=True).rows]
    assert depths == [1, 2, 3, 3, 2, 1]
    for arguments, words in (
        ({"degree": 4}, "0, 1, 2 or 3"),
        ({"degree": 1, "variable": "logrho"}, "log-rho"),
        ({"core": "score"}, "data, noise, velocity"),
        ({"core": "velocity", "eta": 1.0}, "eta = 0"),
        ({"eta": -1.0}, "at least 0"),
    ):
        with pytest.raises(UsageError, match=words):
            deis_plan(grid, **arguments)
    assert len(deis_plan(grid_of(VE(), [5.0, 1.0]), 3).rows) == 1
