"""How a teacher carries a state towards the clean end: steps of its probability flow, or of a reverse SDE.

All reverse SDEs dx = [f·x − (1 + η²)/2·g²·score] dt + η·g dw have the probability flow's marginals (η = 0). One step from
noise-to-signal ratio ρ to ρ' replaces a share η²·v of the predicted noise's variance by fresh noise,

    x' = α'·x̂0 + σ'·(√(1 − η²v)·ε̂ + η·√v·z),     ε̂ = (x − α·x̂0)/σ,     v = 1 − (ψ(ρ')/ψ(ρ))²,

and families differ in the rising function ψ alone. In terms of φ = ρ·ψ these are the first-order ER-SDE solvers (Cui et
al. 2023, arXiv 2309.06169): x'/α' = x̂0 + (φ'/φ)·(x/α − x̂0) + noise of the variance that the marginals leave.
"""

from collections.abc import Callable

import torch

from ..core.errors import UsageError, unknown
from ..core.schedule import NoiseSchedule
from ..models.denoiser import Condition, Denoiser

FAMILIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "ddim": lambda rho: rho,  # Song et al. 2020 (DDIM), equation 16; η = 1 is DDPM
    "er-sde-1.5": torch.sqrt,  # φ = ρ^1.5
    "er-sde-2.5": lambda rho: rho**1.5,  # φ = ρ^2.5
    "er-sde-5": lambda rho: torch.exp(rho**0.3) + 10.0,  # φ = ρ·(exp ρ^0.3 + 10), "ER-SDE 5" of SCott
}
"""ψ by the name of a family. Besides these there is "ctm", in which v = 1."""

NOISE_FAMILIES = (*FAMILIES, "ctm")


def noise_share(rho: torch.Tensor, rho_next: torch.Tensor, eta: float, family: str = "ddim") -> torch.Tensor:
    """The share η²·v ∈ [0, 1] of the noise's variance that a step replaces.

    Args:
        rho: noise-to-signal ratio before the step, float64; may be infinite.
        rho_next: after it, below ``rho``.
        eta: strength of the noise in [0, 1]: 0 is the probability flow. DDIM's η; γ of consistency trajectory models
            (Kim et al. 2023, arXiv 2310.02279) under "ctm".
        family: one of `NOISE_FAMILIES`.

    Raises:
        UsageError: an unknown family or a strength outside [0, 1].
    """
    check_noise(eta, family)
    if family == "ctm":
        return torch.full_like(rho_next, eta**2)
    psi = FAMILIES[family]
    return eta**2 * (1.0 - (psi(rho_next) / psi(rho)) ** 2)


def check_noise(eta: float, family: str) -> None:
    """Raises:
    UsageError: an unknown family or a strength outside [0, 1].
    """
    if family not in NOISE_FAMILIES:
        raise unknown("noise family", str(family), NOISE_FAMILIES)
    if not 0.0 <= eta <= 1.0:
        raise UsageError(f"eta, the strength of a solver's noise, must be in [0, 1], got {eta}.")


def substep(
    schedule: NoiseSchedule,
    x_t: torch.Tensor,
    x0: torch.Tensor,
    t: torch.Tensor,
    t_next: torch.Tensor,
    eta: float = 0.0,
    family: str = "ddim",
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """One step of the family from t to t_next, in native scale.

    Args:
        schedule: of the states.
        x_t: (B, …) states at t.
        x0: (B, …) the teacher's clean samples there.
        t, t_next: (B,) times, t_next the cleaner ones.
        eta, family: see `noise_share`.
        noise: (B, …) standard normal z; not needed where eta is 0.
    """
    rho, rho_next = schedule.rho(t), schedule.rho(t_next)
    share = noise_share(rho, rho_next, eta, family)
    (alpha, sigma), (alpha_next, sigma_next) = schedule.level_from_rho(rho), schedule.level_from_rho(rho_next)
    kept = sigma_next * torch.sqrt(1.0 - share) / sigma
    of_x0 = alpha_next - kept * alpha
    shape = (-1,) + (1,) * (x_t.ndim - 1)
    result = kept.to(x_t.dtype).reshape(shape) * x_t + of_x0.to(x0.dtype).reshape(shape) * x0
    if eta > 0.0:
        result = result + (sigma_next * torch.sqrt(share)).to(x_t.dtype).reshape(shape) * noise
    return result


def solve_between(
    teacher: Denoiser,
    x: torch.Tensor,
    times: torch.Tensor,
    condition: Condition | None = None,
    eta: float = 0.0,
    family: str = "ddim",
    noise: Callable[[int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Several steps, with one evaluation of the teacher each.

    Args:
        teacher: guided or not.
        x: (B, …) states at ``times[:, 0]``.
        times: (B, h + 1) falling times of each sample.
        condition: of the teacher.
        eta, family: see `noise_share`.
        noise: from a step 0 … h − 1 to standard normal noise like x; not called where eta is 0.
    """
    for step, (t, t_next) in enumerate(zip(times.unbind(1), times.unbind(1)[1:], strict=False)):
        z = noise(step) if eta > 0.0 else None
        x = substep(teacher.schedule, x, teacher(x, t, condition), t, t_next, eta, family, z)
    return x
