"""Solver schedules: the rules that they contain, the published update, and orders of convergence."""

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch
from analytic import grid_of, two_modes

from diffaccel.core.grids import make_grid
from diffaccel.core.prediction import convert
from diffaccel.core.schedule import EDM, Flow, VPLinear, from_diffusers
from diffaccel.samplers.adams import ipndm_plan
from diffaccel.samplers.ddim import ddim_plan
from diffaccel.samplers.deis import deis_plan
from diffaccel.samplers.log_snr import dpm_solver_plan, unipc_plan
from diffaccel.samplers.plan import Run
from diffaccel.samplers.sample import sample
from diffaccel.samplers.usf import CORRECTORS, RELAXATIONS, TAYLOR_VARIABLES, Decision, SolverSchedule
from diffaccel.testing import GaussianMixtureTeacher, reference_solution

VP, FLOW, TABLE = VPLinear(), Flow(), from_diffusers({})
VARIABLES = TAYLOR_VARIABLES[:-1]
IN_LAMBDA = ("bh1", "exp+", "exp-", "linear")
START = torch.tensor([[0.5, -0.3], [1.2, 0.4]], dtype=torch.float64)


def over(grid, decide, **settings) -> SolverSchedule:
    """The schedule on the nodes of a grid; ``decide(index)`` says what a step does, without corrector for the last."""
    steps = [decide(index) for index in range(grid.steps)]
    steps[-1] = dataclasses.replace(steps[-1], corrector="none")
    return SolverSchedule(grid.times[:-1], tuple(steps), **settings)


def check_same(grid, plan, decide) -> None:
    """The decisions are the rule: every trajectory ends at the same point."""
    teacher, x = two_modes(grid.schedule), torch.randn(5, 2, dtype=torch.float64)
    expected = sample(teacher, x, plan)
    found = sample(teacher, x, over(grid, decide).compile(grid.schedule))
    assert float((found - expected).norm() / expected.norm()) < 2e-12


@pytest.mark.parametrize("grid", [make_grid(TABLE, 6, "quadratic"), make_grid(FLOW, 6), make_grid(EDM(), 6, "karras")])
def test_known_rules_are_solver_schedules(grid):
    check_same(grid, ddim_plan(grid), lambda i: Decision())
    for core in ("noise", "data", "velocity"):
        for order in (1, 2, 3, 4):
            check_same(grid, ipndm_plan(grid, order, core=core), lambda i, o=order, c=core: Decision(o, c, "step"))
        for variable, degree in itertools.product(VARIABLES, (1, 2, 3)):
            same = Decision(degree + 1, core, variable)
            check_same(grid, deis_plan(grid, degree, variable, core=core), lambda i, s=same: s)
            plan = deis_plan(grid, degree, variable, core=core, corrector=True, momentum="heavy-ball", beta=0.8)
            same = dataclasses.replace(same, corrector="pseudo", carry=0.2)
            check_same(grid, plan, lambda i, s=same: s)


@pytest.mark.parametrize(
    "grid", [make_grid(TABLE, 6, "quadratic"), make_grid(FLOW, timesteps=[970, 800, 500, 300, 90]), make_grid(VP, 5)]
)
@pytest.mark.parametrize("core", ["data", "noise"])
def test_dpm_solver_and_unipc_are_solver_schedules(grid, core):
    for order in (1, 2, 3):

        def relaxed(i, name, order=order):  # the papers' ½ rules are those with one derivative
            return name if min(order, i + 1) <= 2 else "none"

        def dpm(i, order=order):
            return Decision(order, core, relaxation=relaxed(i, "bh2"))

        check_same(grid, dpm_solver_plan(grid, order, False, core), dpm)
        for name in ("bh1", "bh2"):

            def unipc(i, order=order, name=name):
                return Decision(order, core, relaxation=relaxed(i, name), corrector="pseudo")

            check_same(grid, unipc_plan(grid, order, name, False, core=core), unipc)
            check_same(
                grid,
                unipc_plan(grid, order, name, False, False, core),
                lambda i, u=unipc: dataclasses.replace(u(i), corrector="none"),
            )


