"""Sentences about what weakens a number, for every report."""

from .features import FeatureExtractor
from .groups import GROUPS
from .presets import get_preset
from .report import Measurement
from .settings import Settings

_EXACT_FROM = 10_000  # images from which a statistics file may pass for exact without a word
_PUBLISHED = 50_000  # images of both sides in most publications


def cautions(
    results: list[Measurement],
    sides: dict[str, dict],
    extractors: list[FeatureExtractor],
    settings: Settings,
    common: int,
    same: bool,
) -> list[str]:
    """Warnings from the results, the descriptions of the sides and the settings.

    Args:
        common: images that are on both sides.
        same: whether both sides hold the same images.
    """
    found = []
    for result in results:
        if result.kind == "FD":
            (dim,) = {e.num_features for e in extractors if result.metric == f"FD-{e.name}"}
            found += _distance(result, dim, sides, settings, same)
        if result.kind == "IS":
            found += _inception_score(results, result)
    for key, side in sides.items():
        found += _files(key, side, extractors)
    if any(extractor.name == "random-conv" for extractor in extractors):
        found.append(
            "random-conv is an untrained network: it compares like with like, its numbers are not for publication"
        )
    if settings.preset:
        found += _decoding(sides, settings.preset)
    compared = any(result.n_fake is not None and result.n_real is not None for result in results)
    if same and compared:
        found.append("both sides are the same images, so distances are 0 by construction and have no interval")
    elif common and compared:
        found.append(f"{common} image(s) are on both sides: these are no independent samples, intervals do not hold")
    return found


def _distance(result: Measurement, dim: int, sides: dict, settings: Settings, same: bool) -> list[str]:
    found = []
    for key, side in sides.items():
        count = side.get("count")
        statistics = side["kind"] == "statistics"
        if statistics and not side.get("vectors") and (count is None or count < _EXACT_FROM):
            size = "an unknown number of" if count is None else count
            found.append(f"the statistics of {size} {key} images count as exact: their own error is ignored")
        if count is None:
            continue
        if count <= dim:
            found.append(
                f"only {count} {key} images for {dim} features: the covariance is singular and the distance biased, "
                "without a correction or interval; kid is unbiased, prefer it"
            )
        elif count < 2 * dim and not statistics:
            found.append(f"only {count} {key} images for {dim} features: kid is unbiased, prefer it")
        if settings.interval and count < 2 * GROUPS and not statistics:
            found.append(f"no interval: the jackknife needs at least {2 * GROUPS} {key} images")
    counts = [side["count"] for side in sides.values() if side.get("count") is not None]
    if result.metric == "FD-inception" and counts and min(counts) < _PUBLISHED:
        found.append(f"publications use {_PUBLISHED:,} images; with fewer the distance is larger".replace(",", " "))
    if result.ci95 and result.ci95[1] < 0 and not same:
        found.append(
            "the interval lies below 0, so the sides are closer than independent samples of one distribution would be: do "
            "they share images, was one made from the other, or are class proportions fixed without labels? Compare by "
            "the plug-in value"
        )
    return found


def _inception_score(results: list[Measurement], score: Measurement) -> list[str]:
    found = []
    if score.n_fake < _PUBLISHED / 10:
        found.append(f"the Inception Score grows with the number of images; with {score.n_fake} it is too low")
    if any(other.kind == "IS of real images" and other.n_real != score.n_fake for other in results):
        found.append("the Inception Scores of both sides are of unequal numbers of images and do not compare")
    return found


def _files(key: str, side: dict, extractors: list[FeatureExtractor]) -> list[str]:
    found = []
    if side.get("skipped"):
        found.append(f"{len(side['skipped'])} {key} file(s) could not be used and were left out")
    if key == "fake" and "JPEG" in side.get("formats", {}):
        found.append("the fake images are JPEG files: compression changes the distance, save generated images as PNG")
    if side.get("duplicates"):
        found.append(f"{side['duplicates']} {key} file(s) are copies of another one")
    if side.get("labels"):
        found.append(f"{key}: {side['labels']}")
    shape = side.get("shape")
    for extractor in extractors:
        aliasing = shape and extractor.input_size and "antialias" not in extractor.preprocessing
        if aliasing and "pil" not in extractor.preprocessing and min(shape[1:]) > 2 * extractor.input_size:
            found.append(
                f"the {key} images of {shape[1]}×{shape[2]} are reduced to {extractor.input_size}×{extractor.input_size} "
                f"by a filter that aliases, as the {extractor.name} convention wants it; `--preset clean-fid` does not"
            )
    return found


def _decoding(sides: dict, preset: str) -> list[str]:
    """Images that the tool of a preset decodes in another way than this one."""
    odd = 0
    for side in sides.values():
        odd += sum(n for mode, n in side.get("modes", {}).items() if mode not in ("RGB", "L")) + side.get("rotated", 0)
    if not odd:
        return []
    name = get_preset(preset).name
    return [f"{odd} image(s) have transparency, a palette, 16 bits or a rotation mark: {name} reads these otherwise"]
