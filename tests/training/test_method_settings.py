"""Every setting of the methods that train from scratch is checked before anything is read or computed."""

import pytest

from diffaccel.core.config import build
from diffaccel.core.errors import UsageError
from diffaccel.training.registry import METHODS, load_method

WRONG = [
    ("denoising", {"channels": [10, 20]}, "multiples of 8"),
    ("denoising", {"channels": []}, "multiples of 8"),
    ("denoising", {"prediction_type": "foo"}, "method.prediction_type"),
    ("denoising", {"null_probability": 1.0}, "null_probability is a share"),
    ("denoising", {"sampling_steps": 0}, "sampling_steps must be at least 1"),
    ("flow-matching", {"null_probability": 2}, "null_probability is a share"),
    ("flow-matching", {"patch_size": 0}, "patch_size must be at least 1"),
    ("classifier", {"data": "cifar"}, "mnist"),
    ("classifier", {"shift": -1}, "shift must be at least 0"),
    ("emoji-autoencoding", {"largest_shift": -1}, "largest_shift must be at least 0"),
    ("emoji-autoencoding", {"latent_channels": 0}, "latent_channels must be at least 1"),
    ("emoji-autoencoding", {"kl_weight": float("nan")}, "kl_weight"),
    ("emoji-contrast", {"tint": 1.5}, "tint is a share"),
    ("emoji-text-to-image", {"guidance_scale": 0}, "guidance_scale must be at least 1"),
    ("emoji-text-to-image", {"prediction_type": "noise"}, "method.prediction_type"),
]


@pytest.mark.parametrize(("name", "settings", "words"), WRONG)
def test_wrong_values_are_one_sentence(name, settings, words):
    with pytest.raises(UsageError, match=words):
        build(load_method(name).Config, settings, "method.")


def test_every_method_is_tried():
    assert {name for name, _, _ in WRONG} == set(METHODS)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("flow-matching", {"patch_size": 3}, "patch_size must divide the 8"),
        ("denoising", {"channels": [8] * 5}, "too often"),
    ],
)
def test_networks_that_do_not_fit_the_images(name, settings, words):
    method = load_method(name)
    with pytest.raises(UsageError, match=words):
        method(method.Config(**settings), 0)
