"""Solver schedules as sequences of numbers, for predictors."""

import math

import torch
from torch import Tensor

from ..core.prediction import convert
from ..core.schedule import NoiseSchedule
from ..samplers.plan import Plan, Run
from ..samplers.usf import SolverSchedule

_SHOWN = 4  # coefficients of a row
_WIDTHS = torch.logspace(math.log10(0.03), math.log10(4.0), 6, dtype=torch.float64)  # of data, in its own unit
_CLOSE = 0.1  # relative errors far below this count as they are, far above by their logarithm


def tokens(schedule: SolverSchedule, noise: NoiseSchedule) -> Tensor:
    """(calls, F) float64: for every network call its level, the coefficients of the step after it, and where that leads.

    Coefficients say how much a decision changes, which its name does not: where two rules hardly differ, so do these. Where
    they lead is exact for Gaussian data, whose network and probability flow are known, and needs no network call.
    """
    plan, grid = schedule.compile(noise), schedule.grid(noise)
    levels = [(row.alpha, row.sigma) for row in plan.rows] + [(grid.alpha[-1], grid.sigma[-1])]
    angles = [math.atan2(sigma, alpha) for alpha, sigma in levels]
    rows = []
    for index, row in enumerate(plan.rows):
        step = angles[index] - angles[index + 1] + 1e-6  # 0 between the two calls of an implicit corrector
        outputs, states = ([*part, *(0.0,) * _SHOWN][:_SHOWN] for part in (row.outputs, row.states))
        log_rho = math.log(row.sigma / max(row.alpha, 1e-4))
        scaled = [math.asinh(weight) for weight in (*(weight / step for weight in outputs), *states[:-1])]
        rows.append([log_rho / 3.0, angles[index], step, math.log(step + 1e-3), *scaled])
    errors = gaussian_errors(plan, levels[1:], noise)
    return torch.cat([torch.tensor(rows, dtype=torch.float64), torch.asinh(errors / _CLOSE)], dim=1)


def gaussian_errors(plan: Plan, levels: list[tuple[float, float]], noise: NoiseSchedule) -> Tensor:
    """Relative error of the state after every call, were the data normal with mean 0 and one of several widths.

    Data N(0, w²) gives x0 = α·w²·x / (α²·w² + σ²), and the probability flow scales states like √(α²·w² + σ²).

    Args:
        plan: deterministic.
        levels: (α, σ) after each call.
        noise: of the model; the plan starts from its initial noise.

    Returns:
        (calls, widths) float64, finite.
    """
    start = torch.full_like(_WIDTHS, noise.initial_scale)
    top = noise.level(torch.tensor(noise.t_max, dtype=torch.float64))
    of_start = start / _deviation(*top)
    run, x, errors = Run(plan), plan.initial * start, []
    for row, level in zip(plan.rows, levels, strict=True):
        x0 = row.alpha * _WIDTHS.square() * x / _deviation(row.alpha, row.sigma).square()
        x = run.advance(x, convert(x0, x, "sample", row.quantity, row.alpha, row.sigma))
        errors.append(x / (_deviation(*level) * of_start) - 1.0)
    return torch.stack(errors).nan_to_num(0.0, 1e30, -1e30)


def _deviation(alpha, sigma) -> Tensor:
    return ((alpha * _WIDTHS).square() + sigma**2).sqrt()
