"""A mixture of Gaussians with the spectrum of images: the bench on which solvers are compared exactly."""

import torch

from ..core.schedule import NoiseSchedule
from .teachers import GaussianMixtureTeacher


def spectral_mixture(
    schedule: NoiseSchedule, dimensions: int = 64, components: int = 12, seed: int = 5
) -> GaussianMixtureTeacher:
    """Equal components whose means and spreads fall off as i^−0.7 over the dimensions i = 1 … d.

    Means have root mean square 0.5; each component's standard deviations are a quarter of that spectrum times a
    log-normal factor of spread 0.5. Modes part early in some directions and late in others, so that every part of the
    trajectory counts.
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, dimensions + 1, dtype=torch.float64) ** -0.7
    spectrum *= 0.5 / spectrum.square().mean().sqrt()
    shape = (components, dimensions)
    means = spectrum * torch.randn(shape, dtype=torch.float64, generator=generator)
    spreads = 0.25 * spectrum * torch.exp(0.5 * torch.randn(shape, dtype=torch.float64, generator=generator))
    return GaussianMixtureTeacher([1.0] * components, means, spreads**2, schedule)
