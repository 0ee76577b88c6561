"""Rules that must be the same rule."""

import math

import pytest
import torch
from analytic import grid_of, two_modes

from diffaccel.core.grids import make_grid
from diffaccel.core.schedule import VE, Flow, VPLinear, from_diffusers
from diffaccel.samplers.adams import adams_bashforth, ghvb_plan, ipndm_plan
from diffaccel.samplers.ddim import ddim_plan
from diffaccel.samplers.deis import deis_plan
from diffaccel.samplers.log_snr import dpm_solver_plan, unipc_plan
from diffaccel.samplers.multistep import VARIABLES, Core, Slope, multistep_plan
from diffaccel.samplers.runge_kutta import runge_kutta_plan
from diffaccel.samplers.sample import sample

VP = VPLinear()
FIRST_ORDER = [
    *(lambda g, v=v, c=c: deis_plan(g, 0, v, core=c) for v in VARIABLES for c in ("noise", "data")),
    lambda g: ipndm_plan(g, 1),
    lambda g: ghvb_plan(g, 1.0),
    lambda g: dpm_solver_plan(g, 1),
    lambda g: dpm_solver_plan(g, 1, core="noise"),
    lambda g: unipc_plan(g, 1, corrector=False),
    lambda g: runge_kutta_plan(g, "1euler"),
]


def end_of(plan, schedule=VP, scale=1.0):
    x = schedule.initial_scale * torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return sample(two_modes(schedule), x * scale, plan)


def close(left, right, tolerance=1e-12):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def uniform_in_rho(steps=8):
    return grid_of(VP, VP.t_from_rho(torch.linspace(3.0, 0.4, steps + 1, dtype=torch.float64)))


@pytest.mark.parametrize("schedule", [VP, VE(), Flow(), from_diffusers({})], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_every_first_order_rule_is_ddim(schedule, end):
    grid = make_grid(schedule, 7, "karras", end=end)
    expected = end_of(ddim_plan(grid), schedule)
    for plan in FIRST_ORDER:
        close(end_of(plan(grid), schedule), expected)
    if isinstance(schedule, Flow):
        close(end_of(deis_plan(grid, 0, core="velocity"), schedule), expected)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_whole_ghvb_is_adams_bashforth(order):
    grid = make_grid(VP, 9, "quadratic")
    close(end_of(ghvb_plan(grid, float(order))), end_of(ipndm_plan(grid, order)))


def test_momentum_with_beta_one_changes_nothing_and_heavy_ball_on_euler_is_ghvb_below_one():
    grid = make_grid(VP, 9, "quadratic")
    for plan in (ipndm_plan, deis_plan, dpm_solver_plan, unipc_plan):
        for kind in ("heavy-ball", "nesterov"):
            close(end_of(plan(grid, momentum=kind, beta=1.0)), end_of(plan(grid)))
    close(end_of(ipndm_plan(grid, 1, momentum="heavy-ball", beta=0.7)), end_of(ghvb_plan(grid, 0.7)))


def test_ghvb_tends_linearly_to_the_order_below():
    grid = make_grid(VP, 12, "quadratic")
    # Warm-up included: with n evaluations GHVB is near the rule that has n − 1.
    limit = end_of(multistep_plan(Core("noise", grid), lambda i: Slope(adams_bashforth(min(max(i, 1), 2)))))
    gaps = [float((end_of(ghvb_plan(grid, 2.0 + beta)) - limit).norm()) for beta in (1e-2, 1e-4, 1e-6)]
    assert gaps[0] / gaps[1] == pytest.approx(100, rel=0.05) and gaps[1] / gaps[2] == pytest.approx(100, rel=0.05)


def test_fixed_and_variable_weights_agree_exactly_on_a_uniform_grid_and_only_there():
    uniform, other = uniform_in_rho(), make_grid(VP, 8, "quadratic", end="sigma_min")
    close(end_of(deis_plan(uniform, 3, "rho")), end_of(ipndm_plan(uniform, 4)))
    assert float((end_of(deis_plan(other, 3, "rho")) - end_of(ipndm_plan(other, 4))).norm()) > 1e-3
    for number in (0.6, 1.8, 2.5, 3.4):
        order = math.ceil(number)
        for grid, same in ((uniform, True), (other, order == 1)):
            pairs = zip(ghvb_plan(grid, number).rows, ghvb_plan(grid, number, variable="rho").rows, strict=True)
            gaps = [
                max(
                    abs(a - b)
                    for a, b in zip((*left.states, *left.outputs), (*right.states, *right.outputs), strict=True)
                )
                for left, right in list(pairs)[order:]  # warm-up through lower orders differs
            ]
            assert (max(gaps) < 1e-11) == same


def test_log_snr_rules_are_deis_in_log_rho():
    grid = make_grid(VP, 9, "quadratic", end="sigma_min")
    for core in ("data", "noise"):
        third = [row.outputs for row in dpm_solver_plan(grid, 3, False, core).rows[2:]]
        expected = [row.outputs for row in deis_plan(grid, 2, "log-rho", core=core).rows[2:]]
        torch.testing.assert_close(torch.tensor(third), torch.tensor(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "plan",
    [
        lambda g: deis_plan(g, 2, "rho"),
        lambda g: deis_plan(g, 2, "log-rho", core="data"),
        lambda g: deis_plan(g, 2, "angle"),
        lambda g: ipndm_plan(g, 4, momentum="nesterov", beta=0.8),
        lambda g: ghvb_plan(g, 2.5),
        lambda g: unipc_plan(g, 3, momentum="heavy-ball", beta=0.8),
        lambda g: runge_kutta_plan(g, "3ral"),
    ],
)
def test_schedules_with_the_same_rho_give_the_same_trajectory(plan):
    """VP and VE are the same ODE in x/α; only rules that look at t can tell them apart."""
    rho = torch.logspace(1, -1.5, 8, dtype=torch.float64)
    ends = []
    for schedule in (VP, VE(1e-4, 200.0)):
        grid = grid_of(schedule, schedule.t_from_rho(rho))
        x = torch.tensor([[5.0, -3.0]], dtype=torch.float64) * grid.alpha[0]
        ends.append(sample(two_modes(schedule), x, plan(grid)) / grid.alpha[-1])
    close(ends[0], ends[1], 1e-9)


@pytest.mark.parametrize("plan", [deis_plan, ipndm_plan, ghvb_plan, dpm_solver_plan, unipc_plan, runge_kutta_plan])
def test_samplers_are_linear_in_what_they_see(plan):
    """A teacher that is linear in x: scaling the noise scales the sample."""
    table = plan(make_grid(VP, 7, "quadratic"))
    x = torch.randn(3, 2, dtype=torch.float64)

    def linear(x, t, condition):
        return x * t.unsqueeze(1).sin()

    close(sample(linear, 7.0 * x, table), 7.0 * sample(linear, x, table))


def test_ancestral_first_order_data_core_is_ancestral_ddim():
    for schedule in (VP, Flow()):
        grid = make_grid(schedule, 6)
        for left, right in zip(deis_plan(grid, 0, core="data", eta=1.0).rows, ddim_plan(grid, 1.0).rows, strict=True):
            assert left.noise == pytest.approx(right.noise) and left.states == pytest.approx(right.states)
            assert left.outputs == pytest.approx(right.outputs)
