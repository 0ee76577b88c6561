"""Sentences for settings of methods that cannot be."""

import math
from collections.abc import Sequence

from ..core.errors import UsageError, unknown
from ..core.prediction import PREDICTION_TYPES

_GROUPS = 8  # of the group normalisation of the U-Nets here


def check_at_least(low: float, **settings: float) -> None:
    """Refuse method settings below ``low`` or not finite.

    Raises:
        UsageError: naming the first.
    """
    for name, value in settings.items():
        if not low <= value < math.inf:
            raise UsageError(f"method.{name} must be at least {low:g}, got {value:g}.")


def check_shares(**settings: float) -> None:
    """Refuse method settings that are no share from 0 to below 1.

    Raises:
        UsageError: naming the first.
    """
    for name, value in settings.items():
        if not 0.0 <= value < 1.0:
            raise UsageError(f"method.{name} is a share from 0 to below 1, got {value:g}.")


def check_unet(channels: Sequence[int], prediction_type: str = "epsilon") -> None:
    """Refuse widths that group normalisation cannot divide, and unknown prediction types.

    Raises:
        UsageError: naming the setting.
    """
    if not channels or any(width < _GROUPS or width % _GROUPS for width in channels):
        raise UsageError(f"method.channels are multiples of {_GROUPS}, one a resolution; got {list(channels)}.")
    if prediction_type not in PREDICTION_TYPES:
        raise unknown("method.prediction_type", prediction_type, PREDICTION_TYPES)
