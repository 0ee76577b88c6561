"""ρRK-DEIS: explicit Runge–Kutta in ρ (Zhang & Chen 2023, arXiv 2204.13902, eq. 17); in σ on flows."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..core.errors import unknown
from ..core.grids import Grid
from ..core.schedule import NoiseSchedule
from .forms import Form, weighted
from .multistep import FAR, quantity, resolve_core, stored_as
from .plan import Plan, Row


@dataclass(frozen=True)
class Tableau:
    """An explicit Butcher tableau.

    Attributes:
        name: as in the official implementation of DEIS.
        title: its usual name.
        order: order of convergence.
        nodes: c, one per stage, the first 0.
        stages: rows of a, the first empty.
        weights: b.
    """

    name: str
    title: str
    order: int
    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


TABLEAUX: Mapping[str, Tableau] = {
    tableau.name: tableau
    for tableau in (
        Tableau("1euler", "Euler", 1, (0.0,), ((),), (1.0,)),
        Tableau("2heun", "Heun", 2, (0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2)),
        Tableau("3kutta", "Kutta", 3, (0.0, 1 / 2, 1.0), ((), (1 / 2,), (-1.0, 2.0)), (1 / 6, 4 / 6, 1 / 6)),
        Tableau("3ral", "Ralston", 3, (0.0, 1 / 2, 3 / 4), ((), (1 / 2,), (0.0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9)),
        Tableau("3heun", "Heun, third order", 3, (0.0, 1 / 3, 2 / 3), ((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
        Tableau("3vdh", "van der Houwen", 3, (0.0, 8 / 15, 2 / 3), ((), (8 / 15,), (1 / 4, 5 / 12)), (1 / 4, 0.0, 3 / 4)),
        Tableau("3ssprk", "strong stability preserving", 3, (0.0, 1.0, 1 / 2), ((), (1.0,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 2 / 3)),
        Tableau("4rk", "classical", 4, (0.0, 1 / 2, 1 / 2, 1.0), ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    )
}  # fmt: skip


def runge_kutta_plan(grid: Grid, tableau: str = "3kutta") -> Plan:
    """The plan of an explicit Runge–Kutta method on d(x/α) = ε dρ, or on dx = v dσ for flows.

    Every stage is evaluated at its own time, found by the exact inverse of ρ(t). A step to σ = 0 is first order, since
    some stages would have to be evaluated there: N steps of s stages cost s·N calls, or s·(N−1) + 1 with such an end.
    Steps from ρ > 200 are taken in s = ρ/(1+ρ), which is what flows use throughout (σ there).

    Args:
        grid: the grid to step on.
        tableau: a name in `TABLEAUX`.

    Raises:
        UsageError: an unknown tableau.
    """
    if tableau not in TABLEAUX:
        raise unknown("tableau", str(tableau), TABLEAUX)
    table, rows = TABLEAUX[tableau], []
    slopes: list[Form] = []
    for i in range(grid.steps):
        core = "velocity" if grid.rho[i] > FAR else resolve_core(None, grid)
        start, stop = (_place(core, rho) for rho in grid.rho[i : i + 2])
        stages = 1 if stop == 0.0 else len(table.nodes)
        inner = [_level(grid.schedule, core, start + node * (stop - start)) for node in table.nodes[1:stages]]
        ends = [(grid.times[j], grid.alpha[j], grid.sigma[j]) for j in (i, i + 1)]
        nodes = [ends[0], *inner, ends[1]]
        combinations = [*table.stages[1:stages], table.weights if stages > 1 else (1.0,)]
        first = len(rows)
        base = Form.state(first) / _scale(core, nodes[0])
        for stage, weights in enumerate(combinations):
            (t, alpha, sigma), following = nodes[stage : stage + 2]
            slopes.append(quantity(core, alpha, sigma, first + stage))
            change = (stop - start) * weighted(weights, slopes[first : first + len(weights)])
            states, outputs = (_scale(core, following) * (base + change)).coefficients(first + stage)
            rows.append(Row(t, alpha, sigma, stored_as(core, alpha), states, outputs))
    return Plan(tuple(rows), order=len(table.nodes), name=f"rho-rk({tableau})")


def _place(core: str, rho: float) -> float:
    """The variable that a core integrates over: ρ, or s = σ/(α+σ)."""
    return rho if core == "noise" else 1.0 - 1.0 / (1.0 + rho)


def _scale(core: str, level: tuple[float, float, float]) -> float:
    """What x is divided by to become the integrated state."""
    _, alpha, sigma = level
    return alpha if core == "noise" else alpha + sigma


def _level(schedule: NoiseSchedule, core: str, place: float) -> tuple[float, float, float]:
    """(t, α, σ) at a value of the core's variable."""
    rho = torch.tensor(place if core == "noise" else place / (1.0 - place), dtype=torch.float64)
    alpha, sigma = schedule.level_from_rho(rho)
    return float(schedule.t_from_rho(rho)), float(alpha), float(sigma)
