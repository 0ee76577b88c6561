"""Momentum on any multistep rule: heavy ball and Nesterov, against divergence under strong guidance.

Wizadwongsa et al. 2024, Diffusion Sampling with Momentum for Mitigating Divergence Artifacts (arXiv 2307.11118).
"""

from collections.abc import Callable

import numpy as np

from ..core.errors import UsageError, unknown
from .multistep import Slope

MOMENTA = ("heavy-ball", "nesterov")
_SCALES = (7.5, 15.0, 22.5)
_HEAVY_BALL = (0.9, 0.8, 0.6)  # the paper's choices at these guidance scales
_GHVB = (0.5, 0.2, 0.1)

Rule = Callable[[int], Slope | None]


def with_momentum(
    kind: str | None, beta: float, predict: Rule, correct: Rule | None = None, eta: float = 0.0
) -> tuple[Rule, Rule | None]:
    """Filter the slope p of a rule (Wizadwongsa et al. 2024, section 4.1).

        heavy ball    u_n = v_n,                   v_n = (1−β)·v_{n−1} + β·p_n
        Nesterov      u_n = (1−β)·v_n + β·p_n,     v as above

    with v_0 = p_0. β = 1 changes nothing; below that the order is 1, and the region of stability grows. With a corrector
    the filter acts on the corrected slopes.

    Args:
        kind: "heavy-ball", "nesterov" or None.
        beta: in (0, 1].
        predict, correct: a rule for `multistep.multistep_plan` that carries nothing over.
        eta: of the rule's core; momentum needs 0.

    Returns:
        (predict, correct) with momentum.

    Raises:
        UsageError: see `check_momentum`.
    """
    check_momentum(kind, beta, eta)
    if kind is None or beta == 1.0:
        return predict, correct
    carry = 1.0 - beta
    share = beta if kind == "heavy-ball" else beta * (2.0 - beta)  # of p_n in u_n

    def filtered(i: int) -> Slope:
        own = predict(i).weights
        if i == 0:
            return Slope(own)
        weights = [share * weight for weight in own]
        if kind == "nesterov":  # v_{n−1} = (u_{n−1} − β·p_{n−1})/(1−β), with p_{n−1} as corrected
            redone = correct(i) if correct else None
            before = redone.weights if redone else (0.0, *predict(i - 1).weights)
            weights += [0.0] * (len(before) - len(weights))
            for lag, weight in enumerate(before):
                weights[lag] -= carry * beta * weight
        return Slope(tuple(weights), carry)

    def corrected(i: int) -> Slope | None:
        redone = correct(i)
        if redone is None:
            return None
        if i == 1:
            return redone
        # Only the weights of p differ between prediction and correction, so the rest is taken from the prediction.
        planned, own = filtered(i - 1).weights, predict(i - 1).weights
        weights = [share * weight for weight in redone.weights]
        weights += [0.0] * (len(planned) + 1 - len(weights))
        for lag, weight in enumerate(planned):
            weights[lag + 1] += weight - share * (own[lag] if lag < len(own) else 0.0)
        return Slope(tuple(weights), carry)

    return filtered, corrected if correct else None


def check_momentum(kind: str | None, beta: float, eta: float = 0.0) -> None:
    """Refuse an unknown kind of momentum, beta outside (0, 1], or momentum that would carry over a step's noise.

    Raises:
        UsageError: naming what is allowed.
    """
    if kind is not None and kind not in MOMENTA:
        raise unknown("momentum", str(kind), MOMENTA)
    if not 0.0 < beta <= 1.0:
        raise UsageError(f"beta must lie in (0, 1] (1: no momentum); got {beta!r}.")
    if kind is not None and eta:
        raise UsageError("Momentum is for eta = 0: it would carry the noise of a step over to the next.")


def heavy_ball_beta(guidance_scale: float) -> float:
    """The paper's β of heavy ball and Nesterov for a classifier-free guidance scale, interpolated; 1 without guidance."""
    return float(np.interp(guidance_scale, (1.0, *_SCALES), (1.0, *_HEAVY_BALL)))


def ghvb_beta(guidance_scale: float) -> float:
    """The paper's β of GHVB (its "3 + β") for a classifier-free guidance scale, interpolated; 1 without guidance."""
    return float(np.interp(guidance_scale, (1.0, *_SCALES), (1.0, *_GHVB)))