def test_singlestep_dpm_solver():
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1) and DPM-Solver-2 (Lu et al. 2022a, algorithm 4), any midpoint."""
    grid = make_grid(VP, 7, "quadratic", end="sigma_min")  # three pairs of steps and one left over
    teacher, lam = two_modes(VP), [-math.log(rho) for rho in grid.rho]

    def told(x, node, kind):
        x0 = teacher(x, torch.full((len(x),), grid.times[node], dtype=torch.float64))
        return convert(x0, x, "sample", kind, grid.alpha[node], grid.sigma[node])

    def first(x, f, s, t, core):
        h = lam[t] - lam[s]
        if core == "data":
            return grid.sigma[t] / grid.sigma[s] * x - grid.alpha[t] * math.expm1(-h) * f
        return grid.alpha[t] / grid.alpha[s] * x - grid.sigma[t] * math.expm1(h) * f

    for core, kind in (("data", "sample"), ("noise", "epsilon")):
        x = START
        for s in (0, 2, 4):
            f = told(x, s, kind)
            middle = told(first(x, f, s, s + 1, core), s + 1, kind)
            r = (lam[s + 1] - lam[s]) / (lam[s + 2] - lam[s])
            x = first(x, (1 - 0.5 / r) * f + 0.5 / r * middle, s, s + 2, core)
        expected = first(x, told(x, 6, kind), 6, 7, core)
        pair = Decision(1, core), Decision(2, core, start=2, relaxation="bh2")
        plan = over(grid, lambda i, p=pair: p[i % 2], end=grid.rho[-1]).compile(VP)
        torch.testing.assert_close(sample(teacher, START, plan), expected, rtol=1e-12, atol=1e-12)


NODES, WEIGHTS = (0.5 * values for values in np.polynomial.legendre.leggauss(40))


def phi(k: int, z: float) -> float:
    """φ_k(z) = ∫_0^1 e^((1−u)z) u^(k−1)/(k−1)! du."""
    u = NODES + 0.5
    return float(WEIGHTS @ (np.exp((1.0 - u) * z) * u ** (k - 1))) / math.factorial(k - 1)


def published(teacher, schedule, x, decisions: SolverSchedule):
    """USF (arXiv 2312.07243, eq. 4–7) as the paper has it, in λ, on values instead of coefficients."""
    times = [*decisions.times, float(schedule.t_from_rho(decisions.end))]
    lam = [float(schedule.lambda_(t)) for t in times]
    alpha, sigma = ([float(f(t)) for t in times] for f in (schedule.alpha, schedule.sigma))
    states, told = [], []  # by node: the state, and the network's (x, x0)

    def call(x, node):
        return x, teacher(x, torch.full((len(x),), times[node], dtype=torch.float64))

    def value(node, core):
        x, x0 = told[node]
        return x0 if core == "data" else (x - alpha[node] * x0) / sigma[node]

    def step(node, decision, correct):
        s, t = node + 1 - decision.start, node + 1
        h, f = lam[t] - lam[s], value(s, decision.core)
        data, sign = decision.core == "data", -1.0 if decision.core == "data" else 1.0
        right = range(t if correct else node, s, -1)
        others = [*right, *range(s - 1, -1, -1)]
        count = min(decision.order - 1 + correct, len(others))
        total = h * phi(1, sign * h) * f
        for q in range(1, count + 1):
            m = count if correct or not decision.points else min(max(decision.points[q - 1], q), len(others))
            gaps = torch.tensor([lam[o] - lam[s] for o in others[:m]], dtype=torch.float64)
            system = torch.stack([gaps**i / math.factorial(i) for i in range(1, m + 1)])
            wanted = torch.tensor([float(i == q) for i in range(1, m + 1)], dtype=torch.float64)
            shares = torch.linalg.solve(system, wanted)
            derivative = sum(a * (value(o, decision.core) - f) for a, o in zip(shares, others[:m], strict=True))
            scale = 1.0
            if q == 1 and (not correct or count == 1):
                z, c = sign * h, decision.strength
                scale = {
                    "none": 1.0,
                    "bh1": 0.5 * z**2 / (math.expm1(z) - z),
                    "bh2": 0.5 * z * math.expm1(z) / (math.expm1(z) - z),
                    "exp+": 1.0 + 0.5 * math.expm1(z),
                    "exp-": 1.0 - 0.5 * math.expm1(z),
                    "linear": 1.0 + c * h,
                    "scale": c,
                }[decision.relaxation]
            total = total + h ** (q + 1) * phi(q + 1, sign * h) * scale * derivative
        if data:
            return sigma[t] / sigma[s] * states[s] + alpha[t] * total
        return alpha[t] / alpha[s] * states[s] - sigma[t] * total

    for node, decision in enumerate(decisions.steps):
        states.append(x)
        told.append(call(x, node))
        before = decisions.steps[node - 1] if node else decision
        if node and before.corrector != "none":
            states[node] = step(node - 1, before, True)
            if before.corrector == "implicit":
                told[node] = call(states[node], node)
        x = step(node, decision, False)
    return x


def test_the_published_update():
    """All of the paper's choices: relaxation, corrector, low-order estimates, starts further back."""
    teacher, times = two_modes(VP), (0.9, 0.72, 0.5, 0.33, 0.2, 0.1)
    dice = random.Random(3)
    plain = [
        Decision(order, core, relaxation=relaxation, corrector=corrector, strength=0.3)
        for order in (1, 2, 3, 4)
        for core in ("noise", "data")
        for relaxation in RELAXATIONS
        for corrector in CORRECTORS
    ]
    cases = [[decision] * len(times) for decision in plain]
    for _ in range(120):
        cases.append([dataclasses.replace(dice.choice(plain), **_reach(dice, i)) for i in range(len(times))])
    for steps in cases:
        steps = [
            dataclasses.replace(step, points=_points(dice, step.order) if dice.random() < 0.5 else ()) for step in steps
        ]
        steps[-1] = dataclasses.replace(steps[-1], corrector="none")
        decisions = SolverSchedule(times, tuple(steps), end=0.1)
        expected = published(teacher, VP, START, decisions)
        found = sample(teacher, START, decisions.compile(VP))
        assert float((found - expected).norm() / (1.0 + expected.norm())) < 1e-10, steps


