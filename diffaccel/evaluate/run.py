"""From two sides, whatever they are, to a report."""

import resource
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from ..core.errors import DataError, UsageError, unknown
from ..core.processes import Processes
from ..core.versions import library_versions
from .cautions import cautions, same_images
from .collect import CAPTIONS, MOMENTS, VECTORS, Side, collect
from .features import FEATURES, FeatureExtractor, get_features
from .groups import GROUPS, assign_groups
from .measure import METRICS, Metric
from .moments import GroupedMoments, Moments
from .report import PACKAGES, Report
from .settings import Settings, make_settings
from .sources import ImageSource, StatisticsSource, resolve
from .statistics import check_features, check_suffix, save_statistics


def evaluate_images(
    fake,
    real=None,
    metrics=("fid",),
    features: str | FeatureExtractor = "auto",
    *,
    progress: bool = False,
    together: bool = False,
    **settings,
) -> Report:
    """Measure generated images, all metrics from one pass over them.

    Args:
        fake, real: see `sources.resolve`: folder, zip, statistics file, dataset, model, uint8 tensor (N, C, H, W), or
            a pair of it and labels (N,): known classes make the interval narrower and the correction right. ``real``
            may be None for metrics that need no reference.
        metrics: names in `measure.METRICS`: fid, kid, prdc, is, cmmd, clip.
        features: see `settings.Settings`; or an extractor.
        progress: draw a bar on stderr, on a terminal.
        together: share the images with the other processes of a torchrun or `accelerate launch` job, all of which must
            make this call; each gets the whole report.
        settings: the other fields of `settings.Settings`.

    Raises:
        UsageError: unknown metric, extractor or setting, statistics of unnamed features under "auto".
        DataError: sides that are missing, empty, unusable, of different sizes or made with other features.
        MissingWeightsError: weights of an extractor that are not on this machine.
        NumericalError: non-finite features.
    """
    started = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    extractor = features if isinstance(features, FeatureExtractor) else None
    named = features if extractor is None else extractor.name
    wanted = make_settings({"metrics": tuple(metrics), "features": named, **settings})
    chosen, used = _metrics(wanted.metrics, real), wanted.with_preset()
    processes = Processes(used.device, together)
    given = {"fake": fake} if real is None else {"fake": fake, "real": real}
    sources = {key: resolve(side, used.generation(), used.reading()) for key, side in given.items()}
    spaces, warnings = _spaces(chosen, extractor, used, sources)
    for space in spaces.values():
        space.prepare(processes.device, used.dtype, used.compile)
    _same_size(sources, spaces.values())
    needs = _needs(chosen, spaces, used)
    sides, details, samples, speed = {}, {}, {}, [0, 0.0]
    for key, source in sources.items():
        if isinstance(source, StatisticsSource):
            sides[key], details[key], noted = _from_statistics(source, spaces.values())
            warnings += noted
            continue
        asked = {space: needs[space] - {CAPTIONS} for space in set(spaces.values())}
        captions = source.captions(used.captions) if key == "fake" and any(m.name == "clip" for m in chosen) else None
        sides[key], details[key], samples[key], seconds = collect(
            source, asked, processes, splits=used.splits or 10, interval=used.interval, progress=progress
        )
        speed = [speed[0] + details[key]["count"], speed[1] + seconds]
        for side in sides[key].values() if captions else ():
            side.captions = [captions[position] for position in side.positions]
    results = []
    for metric in chosen:
        space = spaces["clip" if metric.clip else "features"]
        pair = [sides[key].get(space) if key in sides else None for key in ("fake", "real")]
        results += metric.measure(*pair, used)
    if same_images(details):  # an interval assumes two independent samples
        results = [replace(result, bias_corrected=None, ci95=None, method=None) for result in results]
    warnings += [note for found in sides.values() for side in found.values() for note in side.notes]
    warnings += cautions(results, details, list(spaces.values()), used)
    described = dict.fromkeys(("fake", "real")) | {
        k: s if isinstance(s, (str, Path)) else None for k, s in given.items()
    }
    return Report(
        results,
        [space.identity() for space in dict.fromkeys(spaces.values())],
        details["fake"],
        details.get("real"),
        {key: None if text is None else str(text) for key, text in described.items()} | wanted.to_dict(),
        list(dict.fromkeys(warnings)),
        {
            "device": str(processes.device),
            "processes": processes.world,
            "deterministic": processes.device.type == "cpu" and not used.compile,
            "versions": library_versions(PACKAGES),
        },
        _run_facts(*started, *speed),
        samples,
    )


def evaluate_fid(fake, real, features: str | FeatureExtractor = "auto", **settings) -> Report:
    """Fréchet distance between generated and real images; `evaluate_images` with the metric fid."""
    return evaluate_images(fake, real, ("fid",), features, **settings)


