"""Feature extractors: a registry of records that help texts, docs and tests read."""

from dataclasses import dataclass

from ...core.errors import UsageError, unknown
from ...core.lazy import load_object
from .base import FeatureExtractor, Logits


@dataclass(frozen=True)
class FeatureRecord:
    """One extractor.

    Attributes:
        name: registered name.
        num_features: length of the features.
        summary: one line.
        paper: where the features were proposed.
        target: "module:Class" of the extractor.
        options: keyword arguments of the class that `get_features` passes on.
    """

    name: str
    num_features: int
    summary: str
    paper: str
    target: str
    options: tuple[str, ...] = ()


_HERE = "diffaccel.evaluate.features"

FEATURES = {
    record.name: record
    for record in (
        FeatureRecord(
            "digits64", 64, "bundled digit classifier, 8×8 grey images", "own", f"{_HERE}.digits:DigitsFeatures"
        ),
        FeatureRecord(
            "random-conv",
            128,
            "untrained convolutional net, any image size, no weights",
            "Naeem et al. 2020",
            f"{_HERE}.random_conv:RandomConvFeatures",
        ),
    )
}


def get_features(name: str, **options) -> FeatureExtractor:
    """Build the extractor with a registered name.

    Args:
        name: registered name.
        options: for extractors that are not bundled: ``weights`` (file, folder or hub name), ``resize`` (a filter of
            `resize.FILTERS`), ``download`` (whether weights may be fetched), ``verify`` (whether the hash of the
            weights must be a published one). None means not given.

    Raises:
        UsageError: the name is not registered, or it does not take an option.
        DataError: damaged weights, or others than the published ones.
        MissingWeightsError: its weights are not on this machine.
    """
    if name not in FEATURES:
        raise unknown("feature extractor", name, FEATURES)
    record = FEATURES[name]
    given = {key: value for key, value in options.items() if value is not None}
    superfluous = [key for key in given if key not in record.options]
    if superfluous:
        taken = f"it takes {', '.join(record.options)}" if record.options else "it takes none"
        raise UsageError(f"The features {name} have no option {superfluous[0]!r}; {taken}.")
    return load_object(record.target)(**given)


__all__ = ["FEATURES", "FeatureExtractor", "FeatureRecord", "Logits", "get_features"]
