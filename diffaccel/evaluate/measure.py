"""The metrics: what each needs of the two sides, and how its numbers are read off."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .collect import CAPTIONS, CLASSES, MOMENTS, VECTORS, Side
from .features.appearance import AppearanceFeatures
from .jackknife import Estimate, normal_interval
from .metrics.checks import checked
from .metrics.frechet import Gaussian, fd_infinity, frechet_estimate
from .metrics.kernel import cmmd, kid, kid_subsets
from .metrics.neighbours import prdc
from .metrics.scores import clip_score
from .report import Measurement
from .settings import Settings

NEEDED, WELCOME, UNUSED = "needed", "welcome", "unused"
MAIN, CLIP, PIXELS = "main", "clip", "pixels"


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: on the command line.
        summary: one line.
        paper: source.
        needs: what has to be collected of a side.
        measure: (fake, real, settings) → `Measurement`s; real may be None where it is not needed.
        real: NEEDED where it compares with real images, WELCOME where it is also computed of them, else UNUSED.
        space: MAIN where it lives in the space of the features, whatever these are; CLIP, or PIXELS without a network.
    """

    name: str
    summary: str
    paper: str
    needs: frozenset[str]
    measure: Callable[[Side, Side | None, Settings], Iterator[Measurement]]
    real: str = NEEDED
    space: str = MAIN


def _read(
    kind: str, estimate: Estimate, fake: Side | None, real: Side | None, better: str = "lower", deviation=None
) -> Measurement:
    extractor = (fake or real).extractor
    counts = {"n_fake": fake and fake.count, "n_real": real and real.count}
    return Measurement(
        f"{kind}-{extractor.name}",
        estimate.value,
        estimate.bias_corrected,
        estimate.ci95,
        estimate.method,
        better=better,
        deviation=deviation,
        **counts,
    )


def _fid(fake: Side, real: Side, settings: Settings) -> Iterator[Measurement]:
    yield _read("FD", frechet_estimate(fake.moments, real.moments, interval=settings.interval), fake, real)
    if settings.fd_infinity:
        whole = real.moments if isinstance(real.moments, Gaussian) else real.moments.total().gaussian()
        limit = fd_infinity(fake.vectors, whole, seed=settings.seed, labels=fake.labels, interval=settings.interval)
        yield _read("FD∞", limit, fake, real)


def _kid(fake: Side, real: Side, settings: Settings) -> Iterator[Measurement]:
    yield _read("KID", kid(fake.vectors, real.vectors, fake.groups, real.groups, _fixed_mix(fake, real)), fake, real)
    if settings.kid_subsets:
        size = min(settings.kid_subset_size, len(fake.vectors), len(real.vectors))
        mean, deviation = kid_subsets(fake.vectors, real.vectors, settings.kid_subsets, size, settings.seed)
        method = f"deviation of {settings.kid_subsets} subsets of {size}, not a confidence interval"
        yield _read("KID subsets", Estimate(mean, method=method), fake, real, deviation=deviation)


def _prdc(fake: Side, real: Side, settings: Settings) -> Iterator[Measurement]:
    for kind, estimate in prdc(fake.vectors, real.vectors, settings.k).items():
        yield _read(kind, estimate, fake, real, better="higher")


def _inception_score(fake: Side, real: Side | None, settings: Settings) -> Iterator[Measurement]:
    for label, side, pair in _each("IS", fake, real):
        mean, deviation = side.scores.compute()
        parts = int((side.scores.counts > 0).sum())
        method = f"deviation of {parts} parts, not a confidence interval"
        yield _read(label, Estimate(mean, method=method), *pair, better="higher", deviation=deviation)


def _cmmd(fake: Side, real: Side, settings: Settings) -> Iterator[Measurement]:
    yield _read("CMMD", cmmd(fake.vectors, real.vectors, fake.groups, real.groups, _fixed_mix(fake, real)), fake, real)


def _clip(fake: Side, real: Side | None, settings: Settings) -> Iterator[Measurement]:
    for label, side, pair in _each("CLIPScore", fake, real):
        if side.captions is not None:
            texts, truncated = side.extractor.embed_texts(side.captions)
            if truncated:
                side.notes.append(f"{truncated} caption(s) are longer than CLIP reads; their ends were ignored")
            yield _read(label, clip_score(side.vectors, texts.to(side.vectors.device)), *pair, better="higher")


def _appearance(fake: Side, real: Side | None, settings: Settings) -> Iterator[Measurement]:
    for index, kind in enumerate(AppearanceFeatures.KINDS):
        for label, side, pair in _each(kind, fake, real):
            yield _read(label, normal_interval(checked(side.vectors)[:, index]), *pair, better="closer")


def _each(kind: str, fake: Side, real: Side | None) -> Iterator[tuple[str, Side, tuple[Side | None, Side | None]]]:
    """Label, side and its place in the pair, for a number that every side has by itself."""
    yield kind, fake, (fake, None)
    if real is not None:
        yield f"{kind} of real images", real, (None, real)


def _fixed_mix(*sides: Side) -> bool:
    return any(side.labels is not None for side in sides)


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "fid",
            "Fréchet distance of features, with a jackknife interval",
            "Heusel et al. 2017",
            frozenset({MOMENTS}),
            _fid,
        ),
        Metric(
            "kid",
            "unbiased polynomial-kernel distance; for few images",
            "Bińkowski et al. 2018",
            frozenset({VECTORS}),
            _kid,
        ),
        Metric(
            "prdc",
            "precision, recall, density, coverage by nearest neighbours",
            "Kynkäänniemi et al. 2019; Naeem et al. 2020",
            frozenset({VECTORS}),
            _prdc,
        ),
        Metric(
            "is",
            "Inception Score: how sure and how varied a classifier is; no real side needed",
            "Salimans et al. 2016",
            frozenset({CLASSES}),
            _inception_score,
            real=WELCOME,
        ),
        Metric(
            "cmmd",
            "Gaussian-kernel distance of CLIP embeddings; for few images",
            "Jayasumana et al. 2024",
            frozenset({VECTORS}),
            _cmmd,
            space=CLIP,
        ),
        Metric(
            "clip",
            "CLIP score of images and their captions; no real side needed",
            "Hessel et al. 2021",
            frozenset({VECTORS, CAPTIONS}),
            _clip,
            real=WELCOME,
            space=CLIP,
        ),
        Metric(
            "appearance",
            "saturation, contrast and clipped values, to lie beside those of real images; no network",
            "Peli 1990; Sadat et al. 2025",
            frozenset({VECTORS}),
            _appearance,
            real=WELCOME,
            space=PIXELS,
        ),
    )
}
