"""Fréchet distance between two sides, from whatever they are to a report."""

from ..core.errors import DataError, UsageError
from ..core.versions import library_versions
from .features import FEATURES, FeatureExtractor, get_features
from .jackknife import GROUPS, GroupedMoments, estimate
from .moments import Moments
from .report import FrechetReport
from .sources import DEFAULT_NUM, Generation, ImageSource, StatisticsSource, resolve
from .statistics import Statistics, check_features, load_statistics, save_statistics

_EXTRACTION_BATCH = 256
_EXACT_FROM = 10_000  # images from which a statistics file may pass for exact without a word


def evaluate_fid(
    fake,
    real,
    features: str | FeatureExtractor = "auto",
    *,
    num: int = DEFAULT_NUM,
    steps: int | None = None,
    sampler: str | None = None,
    seed: int = 0,
    batch_size: int = 256,
    skip_bad: bool = False,
    progress: bool = False,
) -> FrechetReport:
    """Fréchet distance between generated and real images.

    Args:
        fake, real: see `sources.resolve`: folder, .npz statistics, dataset, model, uint8 tensor (N, C, H, W), or
            a pair of it and labels (N,): known classes make the interval narrower and the correction right.
        features: registered extractor name, an extractor, or "auto": what a statistics file was made with, else
            digits64 for 8×8 grey images, else random-conv with a note.
        num, steps, sampler, seed, batch_size: how images of a model are drawn.
        skip_bad: leave unusable image files out and list them in the report.
        progress: draw a bar on stderr.

    Raises:
        UsageError: unknown extractor, or statistics of unnamed features under "auto".
        DataError: sides that are missing, empty, unusable, of different sizes or made with other features.
        NumericalError: non-finite features.
    """
    generation = Generation(num, steps, sampler, seed, batch_size)
    sides = {"fake": resolve(fake, generation, skip_bad), "real": resolve(real, generation, skip_bad)}
    loaded = {key: load_statistics(s.path) for key, s in sides.items() if isinstance(s, StatisticsSource)}
    extractor, warnings = _choose(features, sides, loaded)
    _same_size(sides)
    identity = extractor.identity()
    moments, counts, details = {}, {}, {}
    for key, side in sides.items():
        if isinstance(side, StatisticsSource):
            check_features(side.path, loaded[key], identity)
            moments[key], counts[key] = loaded[key].gaussian, loaded[key].count
            if loaded[key].features is None:
                warnings.append(f"{side.name} does not record its features; taken on trust to be {identity['name']}")
            details[key] = {"kind": side.kind, "name": side.name, "source": loaded[key].header.get("source")}
        else:
            moments[key] = extract_moments(side, extractor, progress=progress)
            counts[key] = moments[key].count
            details[key] = {"kind": side.kind, "name": side.name, "shape": list(side.shape), **side.details}
    result = estimate(moments["fake"], moments["real"])
    same = _digest(details["fake"]) is not None and _digest(details["fake"]) == _digest(details["real"])
    warnings += _cautions(counts, details, extractor.num_features, same)
    if result.ci95 and result.ci95[1] < 0:
        warnings.append(
            "the interval lies below 0: a side has a fixed class mix without labels, which the jackknife takes for chance; "
            "compare by the plug-in value"
        )
    if same:  # the jackknife assumes two independent samples
        result = type(result)(result.value)
    return FrechetReport(
        metric=f"FD-{extractor.name}",
        value=result.value,
        bias_corrected=result.bias_corrected,
        ci95=result.ci95,
        n_fake=counts["fake"],
        n_real=counts["real"],
        features=identity,
        fake=details["fake"],
        real=details["real"],
        warnings=warnings,
    )


def write_statistics(
    source, path, features: str | FeatureExtractor = "auto", *, skip_bad=False, progress=False, **drawing
) -> Moments:
    """Compute the statistics of one side and save them for later comparisons (see `statistics`).

    Args:
        source: any side that holds or generates images.
        path: the .npz file to write.
        drawing: num, steps, sampler, seed, batch_size of `evaluate_fid`.

    Returns:
        The `Moments` that were written.
    """
    side = resolve(source, Generation(**drawing), skip_bad)
    if isinstance(side, StatisticsSource):
        raise UsageError(f"{side.name} is a statistics file already.")
    extractor, _ = _choose(features, {"source": side}, {})
    moments = extract_moments(side, extractor, progress=progress).total()
    description = {"kind": side.kind, "name": side.name, "shape": list(side.shape), **side.details}
    save_statistics(path, moments, extractor.identity(), description, library_versions())
    return moments


def extract_moments(side: ImageSource, extractor: FeatureExtractor, *, progress: bool = False) -> GroupedMoments:
    """Stream the images of a side through the extractor; memory does not grow with their number."""
    from tqdm import tqdm

    moments = GroupedMoments(extractor.num_features)
    with tqdm(desc=side.name, unit="image", disable=None if progress else True) as bar:  # None: only on a terminal
        for images, labels in side.batches(extractor.channels, _EXTRACTION_BATCH):
            moments.update(extractor(images), labels)
            bar.update(len(images))
    return moments


def _choose(features, sides: dict, loaded: dict[str, Statistics]) -> tuple[FeatureExtractor, list[str]]:
    if isinstance(features, FeatureExtractor):
        return features, []
    if features != "auto":
        return get_features(features), []
    for key, statistics in loaded.items():
        recorded = (statistics.features or {}).get("name")
        if recorded is None:
            known = ", ".join(FEATURES)
            raise UsageError(
                f"{sides[key].name} does not say which features it holds; name them with --features ({known})."
            )
        if recorded not in FEATURES:
            raise DataError(f"{sides[key].name} was made with features {recorded!r}, which are not known here.")
        return get_features(recorded), []
    if all(side.shape == (1, 8, 8) for side in sides.values()):
        return get_features("digits64"), []
    note = "random-conv is an untrained network: it compares like with like, its numbers are not for publication"
    return get_features("random-conv"), [note]


def _same_size(sides: dict) -> None:
    shapes = {key: side.shape[1:] for key, side in sides.items() if isinstance(side, ImageSource)}
    if len(set(shapes.values())) > 1:
        fake, real = ("×".join(map(str, shapes[key])) for key in ("fake", "real"))
        raise DataError(f"The fake images are {fake} and the real ones {real} (height×width); resize one set first.")


def _digest(details: dict) -> str | None:
    return details.get("digest") or (details.get("source") or {}).get("digest")


def _cautions(counts: dict, details: dict, dim: int, same: bool) -> list[str]:
    found = []
    for key, count in counts.items():
        if count is not None and count <= dim:
            found.append(
                f"only {count} {key} images for {dim} features: the covariance is singular, the distance biased"
            )
        if count is not None and count < 2 * GROUPS and "digest" in details[key]:
            found.append(f"no interval: the jackknife needs at least {2 * GROUPS} {key} images")
        if details[key]["kind"] == "statistics" and count is not None and count < _EXACT_FROM:
            found.append(f"the statistics of {count} {key} images count as exact: their own error is ignored")
        skipped = len(details[key].get("skipped", ()))
        if skipped:
            found.append(f"{skipped} {key} file(s) could not be used and were left out")
    if "JPEG" in details["fake"].get("formats", {}):
        found.append("the fake images are JPEG files: compression changes the distance, save generated images as PNG")
    if same:
        found.append("both sides are the same images, so the distance is 0 by construction and has no interval")
    return found
