"""Conversions between what diffusion networks predict.

With x = α·x0 + σ·ε every prediction is a fixed direction in the plane spanned by (x0, ε):

    sample      x0           ( 1, 0)
    epsilon     ε            ( 0, 1)
    v           α·ε − σ·x0   (−σ, α)     Salimans & Ho 2022
    flow        ε − x0       (−1, 1)     rectified flow
    edm         F            (σ/σ_data, −σ_data·α)     Karras et al. 2022, eq. 7; `schedule.EDM`
    edm_v       −F           (−σ/σ_data, σ_data·α)     the same with the sign of v, which it is for σ_data = 1

so any of them is a linear combination of the noisy sample and any other one, found by Cramer's rule.
"""

from .errors import unknown

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")
EDM_TYPES = ("edm", "edm_v")


def _direction(kind: str, alpha, sigma):
    match kind:
        case "sample":
            return 1.0, 0.0
        case "epsilon":
            return 0.0, 1.0
        case "v_prediction":
            return -sigma, alpha
        case "flow_prediction":
            return -1.0, 1.0
        case "edm" | "edm_v":
            # A level of the EDM schedule knows its σ_data: σ² + (σ_data·α)² = 1. F is called "epsilon" by diffusers'
            # EDM schedulers and −F "v_prediction".
            noise = (1.0 - sigma * sigma) ** 0.5
            return (sigma * alpha / noise, -noise) if kind == "edm" else (-sigma * alpha / noise, noise)
    raise unknown("prediction type", str(kind), PREDICTION_TYPES + EDM_TYPES)


def coefficients(source: str, target: str, alpha, sigma):
    """Return (p, r) with ``target = p·x + r·source`` at noise level (alpha, sigma).

    Args:
        source, target: one of `PREDICTION_TYPES` or, on levels of the EDM schedule, of `EDM_TYPES`.
        alpha, sigma: floats or broadcastable tensors of the native scale, not both zero; float64 for `EDM_TYPES`.

    Raises:
        UsageError: unknown prediction type.
        ZeroDivisionError: (floats) the source does not determine the target, e.g. ε at α = 0 leaves x0 open.
    """
    source_x0, source_eps = _direction(source, alpha, sigma)
    target_x0, target_eps = _direction(target, alpha, sigma)
    if source == target:
        return 0.0, 1.0
    determinant = alpha * source_eps - sigma * source_x0
    p = (target_x0 * source_eps - target_eps * source_x0) / determinant
    r = (alpha * target_eps - sigma * target_x0) / determinant
    return p, r


def convert(prediction, x, source: str, target: str, alpha, sigma):
    """Convert a prediction at the noisy sample ``x`` (same shape) from one parametrisation to another."""
    p, r = coefficients(source, target, alpha, sigma)
    return r * prediction if isinstance(p, float) and p == 0.0 else p * x + r * prediction
