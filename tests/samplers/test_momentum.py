import math

import pytest
import torch
from analytic import grid_of

from diffaccel.core.errors import UsageError
from diffaccel.core.grids import make_grid
from diffaccel.core.schedule import VE, Flow, VPLinear
from diffaccel.samplers.adams import ghvb_plan, ipndm_plan
from diffaccel.samplers.momentum import ghvb_beta, heavy_ball_beta
from diffaccel.samplers.sample import sample
from diffaccel.samplers.scheduler import DEISScheduler, GHVBScheduler, IPNDMScheduler

# The paper's u_n·(divisor) over v_n, v_{n−1}, …; on e_n the same polynomial with β in front (its eq. 12).
PAPER = {
    1: lambda b: [b],
    2: lambda b: [(2 + b) / 2, -(2 - b) / 2],
    3: lambda b: [(18 + 5 * b) / 12, -(24 - 8 * b) / 12, (6 - b) / 12],
    4: lambda b: [(46 + 9 * b) / 24, -(78 - 19 * b) / 24, (42 - 5 * b) / 24, -(10 - b) / 24],
    5: lambda b: [
        coefficient / 720
        for coefficient in (1650 + 251 * b, -(3420 - 646 * b), 2880 - 264 * b, -(1380 - 106 * b), 270 - 19 * b)
    ],
}


@pytest.mark.parametrize("order", PAPER)
@pytest.mark.parametrize("beta", [0.2, 0.5, 0.9, 1.0])
def test_coefficients_are_the_papers(order, beta):
    grid = grid_of(VE(), torch.linspace(9.0, 1.0, 9, dtype=torch.float64))  # steps of −1
    row = ghvb_plan(grid, order - 1 + beta).rows[6]
    assert [-weight for weight in row.outputs] == pytest.approx(PAPER[order](beta), abs=1e-12)
    assert row.states == pytest.approx((1.0,) if beta == 1.0 else (2.0 - beta, beta - 1.0))


def test_warm_up_filters_the_first_evaluations():
    """Against the recurrence of the paper, spelt out: v filtered, u from the v there are."""
    beta, grid = 0.4, grid_of(VE(), torch.linspace(9.0, 1.0, 9, dtype=torch.float64))
    e = torch.randn(8, dtype=torch.float64)
    v, y = [], torch.tensor([1.0], dtype=torch.float64)
    for n in range(8):
        v.append(e[n] if n == 0 else (1 - beta) * v[-1] + beta * e[n])
        weights = PAPER[min(3, n + 1)](beta)
        y = y - sum(w * v[n - j] for j, w in enumerate(weights)) / beta
    outputs = iter(e)
    found = sample(
        lambda x, t, _: x - t.unsqueeze(1) * next(outputs), torch.ones(1, 1, dtype=torch.float64), ghvb_plan(grid, 2.4)
    )
    torch.testing.assert_close(found[0], y)


@pytest.mark.parametrize(
    ("plan", "stable"),
    [
        (lambda g: ipndm_plan(g, 1), True),
        (lambda g: ipndm_plan(g, 2), False),
        (lambda g: ipndm_plan(g, 2, momentum="heavy-ball", beta=0.8), True),
        (lambda g: ipndm_plan(g, 2, momentum="heavy-ball", beta=0.9), True),
        (lambda g: ghvb_plan(g, 1.8), True),
        (lambda g: ghvb_plan(g, 1.9), True),
    ],
    ids=["Euler", "AB2", "AB2 + HB 0.8", "AB2 + HB 0.9", "GHVB 1.8", "GHVB 1.9"],
)
def test_momentum_widens_the_region_of_stability(plan, stable):
    """The paper's stiff toy: x' = [[0, 1], [−9, −10]]x over t ∈ [0, 3] in 26 steps, with ρ = 4 − t."""
    matrix = torch.tensor([[0.0, 1.0], [-9.0, -10.0]], dtype=torch.float64)
    grid = grid_of(VE(), torch.linspace(4.0, 1.0, 27, dtype=torch.float64))
    start = torch.tensor([[-1.0, 0.0]], dtype=torch.float64)
    end = sample(lambda x, t, _: x + t.unsqueeze(1) * x @ matrix.T, start, plan(grid))
    exact = start @ torch.linalg.matrix_exp(3.0 * matrix).T
    error = float((end - exact).norm())
    assert error < 0.15 if stable else error > 1.0


def test_beta_of_the_guidance_scale():
    assert [heavy_ball_beta(scale) for scale in (0.0, 1.0, 7.5, 15.0, 22.5, 40.0)] == [1.0, 1.0, 0.9, 0.8, 0.6, 0.6]
    assert [ghvb_beta(scale) for scale in (1.0, 7.5, 15.0, 22.5)] == [1.0, 0.5, 0.2, 0.1]
    assert heavy_ball_beta(11.25) == pytest.approx(0.85)
    grid = make_grid(VPLinear(), 8, "quadratic")
    chosen = IPNDMScheduler(momentum="heavy-ball", guidance_scale=15.0).plan(grid)
    assert chosen.rows == IPNDMScheduler(momentum="heavy-ball", beta=0.8).plan(grid).rows
    assert GHVBScheduler(ghvb_order=3.9, guidance_scale=7.5).plan(grid) == ghvb_plan(grid, 3.5)


def test_momentum_on_a_flow_starts_from_pure_noise():
    grid = make_grid(Flow(), 6)
    for core in ("velocity", "noise", "data"):
        for plan in (ipndm_plan(grid, 3, core=core, momentum="nesterov", beta=0.7), ghvb_plan(grid, 2.5, core)):
            total = [sum(row.outputs) for row in plan.rows]
            assert all(math.isfinite(value) for value in total) and plan.state_depth <= 4


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DEISScheduler(momentum="heavyball"), "Did you mean 'heavy-ball'"),
        (lambda: DEISScheduler(momentum="heavy-ball", beta=0.0), r"\(0, 1\]"),
        (lambda: GHVBScheduler(ghvb_order=5.5), "at most 5"),
        (lambda: GHVBScheduler(ghvb_order=0), "above 0"),
        (lambda: GHVBScheduler(variable="time"), "log-rho"),
        (lambda: IPNDMScheduler(core="score"), "velocity"),
        (lambda: IPNDMScheduler(solver_order=5), "1, 2, 3 or 4"),
    ],
)
def test_errors_say_what_is_allowed(call, words):
    with pytest.raises(UsageError, match=words):
        call()
