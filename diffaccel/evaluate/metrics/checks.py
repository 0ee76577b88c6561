"""What every metric asks of features before it computes."""

import torch

from ...core.errors import DataError, NumericalError


def checked(features: torch.Tensor, least: int = 2, what: str = "features") -> torch.Tensor:
    """Features (N, d) as float64: on their CUDA device if they are on one, else on the CPU.

    Raises:
        DataError: another shape, or fewer than `least` rows.
        NumericalError: NaN or infinite values.
    """
    if features.ndim != 2:
        raise DataError(f"The {what} must be (N, d), got {tuple(features.shape)}.")
    if len(features) < least:
        raise DataError(f"The {what} of at least {least} images are needed, got {len(features)}.")
    features = features.detach().to(device_of(features), torch.float64)
    if not bool(torch.isfinite(features).all()):
        raise NumericalError(f"The {what} contain NaN or infinite values; check the images and the extractor.")
    return features


def checked_pair(fake: torch.Tensor, real: torch.Tensor, least: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides `checked`, of equal d and on one device.

    Raises:
        DataError: as `checked`, or features of different lengths.
        NumericalError: see `checked`.
    """
    fake, real = checked(fake, least, "fake features"), checked(real, least, "real features")
    if fake.shape[1] != real.shape[1]:
        raise DataError(
            f"The fake features have length {fake.shape[1]}, the real ones {real.shape[1]}; use one extractor."
        )
    return fake, real.to(fake.device)


def device_of(features: torch.Tensor) -> torch.device:
    """Where float64 arithmetic on features is done: Apple's GPUs have none."""
    return features.device if features.is_cuda else torch.device("cpu")
