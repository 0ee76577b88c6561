"""Sentences about what weakens a number, for every report."""

from .features import FeatureExtractor
from .groups import GROUPS
from .report import Measurement
from .settings import Settings

_EXACT_FROM = 10_000  # images from which a statistics file may pass for exact without a word
_PUBLISHED = 50_000  # images of both sides in most publications


def same_images(details: dict[str, dict]) -> bool:
    """Whether both sides hold the same images."""
    digests = [_digest(side) for side in details.values()]
    return len(digests) == 2 and digests[0] is not None and digests[0] == digests[1]


def cautions(
    results: list[Measurement], details: dict[str, dict], extractors: list[FeatureExtractor], settings: Settings
) -> list[str]:
    """Warnings from the results, the descriptions of the sides and the settings."""
    found = []
    if any(result.kind == "FD" for result in results):
        found += _small_samples(details, extractors[0], settings)
        if any(result.ci95 and result.ci95[1] < 0 for result in results if result.kind == "FD"):
            found.append(
                "the interval lies below 0: a side has a fixed class mix without labels, which the jackknife takes for "
                "chance; compare by the plug-in value"
            )
    for key, side in details.items():
        found += _files(key, side, extractors)
    if settings.preset:
        from .presets import get_preset

        found += _decoding(details, get_preset(settings.preset))
    if same_images(details):
        found.append("both sides are the same images, so distances are 0 by construction and have no interval")
    return found


def _small_samples(details: dict, extractor: FeatureExtractor, settings: Settings) -> list[str]:
    found, dim = [], extractor.num_features
    for key, side in details.items():
        count = side.get("count")
        if count is None:
            continue
        if count <= dim:
            found.append(
                f"only {count} {key} images for {dim} features: the covariance is singular, the distance biased"
            )
        elif count < 2 * dim and side["kind"] != "statistics":
            found.append(f"only {count} {key} images for {dim} features: kid is unbiased, prefer it")
        if settings.interval and count < 2 * GROUPS and side["kind"] != "statistics":
            found.append(f"no interval: the jackknife needs at least {2 * GROUPS} {key} images")
        if side["kind"] == "statistics" and not side.get("vectors") and count < _EXACT_FROM:
            found.append(f"the statistics of {count} {key} images count as exact: their own error is ignored")
    counts = [side["count"] for side in details.values() if side.get("count") is not None]
    if extractor.name == "inception" and counts and min(counts) < _PUBLISHED:
        found.append(f"publications use {_PUBLISHED:,} images; with fewer the distance is larger".replace(",", " "))
    return found


def _files(key: str, side: dict, extractors: list[FeatureExtractor]) -> list[str]:
    found = []
    if side.get("skipped"):
        found.append(f"{len(side['skipped'])} {key} file(s) could not be used and were left out")
    if key == "fake" and "JPEG" in side.get("formats", {}):
        found.append("the fake images are JPEG files: compression changes the distance, save generated images as PNG")
    if side.get("duplicates"):
        found.append(f"{side['duplicates']} {key} file(s) are copies of another one")
    shape = side.get("shape")
    for extractor in extractors:
        aliasing = shape and getattr(extractor, "input_size", None) and "antialias" not in extractor.preprocessing
        if aliasing and "pil" not in extractor.preprocessing and min(shape[1:]) > 2 * extractor.input_size:
            found.append(
                f"the {key} images of {shape[1]}×{shape[2]} are reduced to {extractor.input_size}×{extractor.input_size} "
                f"by a filter that aliases, as the {extractor.name} convention wants it; `--preset clean-fid` does not"
            )
    return found


def _decoding(details: dict, preset) -> list[str]:
    """Images that the tool of a preset decodes in another way than this one."""
    odd = 0
    for side in details.values():
        plain = {"RGB", "L"}
        odd += sum(n for mode, n in side.get("modes", {}).items() if mode not in plain) + side.get("rotated", 0)
    if not odd:
        return []
    return [
        f"{odd} image(s) have transparency, a palette, 16 bits or a rotation mark: {preset.name} reads these otherwise"
    ]


def _digest(details: dict) -> str | None:
    return details.get("digest") or (details.get("source") or {}).get("digest")
