"""What an evaluation will need, and whatever can be refused before an image is read."""

import hashlib
from dataclasses import dataclass, field
from itertools import product

import torch

from ..core.errors import DataError, UsageError, unknown
from .collect import CAPTIONS, CLASSES, VECTORS, Side
from .features import FEATURES, FeatureExtractor, features_for, get_features
from .features.appearance import AppearanceFeatures
from .groups import assign_groups
from .measure import CLIP, MAIN, METRICS, NEEDED, PIXELS, UNUSED, Metric
from .moments import GroupedMoments
from .settings import Settings
from .sources import ImageSource, ModelSource, StatisticsSource, resolve
from .statistics import check_features

_DRAWING = ("num", "steps", "sampler", "batch_size", "guidance_scale", "prompts")  # settings of models only


@dataclass
class Plan:
    """Sides, extractors and what is to be collected.

    Attributes:
        metrics: in the order they were asked for.
        spaces: extractor of each metric, by its name.
        sources: the sides by "fake" and "real".
        needs: per side and extractor what to collect; what is not needed is not there.
        captions: of the sides whose captions are needed, one per position.
        warnings: what came up.
    """

    metrics: list[Metric]
    spaces: dict[str, FeatureExtractor]
    sources: dict[str, ImageSource | StatisticsSource]
    needs: dict[str, dict[FeatureExtractor, set[str]]]
    captions: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def extractors(self) -> list[FeatureExtractor]:
        """All extractors, each once, in the same order in every process."""
        return list(dict.fromkeys(self.spaces.values()))


def make_plan(sides: dict, extractor: FeatureExtractor | None, used: Settings, device) -> Plan:
    """Find out what the sides are, open the extractors and check that they fit together.

    Args:
        sides: "fake", and "real" if there is one: anything that `sources.resolve` takes.
        extractor: for the metrics that do not have one of their own; None for what the settings name.
        used: settings with the preset and all defaults filled in.
        device: where extractors that are opened here compute.

    Raises:
        UsageError, DataError, MissingWeightsError: see `run.evaluate_images`.
    """
    metrics = _metrics(used.metrics, "real" in sides)
    sources = {key: resolve(side, used.generation(), used.reading()) for key, side in sides.items()}
    without_images = [m.name for m in metrics if m.space == PIXELS and isinstance(sources["fake"], StatisticsSource)]
    if 0 < len(without_images) < len(metrics):  # one of several, as in `evaluate all`: the others go on
        metrics = [metric for metric in metrics if metric.name not in without_images]
    else:
        without_images = []
    spaces = _spaces(metrics, extractor, used, sources, device)
    plan = Plan(metrics, spaces, sources, {key: {} for key in sources})
    plan.warnings += [f"{name} is left out: {sources['fake'].name} holds no images" for name in without_images]
    for metric, key in product(metrics, sources):
        if key == "fake" or metric.real != UNUSED:
            _add_needs(plan, metric, key, used)
    _check_sizes(plan)
    _check_counts(plan, used)
    if not any(isinstance(source, ModelSource) for source in sources.values()):
        given = [name for name in _DRAWING if getattr(used, name) != getattr(Settings, name)]
        plan.warnings += [f"{name.replace('_', '-')} has no effect: no side is a model" for name in given]
    return plan


def open_extractor(used: Settings, sources: dict, device) -> FeatureExtractor:
    """The extractor that the settings name, or the one that fits the sides, ready to compute on the device.

    Raises:
        UsageError, DataError, MissingWeightsError: see `features.get_features`; statistics of unnamed features.
    """
    options = {"weights": used.weights, "resize": used.filter, "verify": None if used.verify else False}
    if used.features == "auto":
        name = fitting_features(sources)
        given = {"weights": used.weights, "filter": used.filter}
        for option in (key for key, value in given.items() if value is not None):
            if {"filter": "resize"}.get(option, option) not in FEATURES[name].options:
                raise UsageError(f"--{option} belongs to other features than {name}; name them with --features.")
    else:
        name = used.features
    taken = FEATURES[name].options if name in FEATURES else ()
    if used.download and "download" in taken:
        options["download"] = True
    return get_features(name, **options).prepare(device, used.dtype, used.compile)


def side_from_statistics(source: StatisticsSource, extractor: FeatureExtractor) -> tuple[Side, dict]:
    """A statistics file as a side of the space it was made in, and its description."""
    statistics = source.statistics
    side = Side(source.name, statistics.count, extractor, statistics.gaussian, statistics.vectors)
    if side.vectors is not None:
        side.labels = statistics.labels
        side.groups = assign_groups(statistics.labels, len(side.vectors))
        side.moments = GroupedMoments(extractor.num_features).update(side.vectors, side.groups)
    details = {"kind": source.kind, "name": source.name, "count": statistics.count}
    details |= {"vectors": side.vectors is not None, "source": statistics.header.get("source")}
    if details["source"] is None:
        numbers = torch.cat([statistics.gaussian.mu, statistics.gaussian.sigma.flatten()]).numpy()
        details["digest"] = hashlib.sha256(numbers.tobytes()).hexdigest()
    return side, details


def _metrics(names: tuple[str, ...], real: bool) -> list[Metric]:
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
        if METRICS[name].real == NEEDED and not real:
            raise UsageError(f"{name} compares with real images; give a second side.")
    return [METRICS[name] for name in dict.fromkeys(names)]


