"""The metrics: what each needs of the two sides, and how its numbers are read off."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..core.errors import DataError
from .collect import CAPTIONS, CLASSES, MOMENTS, VECTORS, Side
from .jackknife import Estimate
from .metrics.frechet import Gaussian, fd_infinity, frechet_estimate
from .metrics.kernel import cmmd, kid, kid_subsets
from .metrics.neighbours import prdc
from .metrics.scores import clip_score
from .report import Measurement
from .settings import Settings


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: on the command line.
        summary: one line.
        paper: source.
        needs: what has to be collected of a side.
        measure: (fake, real, settings) → `Measurement`s; real is None where `reference` is false.
        reference: whether it compares with real images.
        clip: whether it lives in the CLIP space, whatever the features are.
    """

    name: str
    summary: str
    paper: str
    needs: frozenset[str]
    measure: Callable[[Side, Side | None, Settings], Iterator[Measurement]]
    reference: bool = True
    clip: bool = False


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
        limit = fd_infinity(_vectors(fake), whole, seed=settings.seed, labels=fake.labels, interval=settings.interval)
        yield _read("FD∞", limit, fake, real)


def _kid(fake: Side, real: Side, settings: Settings) -> Iterator[Measurement]:
    vectors = _vectors(fake), _vectors(real)
    yield _read("KID", kid(*vectors, fake.groups, real.groups, _fixed_mix(fake, real)), fake, real)
    if settings.kid_subsets is not None:
        size = settings.kid_subset_size or 1000
        if size > min(map(len, vectors)):
            raise DataError(f"KID subsets of {size} images need as many on both sides; lower --kid-subset-size.")
        mean, deviation = kid_subsets(*vectors, settings.kid_subsets, size, settings.seed)
        method = f"deviation of {settings.kid_subsets} subsets of {size}, not a confidence interval"
        yield _read("KID subsets", Estimate(mean, method=method), fake, real, deviation=deviation)


def _prdc(fake: Side, real: Side, settings: Settings) -> Iterator[Measurement]:
    for kind, estimate in prdc(_vectors(fake), _vectors(real), settings.k or 5).items():
        yield _read(kind, estimate, fake, real, better="higher")


def _inception_score(fake: Side, real: Side | None, settings: Settings) -> Iterator[Measurement]:
    for kind, side in (("IS", fake), ("IS of real images", real)):
        if side is None:
            continue
        if side.scores is None:
            raise DataError(f"{side.name} holds statistics; the Inception Score needs images.")
        mean, deviation = side.scores.compute()
        method = f"deviation of {settings.splits or 10} parts, not a confidence interval"
        sides = (side, None) if side is fake else (None, side)
        yield _read(kind, Estimate(mean, method=method), *sides, better="higher", deviation=deviation)


def _cmmd(fake: Side, real: Side, settings: Settings) -> Iterator[Measurement]:
    vectors = _vectors(fake), _vectors(real)
    yield _read("CMMD", cmmd(*vectors, fake.groups, real.groups, _fixed_mix(fake, real)), fake, real)


def _clip(fake: Side, real: Side | None, settings: Settings) -> Iterator[Measurement]:
    texts, truncated = fake.extractor.embed_texts(fake.captions)
    if truncated:
        fake.notes.append(f"{truncated} caption(s) are longer than CLIP reads; their ends were ignored")
    yield _read("CLIPScore", clip_score(_vectors(fake), texts), fake, None, better="higher")


def _fixed_mix(*sides: Side) -> bool:
    return any(side.labels is not None for side in sides)


def _vectors(side: Side):
    if side.vectors is None:
        raise DataError(
            f"{side.name} holds mean and covariance only; this metric needs the features of the images: give the images, "
            "or make the file with `diffaccel evaluate stats --vectors`."
        )
    return side.vectors


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
            reference=False,
        ),
        Metric(
            "cmmd",
            "Gaussian-kernel distance of CLIP embeddings; for few images",
            "Jayasumana et al. 2024",
            frozenset({VECTORS}),
            _cmmd,
            clip=True,
        ),
        Metric(
            "clip",
            "CLIP score of images and their captions; no real side needed",
            "Hessel et al. 2021",
            frozenset({VECTORS, CAPTIONS}),
            _clip,
            reference=False,
            clip=True,
        ),
    )
}
