"""Feature extractors for Fréchet distances: a registry of records that help texts, docs and tests read."""

from collections.abc import Callable
from dataclasses import dataclass

from ...core.errors import unknown
from .base import FeatureExtractor


@dataclass(frozen=True)
class FeatureRecord:
    """One extractor: registered name, length of the features, one line, paper, and how to build it."""

    name: str
    num_features: int
    summary: str
    paper: str
    build: Callable[[], FeatureExtractor]


def _digits() -> FeatureExtractor:
    from .digits import DigitsFeatures

    return DigitsFeatures()


def _random_conv() -> FeatureExtractor:
    from .random_conv import RandomConvFeatures

    return RandomConvFeatures()


FEATURES = {
    record.name: record
    for record in (
        FeatureRecord("digits64", 64, "bundled digit classifier, 8×8 grey images", "own", _digits),
        FeatureRecord(
            "random-conv",
            128,
            "untrained convolutional net, any image size, no weights",
            "Naeem et al. 2020",
            _random_conv,
        ),
    )
}


def get_features(name: str) -> FeatureExtractor:
    """Build the extractor with a registered name.

    Raises:
        UsageError: the name is not registered.
        MissingWeightsError: its weights are not on this machine.
    """
    if name not in FEATURES:
        raise unknown("feature extractor", name, FEATURES)
    return FEATURES[name].build()


__all__ = ["FEATURES", "FeatureExtractor", "FeatureRecord", "get_features"]
