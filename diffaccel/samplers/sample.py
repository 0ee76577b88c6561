"""Sampling without diffusers: run a plan with any denoiser."""

from collections.abc import Callable, Mapping

import torch

from ..core.errors import UsageError
from ..core.prediction import convert
from .plan import Plan, Run


def sample(
    denoiser: Callable[..., torch.Tensor],
    x: torch.Tensor,
    plan: Plan,
    condition: Mapping[str, torch.Tensor] | None = None,
    noise: Callable[[int, torch.Size], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Carry x from the plan's first noise level to its end.

    Args:
        denoiser: ``(x_t, t, condition) -> x0`` with t of shape (B,), float64.
        x: (B, …) state at the first row's level, native scale; its dtype is kept.
        plan: what to do.
        condition: passed on to the denoiser.
        noise: ``(row index, shape) -> standard normal tensor``, for plans that add noise.

    Returns:
        (B, …) in the dtype of x.

    Raises:
        UsageError: the plan adds noise and ``noise`` was not given.
    """
    if noise is None and any(row.noise for row in plan.rows):
        raise UsageError(f"Plan {plan.name!r} adds noise: pass noise=lambda index, shape: torch.randn(shape).")
    run = Run(plan)
    for index, row in enumerate(plan.rows):
        t = torch.full((len(x),), row.t, dtype=torch.float64, device=x.device)
        x0 = denoiser(x, t, condition).to(x.dtype)
        output = convert(x0, x, "sample", row.quantity, row.alpha, row.sigma)
        z = noise(index, x.shape).to(x) if row.noise else None
        x = run.advance(x, output, z)
    return x
