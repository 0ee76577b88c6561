"""The probability-flow ODE solved finely enough to call it exact."""

import itertools
import math

import torch

from ..models.denoiser import Condition, Denoiser


def reference_solution(
    denoiser: Denoiser,
    x: torch.Tensor,
    start_rho: float,
    stop_rho: float = 0.0,
    steps: int = 1000,
    condition: Condition | None = None,
) -> torch.Tensor:
    """Integrate from noise-to-signal ratio ``start_rho`` (may be infinite) to ``stop_rho`` (may be 0).

    With φ = arctan ρ and u = x/r, r² = α² + σ², the equation du/dφ = cosφ·ε − sinφ·x0 is regular at both ends
    (the angle of Salimans & Ho 2022); it is solved by classical Runge–Kutta, uniformly in log tan(φ/2) where both ends
    are finite and in φ otherwise.

    Args:
        x: (B, …) native state; use float64.
        steps: Runge–Kutta steps, four evaluations each.

    Returns:
        (B, …) native state at ``stop_rho``.
    """
    schedule = denoiser.schedule
    angles = _angles(start_rho, stop_rho, steps)

    def norm(phi):
        alpha, sigma = schedule.level_from_rho(_rho(phi))
        return math.hypot(float(alpha), float(sigma))

    def velocity(phi, u):
        cos, sin = math.cos(phi), math.sin(phi)
        t = schedule.t_from_rho(_rho(phi)).expand(len(u))
        x0 = denoiser(norm(phi) * u, t, condition)
        eps = (u - cos * x0) / sin if sin > 0.0 else torch.zeros_like(u)
        return cos * eps - sin * x0

    u = x / norm(angles[0])
    for phi, following in itertools.pairwise(angles):
        h = following - phi
        k1 = velocity(phi, u)
        k2 = velocity(phi + h / 2, u + h / 2 * k1)
        k3 = velocity(phi + h / 2, u + h / 2 * k2)
        k4 = velocity(following, u + h * k3)
        u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return norm(angles[-1]) * u


def _rho(phi: float) -> torch.Tensor:
    return torch.tensor(math.inf if phi >= math.pi / 2 else math.tan(phi), dtype=torch.float64)


def _angles(start_rho: float, stop_rho: float, steps: int) -> list[float]:
    first, last = math.atan(start_rho), math.atan(stop_rho)
    if math.isinf(start_rho) or stop_rho == 0.0:
        return torch.linspace(first, last, steps + 1, dtype=torch.float64).tolist()
    ends = math.log(math.tan(first / 2)), math.log(math.tan(last / 2))
    return (2 * torch.linspace(*ends, steps + 1, dtype=torch.float64).exp().atan()).tolist()
