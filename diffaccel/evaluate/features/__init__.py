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
            "mnist64", 64, "bundled digit classifier, 28×28 grey images", "own", f"{_HERE}.digits:MnistFeatures"
        ),
        FeatureRecord(
            "emoji128", 128, "bundled picture encoder of tiny-sd, 64×64 images", "own", f"{_HERE}.emoji:EmojiFeatures"
        ),
        FeatureRecord(
            "random-conv",
            128,
            "untrained convolutional net, any image size, no weights",
            "Naeem et al. 2020",
            f"{_HERE}.random_conv:RandomConvFeatures",
        ),
        FeatureRecord(
            "inception",
            2048,
            "the network of published FIDs; needs its weight file",
            "Heusel et al. 2017",
            f"{_HERE}.inception:InceptionFeatures",
            ("weights", "resize", "verify"),
        ),
        FeatureRecord(
            "dinov2",
            1024,
            "DINOv2 ViT-L/14, closer to people's judgement; needs its weights",
            "Oquab et al. 2023; Stein et al. 2023",
            f"{_HERE}.vision:DinoV2Features",
            ("weights", "download"),
        ),
        FeatureRecord(
            "clip",
            768,
            "CLIP ViT-L/14@336, for CMMD and the CLIP score; needs its weights",
            "Radford et al. 2021; Jayasumana et al. 2024",
            f"{_HERE}.clip:ClipFeatures",
            ("weights", "download", "crop"),
        ),
    )
}


_BY_SHAPE = {(1, 8, 8): "digits64", (1, 28, 28): "mnist64"}


def features_for(shape) -> str:
    """Name of the bundled extractor that suits images of a shape (C, H, W), when nothing else is known of them."""
    return _BY_SHAPE.get(tuple(shape), "random-conv")


def get_features(name: str, **options) -> FeatureExtractor:
    """Build the extractor with a registered name, or one of a user's own class.

    Args:
        name: registered name, or "module:pkg.mod:Class" (see `custom.custom_features`).
        options: for extractors that are not bundled: ``weights`` (file, folder or hub name), ``resize`` (a filter of
            `resize.FILTERS`), ``download`` (whether weights may be fetched), ``verify`` (whether the hash of the
            weights must be a published one), ``crop`` (whether CLIP sees the central square or the squeezed image);
            for a user's class those of its constructor. None means not given.

    Raises:
        UsageError: the name is not registered, it does not take an option, or the class cannot be used.
        DataError: damaged weights, or others than the published ones.
        MissingWeightsError: its weights are not on this machine.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if name.startswith("module:"):
        return load_object(f"{_HERE}.custom:custom_features")(name, **given)
    if name not in FEATURES:
        raise unknown("feature extractor", name, (*FEATURES, "module:pkg.mod:Class"))
    record = FEATURES[name]
    superfluous = [key for key in given if key not in record.options]
    if superfluous:
        taken = f"it takes {', '.join(record.options)}" if record.options else "it takes none"
        raise UsageError(f"The features {name} have no option {superfluous[0]!r}; {taken}.")
    return load_object(record.target)(**given)


__all__ = ["FEATURES", "FeatureExtractor", "FeatureRecord", "Logits", "features_for", "get_features"]
