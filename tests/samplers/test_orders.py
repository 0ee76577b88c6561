"""Every rule converges with its theoretical order on an exact teacher, whatever the network predicts."""

import functools
import itertools
import math

import pytest
import torch
from analytic import grid_of

from diffaccel.core.prediction import convert
from diffaccel.core.schedule import Flow, VPLinear
from diffaccel.samplers.adams import ghvb_plan, ipndm_plan
from diffaccel.samplers.ddim import ddim_plan
from diffaccel.samplers.deis import deis_plan
from diffaccel.samplers.log_snr import dpm_solver_plan, unipc_plan
from diffaccel.samplers.multistep import VARIABLES
from diffaccel.samplers.plan import Run
from diffaccel.samplers.runge_kutta import TABLEAUX, runge_kutta_plan
from diffaccel.samplers.scheduler import FlowAdamsScheduler
from diffaccel.testing import GaussianMixtureTeacher, reference_solution

VP, FLOW = VPLinear(), Flow()
START = torch.tensor([[0.5, -0.3], [1.2, 0.4]], dtype=torch.float64)
SMOOTH, UNIFORM = "smooth", "uniform"  # grids: uniform in t, or uniform in ρ (σ for flows)

# name, plan, order, steps that get exact states (multistep rules start at order 1), grid
VP_RULES = [
    ("ddim", ddim_plan, 1, 0, SMOOTH),
    *(
        (f"deis {core} {variable} {k}", lambda g, k=k, v=variable, c=core: deis_plan(g, k, v, core=c), k + 1, k, SMOOTH)
        for core in ("noise", "data")
        for variable in VARIABLES
        for k in (1, 2, 3)
    ),
    *(
        (
            f"flow-adams {k}",
            lambda g, k=k: deis_plan(g, k, "angle", core="velocity", corrector=True),
            k + 2,
            k + 1,
            SMOOTH,
        )
        for k in (0, 1, 2)
    ),
    ("FlowAdamsScheduler", lambda g: FlowAdamsScheduler().plan(g), 2, 2, SMOOTH),
    *(
        (f"velocity {k}", lambda g, k=k: deis_plan(g, k, "angle", core="velocity"), k + 1, k, SMOOTH)
        for k in (0, 1, 2, 3)
    ),
    *((f"ipndm {r} uniform", lambda g, r=r: ipndm_plan(g, r), r, r - 1, UNIFORM) for r in (2, 3, 4)),
    *((f"ipndm {r}", lambda g, r=r: ipndm_plan(g, r), 2, r - 1, SMOOTH) for r in (2, 3, 4)),
    *((f"ghvb {n} uniform", lambda g, n=n: ghvb_plan(g, n), math.ceil(n), 8, UNIFORM) for n in (0.8, 1.8, 2.5, 3.8)),
    *((f"ghvb {n}", lambda g, n=n: ghvb_plan(g, n), 2, 8, SMOOTH) for n in (1.8, 2.5, 3.8)),
    *(
        (f"ghvb {n} variable-step {v}", lambda g, n=n, v=v: ghvb_plan(g, n, variable=v), math.ceil(n), 8, SMOOTH)
        for n in (0.8, 1.8, 2.5, 3.4)
        for v in ("rho", "t")
    ),
    *(
        (f"{kind} on {name}", lambda g, k=kind, p=plan: p(g, momentum=k, beta=0.8), 1, 4, SMOOTH)
        for kind in ("heavy-ball", "nesterov")
        for name, plan in (("ipndm", ipndm_plan), ("deis", deis_plan), ("dpm", dpm_solver_plan), ("unipc", unipc_plan))
    ),
    *((name, lambda g, n=name: runge_kutta_plan(g, n), table.order, 0, SMOOTH) for name, table in TABLEAUX.items()),
    *(
        (f"dpm-solver {core} {r}", lambda g, c=core, r=r: dpm_solver_plan(g, r, False, c), r, r - 1, SMOOTH)
        for core in ("data", "noise")
        for r in (1, 2, 3)
    ),
    *(
        (f"unip {r} {b}", lambda g, r=r, b=b: unipc_plan(g, r, b, False, False), r, r - 1, SMOOTH)
        for r in (1, 2, 3)
        for b in ("bh1", "bh2")
    ),
    *(
        (f"unipc {c} {r} {b}", lambda g, c=c, r=r, b=b: unipc_plan(g, r, b, False, core=c), r + 1, r, SMOOTH)
        for c in ("data", "noise")
        for r in (1, 2, 3)
        for b in ("bh1", "bh2")
    ),
]
FLOW_RULES = [
    ("euler", ddim_plan, 1, 0, UNIFORM),
    *((f"flow AB {k}", lambda g, k=k: deis_plan(g, k, "t", core="velocity"), k + 1, k, SMOOTH) for k in (1, 2, 3)),
    *((f"deis noise {k}", lambda g, k=k: deis_plan(g, k, "t", core="noise"), k + 1, k, SMOOTH) for k in (1, 2, 3)),
    *((f"ipndm {r}", lambda g, r=r: ipndm_plan(g, r), r, r - 1, UNIFORM) for r in (2, 3, 4)),
    ("ghvb 2.5 variable-step", lambda g: ghvb_plan(g, 2.5, variable="t"), 3, 8, SMOOTH),
    *((name, lambda g, n=name: runge_kutta_plan(g, n), TABLEAUX[name].order, 0, SMOOTH) for name in ("2heun", "4rk")),
    ("unipc 2", lambda g: unipc_plan(g, 2, lower_order_final=False), 3, 2, SMOOTH),
]


