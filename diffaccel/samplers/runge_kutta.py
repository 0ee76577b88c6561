"""ρRK-DEIS: explicit Runge–Kutta in ρ (Zhang & Chen 2023, arXiv 2204.13902, eq. 17); in σ on flows."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..core.errors import unknown
from ..core.grids import Grid
from .forms import Form, weighted
from .multistep import quantity, resolve_core, stored_as
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


def runge_kutta_plan(levels: Grid, tableau: str = "3kutta") -> Plan:
    """The plan of an explicit Runge–Kutta method on d(x/α) = ε dρ, or on dx = v dσ for flows.

    Every stage is evaluated at its own time, found by the exact inverse of ρ(t). A step to σ = 0 is first order, since
    some stages would have to be evaluated there: N steps of s stages cost s·N calls, or s·(N−1) + 1 with such an end.

    Args:
        levels: the grid to step on.
        tableau: a name in `TABLEAUX`.

    Raises:
        UsageError: an unknown tableau.
    """
    if tableau not in TABLEAUX:
        raise unknown("tableau", str(tableau), TABLEAUX)
    table, schedule, core = TABLEAUX[tableau], levels.schedule, resolve_core(None, levels)
    flow = core == "velocity"
    rows: list[Row] = []
    slopes: list[Form] = []
    for i in range(levels.steps):
        start, stop = levels.sigma[i : i + 2] if flow else levels.rho[i : i + 2]
        single = stop == 0.0
        first, length = len(rows), stop - start
        for stage in range(1 if single else len(table.nodes)):
            if stage == 0:
                t, alpha, sigma = levels.times[i], levels.alpha[i], levels.sigma[i]
            else:
                t, alpha, sigma = _level(schedule, flow, start + table.nodes[stage] * length)
            index = first + stage
            slopes.append(quantity(core, alpha, sigma, index))
            last = single or stage == len(table.nodes) - 1
            weights = (1.0,) if single else table.weights if last else table.stages[stage + 1]
            if last:
                next_alpha = levels.alpha[i + 1]
            else:
                next_alpha = _level(schedule, flow, start + table.nodes[stage + 1] * length)[1]
            scale = 1.0 if flow else next_alpha
            base = Form.state(first) * (1.0 if flow else 1.0 / levels.alpha[i])
            change = weighted(weights, slopes[first : first + len(weights)])
            states, outputs = (scale * (base + length * change)).coefficients(index)
            rows.append(Row(t, alpha, sigma, stored_as(core, alpha), states, outputs))
    return Plan(tuple(rows), order=len(table.nodes), name=f"rho-rk({tableau})")


def _level(schedule, flow: bool, place: float) -> tuple[float, float, float]:
    """(t, α, σ) at this σ of a flow, or at this ρ."""
    rho = torch.tensor(place / (1.0 - place) if flow else place, dtype=torch.float64)
    alpha, sigma = schedule.level_from_rho(rho)
    return float(schedule.t_from_rho(rho)), float(alpha), float(sigma)
