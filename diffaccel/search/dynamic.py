"""Times by dynamic programming over the teacher's own trajectory (Chen et al. 2024, GITS, arXiv 2405.11326)."""

import math

import torch

from ..core.grids import make_grid
from ..core.prediction import convert
from ..samplers.deis import deis_plan
from .subjects import Subject


def trajectory_times(
    subject: Subject, calls: int, seed: int, count: int = 64, nodes: int = 60, later: float = 1.15
) -> tuple[float, ...]:
    """(calls,) times whose steps of the first order add up to the smallest error along the fine trajectory.

    The cost of a step is the root mean square distance of DDIM's step from the trajectory's own state to the
    trajectory's state at its end; that of beginning below the noisiest level, the distance between initial noise and
    trajectory there. The path with the smallest total is found exactly.

    Args:
        subject: the model.
        calls: network calls.
        seed, count: noise of the samples that the costs are averaged over.
        nodes: times to choose from; as many network calls are spent on every sample.
        later: factor on the cost of later steps for each step taken (the paper's γ).
    """
    nodes = max(nodes, calls)
    plan = deis_plan(make_grid(subject.schedule, nodes, "fast"), 2)
    states: list[list[torch.Tensor]] = [[] for _ in plan.rows]
    directions: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in plan.rows]
    where = {row.t: index for index, row in enumerate(plan.rows)}

    def watch(row, x, output):
        index, x, output = where[row.t], x.cpu(), output.cpu()
        states[index].append(x)
        level = (row.alpha, row.sigma)
        directions[index].append(
            tuple(convert(output, x, row.quantity, kind, *level) for kind in ("sample", "epsilon"))
        )

    final = subject.draw(subject.file(plan), seed, count, watch)
    path = [torch.cat(parts) for parts in states] + [final]
    x0, eps = ([torch.cat([pair[part] for pair in pairs]) for pairs in directions] for part in (0, 1))
    end_alpha, end_sigma = (float(value) for value in subject.schedule.end_from_rho(0.0))
    levels = [(row.alpha, row.sigma) for row in plan.rows] + [(end_alpha, end_sigma)]

    def cost(start: int, stop: int) -> float:
        alpha, sigma = levels[stop]
        return float((alpha * x0[start] + sigma * eps[start] - path[stop]).double().square().mean().sqrt())

    costs = [[cost(i, j) if j > i else math.inf for j in range(nodes + 1)] for i in range(nodes)]
    begin = [float((path[0] - state).double().square().mean().sqrt()) for state in path[:nodes]]
    return tuple(plan.rows[node].t for node in cheapest_path(begin, costs, calls, later))


def cheapest_path(begin: list[float], costs: list[list[float]], calls: int, later: float = 1.0) -> list[int]:
    """The nodes i_1 < … < i_calls with the smallest begin[i_1] + Σ_k later^k·costs[i_k][i_(k+1)], the last step to the end.

    Args:
        begin: (n,) cost of beginning at a node.
        costs: (n, n + 1) cost of a step between two nodes; n is the end. Infinite where there is none.
        calls: at most n.
        later: factor for every step already taken.
    """
    count = len(begin)
    ahead = [row[count] for row in costs]  # cheapest cost from a node to the end with the steps left
    choices: list[list[int]] = []
    for _ in range(calls - 1):
        totals = [[costs[i][j] + later * ahead[j] for j in range(count)] for i in range(count)]
        choices.append([min(range(count), key=row.__getitem__) for row in totals])
        ahead = [min(row) for row in totals]
    node = min(range(count), key=lambda i: begin[i] + ahead[i])
    path = [node]
    for choice in reversed(choices):
        node = choice[node]
        path.append(node)
    return path