@functools.cache
def teacher_on(schedule):
    return GaussianMixtureTeacher([0.4, 0.6], [[-1, 0.5], [1, 0]], [[0.4, 0.5], [0.6, 0.3]], schedule)


@functools.cache
def exact_states(schedule, nodes, steps):
    """The exact trajectory at every node: (N+1, B, 2), and its grid."""
    grid, states = grid_of(schedule, nodes(steps)), [START]
    for rho, following in itertools.pairwise(grid.rho):
        states.append(reference_solution(teacher_on(schedule), states[-1], rho, following, 4 if steps > 100 else 40))
    return grid, states


def measured_order(plan, schedule, nodes, starts, kinds):
    """log2 of the ratio of the errors at N and 2N steps, by prediction type; the first ``starts`` steps are exact."""
    errors = []
    steps = 160 if plan(grid_of(schedule, nodes(2))).order == 1 else 20  # Runge–Kutta is soon as exact as the reference
    for count in (steps, 2 * steps):
        grid, states = exact_states(schedule, nodes, count)
        run, x = Run(plan(grid)), START.repeat(len(kinds), 1)
        for call, row in enumerate(run.plan.rows):
            x0 = teacher_on(schedule)(x, torch.full((len(x),), row.t, dtype=torch.float64))
            output = torch.cat(
                [_through(kind, x0, x, row) for kind, x0, x in zip(kinds, x0.split(2), x.split(2), strict=True)]
            )
            x = run.advance(x, output)
            if call < starts:
                x = states[call + 1].repeat(len(kinds), 1)
        errors.append([float(error.norm()) for error in (x - states[-1].repeat(len(kinds), 1)).split(2)])
    return [math.log2(coarse / fine) for coarse, fine in zip(*errors, strict=True)]


def _through(kind, x0, x, row):
    """What the plan stores where the network predicts ``kind``."""
    predicted = convert(x0, x, "sample", kind, row.alpha, row.sigma)
    return convert(predicted, x, kind, row.quantity, row.alpha, row.sigma)


def vp_nodes(steps):
    return torch.linspace(0.8, 0.3, steps + 1, dtype=torch.float64)


def vp_uniform_nodes(steps):
    return VP.t_from_rho(torch.linspace(3.0, 0.5, steps + 1, dtype=torch.float64))


def flow_nodes(steps):
    return 1000 * torch.linspace(0.9, 0.3, steps + 1, dtype=torch.float64) ** 1.5


def flow_uniform_nodes(steps):
    return 1000 * torch.linspace(0.9, 0.3, steps + 1, dtype=torch.float64)


@pytest.mark.parametrize(("plan", "order", "starts", "grid"), [r[1:] for r in VP_RULES], ids=[r[0] for r in VP_RULES])
def test_order_on_vp(plan, order, starts, grid):
    nodes = vp_nodes if grid == SMOOTH else vp_uniform_nodes
    kinds = ("epsilon", "sample", "v_prediction")
    measured = measured_order(plan, VP, nodes, starts, kinds)
    assert measured == pytest.approx([order] * 3, abs=0.15)


@pytest.mark.parametrize(
    ("plan", "order", "starts", "grid"), [r[1:] for r in FLOW_RULES], ids=[r[0] for r in FLOW_RULES]
)
def test_order_on_a_flow(plan, order, starts, grid):
    nodes = flow_nodes if grid == SMOOTH else flow_uniform_nodes
    measured = measured_order(plan, FLOW, nodes, starts, ("flow_prediction",))
    assert measured == pytest.approx([order], abs=0.15)
