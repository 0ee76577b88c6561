"""End points of every rule on the 2-D mixture, from an independent float64 implementation."""

import pytest
import torch
from analytic import two_modes

from diffaccel.core.grids import make_grid
from diffaccel.core.schedule import VE, VPLinear
from diffaccel.samplers.adams import ghvb_plan, ipndm_plan
from diffaccel.samplers.ddim import ddim_plan
from diffaccel.samplers.deis import deis_plan
from diffaccel.samplers.log_snr import dpm_solver_plan, unipc_plan
from diffaccel.samplers.runge_kutta import runge_kutta_plan
from diffaccel.samplers.sample import sample
from diffaccel.testing import reference_solution

# rule, plan, end point (A) VE σ 80 → 0.002 on the Karras grid from (40, −24), (B) VP-linear, quadratic, from (0.5, −0.3)
GOLDEN = [
    ("ddim", ddim_plan, (0.8915468334, 0.0010226734), (0.9331292354, -0.0052534043)),
    *(
        (f"deis {variable} {order}", lambda grid, o=order, v=variable: deis_plan(grid, o, v), a, b)
        for variable, order, a, b in (
            ("t", 1, (0.9370884937, -0.0090453235), (0.9838439167, -0.0111941196)),  # for VE, t is ρ
            ("t", 2, (0.9480920527, -0.0113656272), (0.9937888328, -0.0121878664)),
            ("t", 3, (0.9516103428, -0.0120935907), (0.9921491389, -0.0126068756)),
            ("rho", 1, (0.9370884937, -0.0090453235), (0.9640199692, -0.0093704573)),
            ("rho", 2, (0.9480920527, -0.0113656272), (0.9664135567, -0.0094561974)),
            ("rho", 3, (0.9516103428, -0.0120935907), (0.9658196505, -0.0093030200)),
            ("log-rho", 1, (1.0589042398, -0.0345987492), (0.9897897992, -0.0119284616)),
            ("log-rho", 2, (1.1499746465, -0.0476889568), (0.9692655614, -0.0141132500)),
            ("log-rho", 3, (1.1828988985, -0.0446363650), (0.9880540198, -0.0447167823)),
        )
    ),
    *(
        (f"ipndm {order}", lambda grid, o=order: ipndm_plan(grid, o), a, b)
        for order, a, b in (
            (2, (1.0795806910, -0.0383792878), (1.0015525847, -0.0133261361)),
            (3, (1.1739108938, -0.0509649048), (1.0047385858, -0.0190198689)),
            (4, (1.2166763469, -0.0505242111), (1.0056050319, -0.0395382178)),
        )
    ),
    *(
        (f"ghvb {number}", lambda grid, n=number: ghvb_plan(grid, n), a, b)
        for number, a, b in (
            (1.8, (1.0519756928, -0.0336057836), (1.0005000619, -0.0133454610)),
            (2.5, (1.1364944039, -0.0474219631), (1.0076075929, -0.0147377269)),
            (2.8, (1.1610426301, -0.0501225156), (1.0056869674, -0.0166444140)),
            (3.5, (1.2011010295, -0.0522194096), (0.9977295277, -0.0259838025)),
            (3.9, (1.2145406128, -0.0510940052), (1.0029854511, -0.0362362592)),
        )
    ),
    *(
        (kind, lambda grid, k=kind: ipndm_plan(grid, 4, momentum=k, beta=0.8), a, b)
        for kind, a, b in (
            ("heavy-ball", (1.1275365751, -0.0423026551), (0.9669052822, -0.0159863111)),
            ("nesterov", (1.2009851482, -0.0495544461), (0.9971025105, -0.0335959156)),
        )
    ),
    *(
        (tableau, lambda grid, name=tableau: runge_kutta_plan(grid, name), a, b)
        for tableau, a, b in (
            ("1euler", (0.8915468334, 0.0010226734), (0.9331292354, -0.0052534043)),
            ("2heun", (1.4186201130, -0.1174253134), (1.0968476739, -0.0349195032)),
            ("3kutta", (0.9459092453, -0.0113617380), (0.9993655379, -0.0178276554)),
            ("3ral", (0.9876455762, -0.0145104108), (0.9929171847, -0.0167964163)),
            ("3heun", (1.0017874225, -0.0166115922), (0.9957438299, -0.0172753126)),
            ("3vdh", (0.9812164810, -0.0134024566), (0.9923765582, -0.0165751382)),
            ("3ssprk", (0.9261591712, -0.0044140411), (0.9846120419, -0.0147627696)),
            ("4rk", (1.0334832851, -0.0263372849), (1.0125243430, -0.0194975301)),
        )
    ),
    ("dpm-solver++ 2M", dpm_solver_plan, (1.2004785388, -0.0657426433), (1.0477865723, -0.0184543613)),
    ("unipc 2", unipc_plan, (1.2165412081, -0.0684471388), (1.0598926626, -0.0180703931)),
]
CASES = {
    "VE": (VE(), "karras", (40.0, -24.0), (1.0015198481, -0.0182272629)),
    "VP": (VPLinear(), "quadratic", (0.5, -0.3), (1.0018678472, -0.0182130850)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("plan", "on_ve", "on_vp"), [row[1:] for row in GOLDEN], ids=[row[0] for row in GOLDEN])
def test_end_point(case, plan, on_ve, on_vp):
    schedule, kind, start, _ = CASES[case]
    grid = make_grid(schedule, 6, kind, end="sigma_min")
    end = sample(two_modes(schedule), torch.tensor([start], dtype=torch.float64), plan(grid))
    assert end[0].tolist() == pytest.approx(on_ve if case == "VE" else on_vp, abs=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_exact_end_point(case):
    schedule, kind, start, exact = CASES[case]
    grid = make_grid(schedule, 6, kind, end="sigma_min")
    x = torch.tensor([start], dtype=torch.float64)
    found = reference_solution(two_modes(schedule), x, grid.rho[0], grid.rho[-1])
    assert found[0].tolist() == pytest.approx(exact, abs=1e-7)
