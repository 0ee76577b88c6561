import pytest
import torch
from analytic import two_modes

from diffaccel.core.errors import UsageError
from diffaccel.core.grids import make_grid
from diffaccel.core.schedule import Flow, VPLinear, from_diffusers
from diffaccel.samplers.runge_kutta import TABLEAUX, runge_kutta_plan
from diffaccel.samplers.sample import sample
from diffaccel.samplers.scheduler import RhoRKScheduler
from diffaccel.testing import reference_solution


@pytest.mark.parametrize("tableau", TABLEAUX.values(), ids=lambda t: t.name)
def test_tableaux_satisfy_the_order_conditions(tableau):
    c, b = tableau.nodes, tableau.weights
    for node, row in zip(c, tableau.stages, strict=True):
        assert sum(row) == pytest.approx(node, abs=1e-15)
    for power in range(tableau.order):
        assert sum(w * node**power for w, node in zip(b, c, strict=True)) == pytest.approx(1 / (power + 1))
    if tableau.order >= 3:
        nested = [sum(a * node for a, node in zip(row, c, strict=False)) for row in tableau.stages]
        assert sum(w * value for w, value in zip(b, nested, strict=True)) == pytest.approx(1 / 6)


@pytest.mark.parametrize("tableau", TABLEAUX)
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_calls_and_budget(tableau, end):
    scheduler = RhoRKScheduler(tableau=tableau, final_sigmas_type=end)
    stages = len(TABLEAUX[tableau].nodes)
    assert scheduler.order == stages
    for steps in (1, 2, 5):
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == scheduler.calls(steps) == len(scheduler.sigmas) - 1
        assert scheduler.num_inference_steps == steps
    for nfe in range(scheduler.calls(1), 14):
        scheduler.set_timesteps(nfe=nfe)
        assert len(scheduler.timesteps) <= nfe < scheduler.calls(scheduler.num_inference_steps + 1)
    with pytest.raises(UsageError, match="at least"):
        scheduler.set_timesteps(nfe=scheduler.calls(1) - 1)
    with pytest.raises(UsageError, match="alone"):
        scheduler.set_timesteps(4, nfe=8)


def test_stages_are_called_at_their_own_times():
    grid = make_grid(VPLinear(), 2, "quadratic", end="sigma_min")
    rows = runge_kutta_plan(grid, "4rk").rows
    middle = 0.5 * (grid.rho[0] + grid.rho[1])
    assert [row.sigma / row.alpha for row in rows[:4]] == pytest.approx([grid.rho[0], middle, middle, grid.rho[1]])
    assert rows[1].t == pytest.approx(float(VPLinear().t_from_rho(torch.tensor(middle, dtype=torch.float64))))
    assert rows[4].t == grid.times[1]


@pytest.mark.parametrize("tableau", ["2heun", "3kutta", "4rk"])
def test_flows_are_integrated_in_the_velocity_from_pure_noise(tableau):
    schedule = Flow()
    teacher = two_modes(schedule)
    x = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = reference_solution(teacher, x, float("inf"), 0.0, 600)
    plan = runge_kutta_plan(make_grid(schedule, 40), tableau)
    assert plan.rows[-1].outputs[0] != 0.0 and plan.nfe == 39 * plan.order + 1
    assert float((sample(teacher, x, plan) - exact).norm() / exact.norm()) < 0.02


def test_a_run_may_begin_inside_a_step():
    """The rest of the step goes from stage to stage in the first order, then the rule takes over."""
    scheduler, x = RhoRKScheduler(tableau="3kutta", prediction_type="sample"), torch.ones(1, 2)
    scheduler.set_timesteps(4)
    for begin in (4, 5):
        scheduler.set_begin_index(begin)
        scheduler._step_index = None
        state = x
        for t in scheduler.timesteps[begin:]:
            state = scheduler.step(torch.full_like(x, 0.25), t, state).prev_sample
        torch.testing.assert_close(state, torch.full_like(x, 0.25))
    scheduler.set_begin_index(10)
    scheduler._step_index = None
    with pytest.raises(UsageError, match="call 10 of 10"):
        scheduler.step(x, scheduler.timesteps[4], x)


def test_explicit_levels_are_counted_as_calls():
    """Pipelines take the calls that follow from explicit levels for steps, so ``order`` must not multiply them."""
    scheduler = RhoRKScheduler(tableau="2heun")
    scheduler.set_timesteps(timesteps=[999, 500, 100])
    assert scheduler.order == 1 and len(scheduler.timesteps) == 5
    scheduler.set_timesteps(3)
    assert scheduler.order == 2


@pytest.mark.parametrize("tableau", ["2heun", "3kutta", "4rk"])
def test_zero_terminal_snr_does_not_overshoot(tableau):
    schedule = from_diffusers({"rescale_betas_zero_snr": True})
    teacher = two_modes(schedule)
    x = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = reference_solution(teacher, x, float(schedule.rho(999)), 0.0, 600)
    error = sample(teacher, x, runge_kutta_plan(make_grid(schedule, 12), tableau)) - exact
    assert float(error.norm() / exact.norm()) < 0.25


def test_an_unknown_tableau():
    with pytest.raises(UsageError, match="3kutta"):
        RhoRKScheduler(tableau="kutta3")
