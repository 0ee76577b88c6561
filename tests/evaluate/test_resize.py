"""Resize filters against explicit index arithmetic, filter kernels written out, and Pillow."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.core.errors import UsageError
from diffaccel.evaluate.features.resize import FILTERS, resize

SHAPES = [(2, 3, 8, 8), (1, 3, 32, 21), (2, 1, 299, 299), (1, 3, 301, 255), (1, 3, 640, 500)]
SIZE = 299


def _images(shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def _taps(length, kernel, support, antialias):
    """Dense (SIZE, length) matrix of a filter with half-pixel centres, normalised where the picture ends."""
    scale = length / SIZE
    stretch = max(scale, 1.0) if antialias else 1.0
    matrix = np.zeros((SIZE, length))
    for i in range(SIZE):
        centre = (i + 0.5) * scale
        first, last = max(math.floor(centre - support * stretch), 0), math.ceil(centre + support * stretch)
        for j in range(first, min(last + 1, length)):
            matrix[i, j] = kernel((j + 0.5 - centre) / stretch)
    return matrix / matrix.sum(1, keepdims=True)


def _triangle(x):
    return max(0.0, 1.0 - abs(x))


def _cubic(x, a=-0.5):
    """Keys 1981; Pillow and torch's antialiased bicubic have a = −1/2."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def _separable(images, rows, columns):
    return np.einsum("ih,nchw,jw->ncij", rows, images.numpy().astype(np.float64), columns, optimize=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_tf1_bilinear_reads_from_the_upper_left_corner(shape):
    def matrix(length):
        rows = np.zeros((SIZE, length))
        for i in range(SIZE):
            at = float(np.float32(i) * np.float32(length / SIZE))
            low = int(at)
            rows[i, low] += 1 - (at - low)
            rows[i, min(low + 1, length - 1)] += at - low
        return rows

    images = _images(shape)
    want = _separable(images, matrix(shape[2]), matrix(shape[3]))
    np.testing.assert_allclose(resize(images, SIZE, "tf1-bilinear").numpy(), want, rtol=0, atol=1e-4)


def test_tf1_bilinear_of_a_doubled_row():
    row = torch.tensor([0, 100, 40], dtype=torch.uint8).expand(1, 1, 3, 3)
    doubled = resize(row, 6, "tf1-bilinear")[0, 0, 0]
    assert doubled.tolist() == [0.0, 50.0, 100.0, 70.0, 40.0, 40.0]  # half-pixel centres would give 0, 25, 75, …


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "kernel", "support", "antialias", "atol"),
    [
        # torch's float32 coordinates are off by some 1e-5 pixels, and neighbours differ by up to 255
        ("bilinear", _triangle, 1, False, 2e-2),
        ("bilinear-antialias", _triangle, 1, True, 2e-2),
        ("bicubic-antialias", _cubic, 2, True, 2e-2),
        ("pil-bicubic", _cubic, 2, True, 1e-4),
    ],
)
def test_filters_equal_their_kernels(shape, name, kernel, support, antialias, atol):
    images = _images(shape)
    want = _separable(images, *(_taps(length, kernel, support, antialias) for length in shape[2:]))
    if name == "pil-bicubic":
        want = want.clip(0, 255)
    np.testing.assert_allclose(resize(images, SIZE, name).numpy(), want, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
def test_pil_bicubic_is_pillow_in_float(shape):
    images = _images(shape)
    got = resize(images, SIZE, "pil-bicubic")
    for image, result in zip(images, got, strict=True):
        for plane, channel in zip(image, result, strict=True):
            pillow = Image.fromarray(plane.numpy().astype(np.float32)).resize((SIZE, SIZE), Image.BICUBIC)
            assert np.array_equal(channel.numpy(), np.asarray(pillow).clip(0, 255))


def test_only_clean_fid_cuts_off_the_overshoot():
    edge = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    edge[..., 8:] = 255
    clean, torch_bicubic = resize(edge, SIZE, "pil-bicubic"), resize(edge, SIZE, "bicubic-antialias")
    assert (clean.min(), clean.max()) == (0, 255) and torch_bicubic.min() < -5 and torch_bicubic.max() > 260
    assert len(clean.unique()) > 17 and bool((clean != clean.round()).any())  # not bytes


@pytest.mark.parametrize("name", FILTERS)
def test_every_filter(name):
    record = FILTERS[name]
    assert record.name == name and record.summary and record.used_by and record.inception_grey in (127.5, 128)
    flat = resize(torch.full((2, 3, 5, 400), 77, dtype=torch.uint8), SIZE, name)
    assert flat.dtype == torch.float32 and flat.shape == (2, 3, SIZE, SIZE)
    torch.testing.assert_close(flat, torch.full_like(flat, 77), rtol=0, atol=1e-3)  # weights sum to one
    images = _images((3, 3, 20, 30))
    assert torch.equal(resize(images, SIZE, name)[1:2], resize(images[1:2], SIZE, name))
    same = _images((1, 3, SIZE, SIZE))
    torch.testing.assert_close(resize(same, SIZE, name), same.float(), rtol=0, atol=1e-3)
    assert resize(_images((1, 3, 1, 1)), SIZE, name).shape == (1, 3, SIZE, SIZE)


def test_an_unknown_filter_gets_a_hint():
    with pytest.raises(UsageError, match="Did you mean 'pil-bicubic'"):
        resize(_images((1, 3, 2, 2)), SIZE, "pil-bicubik")
