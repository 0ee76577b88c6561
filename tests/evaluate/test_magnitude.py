import pytest
import torch

from diffaccel.core.errors import DataError, UsageError
from diffaccel.evaluate.metrics.magnitude import LATENT_MEAN, LATENT_STD, magnitude_score


def latents_of(normalised):
    shape = (1, 4, 1, 1)
    return normalised * torch.tensor(LATENT_STD).reshape(shape) + torch.tensor(LATENT_MEAN).reshape(shape)


def test_only_outliers_count_and_one_cell_counts_once():
    normalised = torch.zeros(3, 4, 64, 64)
    normalised[1, 2, 5, 5], normalised[1, 0, 6, 6] = -6.4, 5.0  # one cell, two channels
    normalised[2, 1, 0, 0], normalised[2, 1, 63, 63] = 2.9, 3.2
    score = magnitude_score(latents_of(normalised))
    torch.testing.assert_close(score, torch.tensor([0.0, 6.4 / 256, 3.2 / 256]))


def test_other_channels_and_cells():
    pixels = torch.full((1, 1, 8, 8), 2.0)
    assert magnitude_score(pixels, mean=[0.0], std=[0.5], cell=8).tolist() == [4.0]
    assert not torch.isfinite(magnitude_score(pixels / 0, mean=[0.0], std=[0.5]))
    assert magnitude_score(pixels.half(), mean=[0.0], std=[0.5]).dtype == torch.float32


def test_bad_input():
    with pytest.raises(DataError, match="mean and std"):
        magnitude_score(torch.zeros(1, 16, 8, 8))
    with pytest.raises(DataError, match="at least 4"):
        magnitude_score(torch.zeros(1, 4, 2, 8))
    with pytest.raises(UsageError, match="positive"):
        magnitude_score(torch.zeros(1, 1, 8, 8), [0.0], [0.0])