def _reach(dice, index: int) -> dict:
    return {"start": dice.choice([1, 1, 2, 3]) if index >= 2 else 1}


def _points(dice, order: int) -> tuple[int, ...]:
    return tuple(dice.randint(q, order) for q in range(1, order))


MIXTURE = GaussianMixtureTeacher([0.4, 0.6], [[-1, 0.5], [1, 0]], [[0.4, 0.5], [0.6, 0.3]], VP)
_EXACT = {}


def exact(steps: int):
    """The grid of this many steps from t = 0.8 to 0.3 and the exact trajectory at its nodes."""
    if steps not in _EXACT:
        grid, states = grid_of(VP, torch.linspace(0.8, 0.3, steps + 1, dtype=torch.float64)), [START]
        for pair in itertools.pairwise(grid.rho):
            states.append(reference_solution(MIXTURE, states[-1], *pair, 6))
        _EXACT[steps] = grid, states
    return _EXACT[steps]


ORDERS = [  # decisions that repeat, order, steps that get exact states
    *(([Decision(n, core)], n, n - 1) for n in (1, 2, 3, 4) for core in ("noise", "data")),
    *(([Decision(3, core, variable)], 3, 2) for core in ("noise", "velocity") for variable in VARIABLES),
    *(([Decision(n, "data", corrector="pseudo")], n + 1, n) for n in (1, 2, 3)),
    *(([Decision(n, "noise", "t", corrector="implicit")], n + 1, n) for n in (1, 2, 3)),
    *(([Decision(3, "velocity", "angle", corrector=c)], 4, 3) for c in ("pseudo", "implicit")),
    # A derivative from m points is wrong by h^(m−q+1), which a factor h^(q+1) makes a local error of order m + 2.
    *(([Decision(3, "data", points=(m, 2))], m + 1, 2) for m in (1, 2)),
    *(([Decision(4, points=points)], min(points) + 1, 3) for points in ((3, 3, 3), (2, 3, 3), (3, 2, 3), (1, 2, 3))),
    *(([Decision(2, core, relaxation=r, strength=0.5)], 2, 1) for core in ("data", "noise") for r in IN_LAMBDA),
    *(([Decision(3, core, relaxation=r, strength=0.5)], 2, 2) for core in ("data", "noise") for r in ("bh1", "exp-")),
    ([Decision(2, "velocity", "angle", relaxation="bh2")], 2, 1),
    ([Decision(2, "data", relaxation="scale", strength=0.5)], 1, 1),
    ([Decision(2, "data", carry=0.2)], 1, 1),
    ([Decision(1, "data"), Decision(2, "data", start=2)], 2, 0),
    ([Decision(1), Decision(2, start=2, relaxation="bh2")], 2, 0),
    # From two nodes back, with nodes on both sides of the start.
    *(([Decision(n, core, start=2)], n, n) for n in (2, 3) for core in ("data", "velocity")),
    ([Decision(2, "data", "step", corrector="pseudo")], 2, 2),  # these steps are not equal in λ
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "order", "starts"), ORDERS)
def test_order_of_convergence(pattern, order, starts):
    errors = []
    for steps in (80, 160):
        grid, states = exact(steps)
        warm = [Decision(core=pattern[0].core)] * (max(step.start for step in pattern) - 1 if len(pattern) == 1 else 0)
        decisions = over(grid, lambda i, w=warm: [*w, *pattern * 200][i], end=grid.rho[-1])
        x, run = START, Run(decisions.compile(VP))
        for call, row in enumerate(run.plan.rows):
            x0 = MIXTURE(x, torch.full((2,), row.t, dtype=torch.float64))
            x = run.advance(x, convert(x0, x, "sample", row.quantity, row.alpha, row.sigma))
            following = decisions.node_of_call(call + 1)[0] if call + 1 < decisions.nfe else steps
            if following <= starts:
                x = states[following]
        errors.append(float((x - states[-1]).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)