def write_statistics(
    source,
    path,
    features: str | FeatureExtractor = "auto",
    *,
    vectors=False,
    progress=False,
    together=False,
    **settings,
) -> Moments:
    """Compute the statistics of one side and save them for later comparisons (see `statistics`).

    Args:
        source: any side that holds or generates images.
        path: the .npz or .safetensors file to write.
        vectors: keep the features of every image too, which kid, prdc and a two-sided interval need.
        progress, together, settings: as for `evaluate_images`.

    Returns:
        The `Moments` that were written.

    Raises:
        UsageError, DataError, MissingWeightsError, NumericalError: as `evaluate_images`.
    """
    check_suffix(path)
    extractor = features if isinstance(features, FeatureExtractor) else None
    used = make_settings({"features": extractor.name if extractor else features, **settings}).with_preset()
    processes = Processes(used.device, together)
    side = resolve(source, used.generation(), used.reading())
    if isinstance(side, StatisticsSource):
        raise UsageError(f"{side.name} is a statistics file already.")
    extractor = extractor or _choose(used, {"source": side})[0]
    extractor.prepare(processes.device, used.dtype, used.compile)
    needs = {extractor: {MOMENTS, VECTORS} if vectors else {MOMENTS}}
    found, details, _, _ = collect(side, needs, processes, interval=False, progress=progress)
    moments = found[extractor].moments.total()
    if processes.rank == 0:
        kept = {"vectors": found[extractor].vectors, "labels": found[extractor].labels} if vectors else {}
        save_statistics(path, moments, extractor.identity(), details, library_versions(PACKAGES), **kept)
    return moments


def _metrics(names: tuple[str, ...], real) -> list[Metric]:
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
        if METRICS[name].reference and real is None:
            raise UsageError(f"{name} compares with real images; give a second side.")
    return [METRICS[name] for name in dict.fromkeys(names)]


def _needs(chosen: list[Metric], spaces: dict, used: Settings) -> dict[FeatureExtractor, set[str]]:
    needs = {space: set() for space in spaces.values()}
    for metric in chosen:
        needs[spaces["clip" if metric.clip else "features"]] |= metric.needs
        if metric.name == "fid" and used.fd_infinity:
            needs[spaces["features"]].add(VECTORS)
    return needs


def _spaces(chosen: list[Metric], extractor, used: Settings, sources: dict) -> tuple[dict, list[str]]:
    """The extractors: "features" and "clip", the same object where the features are CLIP's; and what to warn of."""
    spaces, warnings = {}, []
    if any(not metric.clip for metric in chosen):
        spaces["features"], warnings = (extractor, []) if extractor else _choose(used, sources)
    if any(metric.clip for metric in chosen):
        main = spaces.get("features", extractor)
        same = main is not None and main.name == "clip"
        spaces["clip"] = (
            main if same else get_features("clip", weights=used.clip_weights, download=used.download or None)
        )
    return spaces, warnings


def _choose(used: Settings, sources: dict) -> tuple[FeatureExtractor, list[str]]:
    options = {
        "weights": used.weights,
        "resize": used.filter,
        "download": used.download or None,
        "verify": None if used.verify else False,
    }
    if used.features != "auto":
        return get_features(used.features, **options), []
    for source in sources.values():
        if not isinstance(source, StatisticsSource):
            continue
        recorded = (source.statistics.features or {}).get("name")
        if recorded is None:
            known = ", ".join(FEATURES)
            raise UsageError(
                f"{source.name} does not say which features it holds; name them with --features ({known})."
            )
        if recorded not in FEATURES:  # a class of somebody is only imported when its name was typed
            raise DataError(f"{source.name} was made with {recorded!r}; if you trust these, name them with --features.")
        return get_features(recorded, **options), []
    if all(source.shape == (1, 8, 8) for source in sources.values()):
        return get_features("digits64", **options), []
    note = "random-conv is an untrained network: it compares like with like, its numbers are not for publication"
    return get_features("random-conv", **options), [note]


def _from_statistics(source: StatisticsSource, spaces) -> tuple[dict[FeatureExtractor, Side], dict, list[str]]:
    """A statistics file as a side, in the one space that it was made in."""
    statistics, warnings = source.statistics, []
    fitting = [space for space in spaces if (statistics.features or {}).get("name") in (None, space.name)]
    space = (fitting or list(spaces))[0]
    identity = space.identity()
    check_features(source.path, statistics, identity)
    if statistics.features is None:
        warnings.append(f"{source.name} does not record its features; taken on trust to be {identity['name']}")
    elif statistics.features.get("dtype", "float32") != identity["dtype"]:
        warnings.append(
            f"{source.name} was computed in {statistics.features.get('dtype')}, this in {identity['dtype']}"
        )
    side = Side(source.name, statistics.count, space, statistics.gaussian, statistics.vectors)
    if side.vectors is not None:
        side.labels = statistics.labels
        side.groups = assign_groups(statistics.labels, len(side.vectors))
        side.moments = GroupedMoments(space.num_features, GROUPS).update(side.vectors, side.groups)
    details = {"kind": source.kind, "name": source.name, "count": statistics.count}
    details |= {"vectors": side.vectors is not None, "source": statistics.header.get("source")}
    return {space: side}, details, warnings


def _same_size(sources: dict, spaces) -> None:
    shapes = {key: side.shape[1:] for key, side in sources.items() if isinstance(side, ImageSource)}
    if len(set(shapes.values())) > 1 and not all(space.resizes for space in spaces):
        fake, real = ("×".join(map(str, shapes[key])) for key in ("fake", "real"))
        raise DataError(
            f"The fake images are {fake} and the real ones {real} (height×width); bring both to one size with --resize."
        )


def _run_facts(clock: float, started: str, images: int, seconds: float) -> dict:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    cuda = {"peak_cuda_mib": torch.cuda.max_memory_allocated() >> 20} if torch.cuda.is_available() else {}
    return {
        "command": sys.argv,
        "started": started,
        "wall_s": round(time.perf_counter() - clock, 3),
        "images_per_second": round(images / seconds, 1) if seconds else None,
        "peak_rss_mib": round(peak),
        **cuda,
    }
