"""f-divergences between teacher p and student q, as weights of the score difference.

For D_f(p_t‖q_t) = E_q[f(r)] with r = p_t/q_t, the gradient of a student is the score difference of DMD weighted by
h(r) = f''(r)·r² (Xu et al. 2025, f-distill, theorem 1). Reverse KL has h = 1: plain distribution matching.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..core.errors import unknown


@dataclass(frozen=True)
class Divergence:
    """Attributes:
    name: as typed on the command line.
    h: the weight h(r) of a tensor of density ratios r > 0.
    f: the generator, f(1) = 0.
    character: what it favours.
    """

    name: str
    h: Callable[[torch.Tensor], torch.Tensor]
    f: Callable[[torch.Tensor], torch.Tensor]
    character: str


DIVERGENCES = {
    entry.name: entry
    for entry in (
        Divergence("reverse-kl", torch.ones_like, lambda r: -torch.log(r), "mode seeking; the DMD objective"),
        Divergence(
            "softened-rkl",
            lambda r: 1.0 / (1.0 + r),
            lambda r: (r + 1.0) * torch.log(0.5 + 0.5 / r),
            "mode seeking, bounded weight",
        ),
        Divergence(
            "js",
            lambda r: r / (1.0 + r),
            lambda r: r * torch.log(r) - (r + 1.0) * torch.log(0.5 * (r + 1.0)),
            "balanced, bounded weight",
        ),
        Divergence(
            "squared-hellinger", lambda r: 0.25 * torch.sqrt(r), lambda r: 1.0 - torch.sqrt(r), "balanced, low variance"
        ),
        Divergence("forward-kl", lambda r: r, lambda r: r * torch.log(r), "mode covering, high variance"),
        Divergence("jeffreys", lambda r: 1.0 + r, lambda r: (r - 1.0) * torch.log(r), "symmetric KL, high variance"),
        Divergence("neyman", lambda r: 2.0 / r, lambda r: 1.0 / r - 1.0, "strongly mode seeking"),
        Divergence("pearson", lambda r: 2.0 * r**2, lambda r: (r - 1.0) ** 2, "strongly mode covering"),
    )
}


def get_divergence(name: str) -> Divergence:
    """Look a divergence up.

    Raises:
        UsageError: unknown name.
    """
    if name not in DIVERGENCES:
        raise unknown("divergence", name, DIVERGENCES)
    return DIVERGENCES[name]
