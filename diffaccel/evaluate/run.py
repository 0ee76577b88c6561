"""From two sides, whatever they are, to a report."""

import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from ..core.errors import UsageError
from ..core.processes import Processes
from ..core.versions import library_versions
from .cautions import cautions
from .collect import MOMENTS, VECTORS, Collection, collect
from .features import FeatureExtractor
from .moments import Moments
from .plan import Plan, make_plan, open_extractor, side_from_statistics
from .report import PACKAGES, Report, report_of, same_images
from .settings import Settings, make_settings
from .sources import ImageSource, StatisticsSource, resolve
from .statistics import check_suffix, save_statistics


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
            a pair of it and the classes (N,) of a sample whose class proportions were fixed, which the correction and
            the interval must know. ``real`` may be None for metrics that need no reference.
        metrics: names in `measure.METRICS`: fid, kid, prdc, is, cmmd, clip, appearance.
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
    wanted = make_settings({"metrics": metrics, "features": extractor.name if extractor else features, **settings})
    used, warnings = wanted.complete()
    processes = _processes(used, extractor, together)
    sides = {"fake": fake} | ({} if real is None else {"real": real})
    plan = processes.agree(lambda: make_plan(sides, extractor, used, processes.device))
    channels = 3 if used.resize else max(space.channels for space in plan.extractors)
    options = {"channels": channels, "splits": used.splits, "interval": used.interval, "progress": progress}
    read = {
        key: collect(source, plan.needs[key], processes, **options)
        for key, source in plan.sources.items()
        if isinstance(source, ImageSource) and plan.needs[key]
    }

    def report() -> Report | None:
        return _report(plan, read, used, processes) if processes.rank == 0 else None

    found = processes.agree(report)
    if processes.world > 1:
        found = report_of(processes.gather_json(found and found.to_dict())[0])
    images, seconds = sum(len(r.pixels) for r in read.values()), sum(r.seconds for r in read.values())
    typed = {key: str(side) if isinstance(side, str | Path) else None for key, side in sides.items()}
    return replace(
        found,
        settings={"fake": None, "real": None} | typed | wanted.to_dict(),
        warnings=list(dict.fromkeys([*warnings, *found.warnings])),
        run=_run_facts(*started, images, seconds),
        samples={key: r.shown for key, r in read.items()},
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
        The `Moments` that were written; in other processes than the first those of their share.

    Raises:
        UsageError, DataError, MissingWeightsError, NumericalError: as `evaluate_images`.
    """
    check_suffix(path)
    extractor = features if isinstance(features, FeatureExtractor) else None
    used, _ = make_settings({"features": extractor.name if extractor else features, **settings}).complete()
    processes = _processes(used, extractor, together)

    def prepare() -> tuple[ImageSource, FeatureExtractor]:
        side = resolve(source, used.generation(), used.reading())
        if isinstance(side, StatisticsSource):
            raise UsageError(f"{side.name} is a statistics file already.")
        space = extractor or open_extractor(used, {"source": side}, processes.device)
        return side, space

    side, space = processes.agree(prepare)
    needs = {space: {MOMENTS, VECTORS} if vectors else {MOMENTS}}
    channels = 3 if used.resize else None
    read = collect(side, needs, processes, channels=channels, interval=False, progress=progress)
    found = read.sides[space]
    moments = found.moments.total()

    def save() -> None:
        if processes.rank == 0:
            kept = {"vectors": found.vectors, "labels": found.labels} if vectors else {}
            save_statistics(path, moments, space.identity(), read.details, library_versions(PACKAGES), **kept)

    processes.agree(save)
    return moments


def _processes(used: Settings, extractor: FeatureExtractor | None, together: bool) -> Processes:
    """Where to compute; an extractor that was handed over is used as it is, where it is."""
    if extractor is None:
        return Processes(used.device, together)
    for name in ("weights", "filter", "preset", "dtype", "compile", "device", "verify"):
        if getattr(used, name) != getattr(Settings, name):
            raise UsageError(
                f"{name} belongs to features that are named; an extractor is used as it was made and prepared."
            )
    return Processes(str(extractor.device), together)


def _report(plan: Plan, read: dict[str, Collection], used: Settings, processes: Processes) -> Report:
    """Measure what was read; settings and facts of the run are added by the caller."""
    sides, details = {}, {}
    for key, source in plan.sources.items():
        if key in read:
            sides[key], details[key] = read[key].sides, read[key].details
        elif isinstance(source, StatisticsSource) and plan.needs[key]:
            (space,) = plan.needs[key]
            side, details[key] = side_from_statistics(source, space)
            sides[key] = {space: side}
    for key, captions in plan.captions.items():
        side = sides[key][plan.spaces["clip"]]
        side.captions = [captions[position] for position in side.positions]
    results = []
    for metric in plan.metrics:
        pair = (sides.get(key, {}).get(plan.spaces[metric.name]) for key in ("fake", "real"))
        results += metric.measure(*pair, used)
    pixels = [read[key].pixels for key in ("fake", "real") if key in read]
    common = sum((Counter(pixels[0]) & Counter(pixels[1])).values()) if len(pixels) == 2 else 0
    same = same_images(details) or (len(pixels) == 2 and common == len(pixels[0]) == len(pixels[1]))
    if same:  # an interval assumes two independent samples
        apart = {"bias_corrected": None, "ci95": None, "method": None}
        results = [
            replace(r, **apart) if None not in (r.n_fake, r.n_real) and r.deviation is None else r for r in results
        ]
    notes = [note for found in sides.values() for side in found.values() for note in side.notes]
    return Report(
        results,
        [space.identity() for space in plan.extractors],
        details["fake"],
        details.get("real"),
        warnings=[*plan.warnings, *notes, *cautions(results, details, plan.extractors, used, common, same)],
        environment={
            "device": str(processes.device),
            "processes": processes.world,
            "deterministic": processes.device.type == "cpu" and not used.compile,
            "versions": library_versions(PACKAGES),
        },
    )


def _run_facts(clock: float, started: str, images: int, seconds: float) -> dict:
    cuda = {"peak_cuda_mib": torch.cuda.max_memory_allocated() >> 20} if torch.cuda.is_available() else {}
    return {
        "command": sys.argv,
        "started": started,
        "wall_s": round(time.perf_counter() - clock, 3),
        "images_per_second": round(images / seconds, 1) if seconds else None,
        "peak_rss_mib": _peak_mib(),
        **cuda,
    }


def _peak_mib() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))