def _spaces(metrics: list[Metric], extractor, used: Settings, sources: dict, device) -> dict[str, FeatureExtractor]:
    wanted = {metric.space for metric in metrics}
    opened = {MAIN: extractor, PIXELS: AppearanceFeatures()}
    if extractor is None and (MAIN in wanted or (CLIP in wanted and used.features == "clip")):
        opened[MAIN] = open_extractor(used, sources, device)
    if CLIP in wanted:
        main, options = opened[MAIN], {"weights": used.clip_weights, "download": used.download or None}
        same = main is not None and main.name == "clip"
        opened[CLIP] = main if same else get_features("clip", **options).prepare(device, used.dtype, used.compile)
    return {metric.name: opened[metric.space] for metric in metrics}


def fitting_features(sources: dict) -> str:
    """Name of the extractor that suits the sides: what statistics were made with, else by the size of the images.

    Raises:
        UsageError: statistics of unnamed features.
        DataError: statistics of a class of somebody's own.
    """
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
        return recorded
    belonging = {source.features for source in sources.values() if isinstance(source, ImageSource)} - {None}
    if len(belonging) == 1:
        return belonging.pop()
    shapes = {tuple(source.shape) for source in sources.values()}
    return features_for(shapes.pop()) if len(shapes) == 1 else "random-conv"


def _add_needs(plan: Plan, metric: Metric, key: str, used: Settings) -> None:
    source, space = plan.sources[key], plan.spaces[metric.name]
    wanted = set(metric.needs)
    if metric.name == "fid" and used.fd_infinity and key == "fake":
        wanted.add(VECTORS)
    if CLASSES in wanted:
        space.logits(torch.zeros(0, space.num_features, device=space.device))  # refuses features without classes
    if isinstance(source, StatisticsSource):
        if metric.real != NEEDED and key == "real":
            plan.warnings.append(
                f"{metric.name}: {source.name} holds no images, so there is no number of the real side to compare with"
            )
            return
        _check_statistics(plan, metric, source, wanted)
    if CAPTIONS in wanted and key == "fake":
        plan.captions[key] = source.captions(used.captions)
        space.embed_texts(plan.captions[key][:1])  # an unusable tokenizer is found now, not after the images
    elif CAPTIONS in wanted:
        try:
            plan.captions[key] = source.captions(None)
        except DataError:
            plan.warnings.append(
                "the real images have no captions, so there is no CLIP score of theirs to compare with"
            )
            return
    plan.needs[key].setdefault(space, set()).update(wanted - {CAPTIONS})


def _check_statistics(plan: Plan, metric: Metric, source: StatisticsSource, wanted: set[str]) -> None:
    space, statistics = plan.spaces[metric.name], source.statistics
    if wanted & {CLASSES, CAPTIONS} or metric.space == PIXELS:
        raise DataError(
            f"{source.name} holds statistics; {metric.name} needs images: leave it out of the metrics, or "
            "give the images."
        )
    identity = space.identity()
    check_features(source.path, statistics, identity)
    if VECTORS in wanted and statistics.vectors is None:
        raise DataError(
            f"{source.name} holds mean and covariance only; {metric.name} needs the features of the images: give the "
            "images, or make the file with `diffaccel evaluate stats --vectors`."
        )
    if statistics.features is None:
        made = f"{identity['name']} ({identity['preprocessing']})"
        plan.warnings.append(f"{source.name} does not record its features; taken on trust to be {made}")
    elif (other := statistics.features.get("dtype", "float32")) != identity["dtype"]:
        plan.warnings.append(f"{source.name} was computed in {other}, the images are in {identity['dtype']}")


def _check_sizes(plan: Plan) -> None:
    """Both sides must enter the extractors in the same size, unless all of these bring images to a size of their own."""
    entering = {key: entering_size(source) for key, source in plan.sources.items()}
    if len(entering) < 2 or None in entering.values() or entering["fake"] == entering["real"]:
        return
    if all(space.resizes for space in plan.extractors) and not any(map(_was_resized, plan.sources.values())):
        return
    fake, real = ("×".join(map(str, entering[key])) for key in ("fake", "real"))
    raise DataError(
        f"The fake images are {fake} and the real ones {real} (height×width); bring both to one size with --resize."
    )


def entering_size(source) -> tuple[int, int] | None:
    """(height, width) of the first image of a side; None for statistics that do not tell."""
    if isinstance(source, ImageSource):
        return tuple(source.shape[1:])
    shape = (source.statistics.header.get("source") or {}).get("shape")
    return tuple(shape[1:]) if isinstance(shape, list) and len(shape) == 3 else None


def _was_resized(source) -> bool:
    if isinstance(source, ImageSource):
        return source.resize is not None
    return bool((source.statistics.header.get("source") or {}).get("resized"))


def _check_counts(plan: Plan, used: Settings) -> None:
    """Numbers of images that are too small whatever the files hold; unusable files may lower them further."""
    counts = {}
    for key, source in plan.sources.items():
        count = source.count if isinstance(source, ImageSource) else source.statistics.count
        counts |= {} if count is None else {key: count}
    names = {metric.name for metric in plan.metrics}
    for key, count in counts.items():
        if "prdc" in names and used.k >= count:
            raise DataError(f"The {used.k} nearest neighbours need more images than the {count} {key} ones; lower --k.")
        if "kid" in names and used.kid_subsets and count < used.kid_subset_size:
            plan.warnings.append(
                f"KID subsets have {count} images, not {used.kid_subset_size}: there are no more {key} ones"
            )
    if "fid" in names and used.fd_infinity and counts.get("fake", 20) < 20:
        raise DataError(f"The extrapolation of the distance needs 20 fake images, got {counts['fake']}.")
