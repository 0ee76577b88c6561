import math

import pytest
import torch
from analytic import grid_of, two_modes

from diffaccel.core.errors import UsageError
from diffaccel.core.grids import make_grid
from diffaccel.core.prediction import convert
from diffaccel.core.schedule import VE, Flow, VPLinear, from_diffusers
from diffaccel.samplers.ddim import ddim_plan
from diffaccel.samplers.deis import VARIABLES, adams_bashforth_weights, deis_plan
from diffaccel.samplers.plan import Run
from diffaccel.samplers.sample import sample
from diffaccel.testing import GaussianMixtureTeacher, reference_solution

SCHEDULES = [VPLinear(), VE(), Flow(), from_diffusers({}), from_diffusers({"rescale_betas_zero_snr": True})]
GOLDEN_VE = {
    ("t", 0): (0.8915468334, 0.0010226734),
    ("rho", 1): (0.9370884937, -0.0090453235),
    ("rho", 2): (0.9480920527, -0.0113656272),
    ("rho", 3): (0.9516103428, -0.0120935907),
    ("log-rho", 1): (1.0589042398, -0.0345987492),
    ("log-rho", 2): (1.1499746465, -0.0476889568),
    ("log-rho", 3): (1.1828988985, -0.0446363650),
}
GOLDEN_VP = {
    ("t", 0): (0.9331292354, -0.0052534043),
    ("t", 1): (0.9838439167, -0.0111941196),
    ("t", 2): (0.9937888328, -0.0121878664),
    ("t", 3): (0.9921491389, -0.0126068756),
    ("rho", 1): (0.9640199692, -0.0093704573),
    ("rho", 2): (0.9664135567, -0.0094561974),
    ("rho", 3): (0.9658196505, -0.0093030200),
    ("log-rho", 1): (0.9897897992, -0.0119284616),
    ("log-rho", 2): (0.9692655614, -0.0141132500),
    ("log-rho", 3): (0.9880540198, -0.0447167823),
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_order_zero_is_ddim(schedule, variable, end):
    grid = make_grid(schedule, 7, "karras", end=end)
    teacher = two_modes(schedule)
    x = schedule.initial_scale * torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plans = (ddim_plan(grid), deis_plan(grid, 0, variable), deis_plan(grid, 3, variable))
    ddim, deis, third = (sample(teacher, x, plan) for plan in plans)
    tolerance = 1e-13 if grid.alpha[0] == 0 or grid.rho[0] < 1000 else 1e-11
    torch.testing.assert_close(deis, ddim, rtol=tolerance, atol=tolerance)
    assert bool(torch.isfinite(third).all())


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_polynomials_are_integrated_exactly(variable, order):
    """∫ z^k dρ over the last step is reproduced by the weights for k ≤ order; the truth from a fine Simpson rule."""
    schedule = VPLinear()
    grid = make_grid(schedule, 6, "quadratic", end="sigma_min")
    step = 4
    weights = adams_bashforth_weights(grid, step, order, variable)
    assert sum(weights) == pytest.approx(grid.rho[step + 1] - grid.rho[step], rel=1e-12)
    log_rho = torch.linspace(math.log(grid.rho[step]), math.log(grid.rho[step + 1]), 20001, dtype=torch.float64)
    rho = log_rho.exp()
    coordinate = {"t": schedule.t_from_rho, "rho": lambda r: r, "log-rho": torch.log}[variable]
    simpson = torch.ones(20001, dtype=torch.float64)
    simpson[1:-1:2], simpson[2:-1:2] = 4.0, 2.0
    simpson *= float(log_rho[1] - log_rho[0]) / 3
    nodes = coordinate(torch.tensor(grid.rho, dtype=torch.float64))
    for power in range(order + 1):
        exact = float((simpson * rho * coordinate(rho) ** power).sum())
        found = sum(w * float(nodes[step - j]) ** power for j, w in enumerate(weights))
        assert found == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("schedule", [Flow(), from_diffusers({}), VE()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("variable", VARIABLES)
def test_weights_of_the_step_to_the_clean_image_sum_to_its_length(schedule, variable):
    grid = make_grid(schedule, 5)
    weights = adams_bashforth_weights(grid, 4, 3, variable)
    assert sum(weights) == pytest.approx(-grid.rho[4], rel=1e-12)
    assert len(weights) == (1 if variable == "log-rho" else 4)


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_convergence_order(variable, order):
    """Global error falls as N^-(order+1) from exact starting values."""
    schedule = VPLinear()
    teacher = GaussianMixtureTeacher([0.4, 0.6], [[-1, 0.5], [1, 0]], [[0.4, 0.5], [0.6, 0.3]], schedule)
    start = torch.tensor([[0.5, -0.3], [1.2, 0.4]], dtype=torch.float64)
    errors = []
    for steps in (80, 160):
        grid = grid_of(schedule, torch.linspace(0.8, 0.3, steps + 1, dtype=torch.float64))
        run, x = Run(deis_plan(grid, order, variable)), start
        for i, row in enumerate(run.plan.rows):
            output = convert(teacher(x, torch.full((2,), row.t)), x, "sample", row.quantity, row.alpha, row.sigma)
            following = run.advance(x, output)
            exact_start = i < order
            x = reference_solution(teacher, x, grid.rho[i], grid.rho[i + 1], 4) if exact_start else following
        exact = reference_solution(teacher, start, grid.rho[0], grid.rho[-1], 400)
        errors.append(float((x - exact).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order + 1, abs=0.15)


@pytest.mark.parametrize(
    ("schedule", "kind", "start", "golden", "exact"),
    [
        (VE(), "karras", (40.0, -24.0), GOLDEN_VE, (1.0015198481, -0.0182272629)),
        (VPLinear(), "quadratic", (0.5, -0.3), GOLDEN_VP, (1.0018678472, -0.0182130850)),
    ],
    ids=["VE", "VP"],
)
def test_golden_end_points(schedule, kind, start, golden, exact):
    teacher = two_modes(schedule)
    grid = make_grid(schedule, 6, kind, end="sigma_min")
    x = torch.tensor([start], dtype=torch.float64)
    for (variable, order), expected in golden.items():
        assert sample(teacher, x, deis_plan(grid, order, variable))[0].tolist() == pytest.approx(expected, abs=1e-7)
    assert reference_solution(teacher, x, grid.rho[0], grid.rho[-1])[0].tolist() == pytest.approx(exact, abs=1e-7)


def test_paper_coefficients():
    """tAB3 on the quadratic CIFAR grid, 10 steps: independent quadrature of the paper's own integrand."""
    plan = deis_plan(make_grid(VPLinear(), 10, "quadratic", end="sigma_min"), 3, "t")
    assert plan.rows[3].states[0] == pytest.approx(1.76140, abs=1e-5)
    assert plan.rows[3].outputs == pytest.approx((-1.5387, 1.2237, -0.6328, 0.1286), abs=1e-4)
    assert plan.rows[9].outputs == pytest.approx((-0.0801, 0.0336, -0.0105, 0.0014), abs=1e-4)


@pytest.mark.parametrize("variable", ["rho", "log-rho"])
def test_schedules_with_the_same_rho_give_the_same_trajectory(variable):
    vp, ve = VPLinear(), VE(1e-4, 200.0)
    rho = torch.logspace(1, -1.5, 8, dtype=torch.float64)
    ends = []
    for schedule in (vp, ve):
        grid = grid_of(schedule, schedule.t_from_rho(rho))
        x = torch.tensor([[5.0, -3.0]], dtype=torch.float64) * grid.alpha[0]
        ends.append(sample(two_modes(schedule), x, deis_plan(grid, 2, variable)) / grid.alpha[-1])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-9)


def test_orders_improve_on_a_flow_and_the_first_call_is_pure_noise():
    schedule = Flow()
    teacher = two_modes(schedule)
    x = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = reference_solution(teacher, x, math.inf, 0.0, 600)
    grid = make_grid(schedule, 20)
    assert grid.alpha[0] == 0.0 and grid.sigma[-1] == 0.0
    errors = [float((sample(teacher, x, deis_plan(grid, k)) - exact).norm()) for k in range(3)]
    assert errors[1] < 0.7 * errors[0] and errors[2] < errors[1]


def test_lower_order_final_and_errors():
    grid = make_grid(VPLinear(), 6, "quadratic")
    depths = [len(row.outputs) for row in deis_plan(grid, 3, lower_order_final=True).rows]
    assert depths == [1, 2, 3, 3, 2, 1]
    with pytest.raises(UsageError, match="0, 1, 2 or 3"):
        deis_plan(grid, 4)
    with pytest.raises(UsageError, match="log-rho"):
        deis_plan(grid, 1, "logrho")
