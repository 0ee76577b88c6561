"""Distances to a fixed reference, taken again and again: the numbers are those of a whole evaluation."""

import pytest
import torch

from diffaccel.core.errors import DataError, UsageError
from diffaccel.core.images import save_png
from diffaccel.evaluate.features import get_features
from diffaccel.evaluate.moments import Moments
from diffaccel.evaluate.monitor import Monitor
from diffaccel.evaluate.run import evaluate_images
from diffaccel.evaluate.statistics import save_statistics
from diffaccel.models.data import load_digits

EXTRACTOR = "digits64"


@pytest.fixture(scope="module")
def images():
    return load_digits("train")[0]


@pytest.fixture(scope="module")
def files(images, tmp_path_factory):
    """Statistics of 300 images with and without their features, and a folder of the same images."""
    folder = tmp_path_factory.mktemp("reference")
    extractor = get_features(EXTRACTOR)
    with torch.no_grad():
        vectors = extractor(images[:300])
    moments = Moments(extractor.num_features).update(vectors)
    for name, kept in (("with", vectors), ("without", None)):
        given = {"vectors": kept} if kept is not None else {}
        save_statistics(folder / f"{name}.npz", moments, extractor.identity(), {"kind": "tensor"}, {}, **given)
    (folder / "images").mkdir()
    for index, image in enumerate(images[:300]):
        save_png(image, folder / "images" / f"{index:04d}.png")
    return folder


def reported(fake, real, metric):
    (result,) = evaluate_images(fake, real, (metric,), EXTRACTOR).results
    return result.value


@pytest.mark.parametrize(("metric", "full"), [("fd", "fid"), ("kd", "kid")])
def test_the_number_is_that_of_an_evaluation(images, files, metric, full):
    fake = images[500:700]
    expected = reported(fake, files / "images", full)
    for reference in ("images", "with.npz"):
        monitor = Monitor(files / reference, EXTRACTOR, metric)
        assert monitor.distance(fake) == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert monitor.distance(fake) == monitor.distance(fake)
        assert monitor(fake) == {f"{metric.upper()}-{EXTRACTOR}": monitor.distance(fake)}


def test_nearer_images_are_nearer(images, files):
    for metric in ("fd", "kd"):
        monitor = Monitor(files / "with.npz", EXTRACTOR, metric)
        noisy = (images[500:700].float() + 60.0 * torch.randn(200, 1, 8, 8)).clamp(0, 255).to(torch.uint8)
        assert monitor.distance(images[500:700]) < monitor.distance(noisy)
    assert Monitor(files / "with.npz", EXTRACTOR).distance(images[:300]) == pytest.approx(0.0, abs=1e-6)


def test_statistics_say_their_features(images, files):
    for name in ("with.npz", "without.npz"):
        monitor = Monitor(files / name)
        assert monitor.extractor.name == EXTRACTOR
        assert monitor.distance(images[500:700]) == pytest.approx(
            reported(images[500:700], files / "images", "fid"), rel=1e-6
        )


def test_what_cannot_be_measured_against(files, tmp_path):
    with pytest.raises(UsageError, match="The kernel distance needs the features themselves"):
        Monitor(files / "without.npz", metric="kd")
    with pytest.raises(UsageError, match="psnr"):
        Monitor(files / "with.npz", metric="psnr")
    with pytest.raises(UsageError, match="colours"):
        Monitor(files / "with.npz", "colours")
    with pytest.raises(DataError, match="64-dimensional features of digits64, but random-conv has 128"):
        Monitor(files / "with.npz", "random-conv")
    with pytest.raises((DataError, UsageError)):
        Monitor(tmp_path / "none")
