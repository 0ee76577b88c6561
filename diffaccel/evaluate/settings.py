"""How an evaluation is made: everything but its two sides."""

import os
from dataclasses import asdict, dataclass, fields, replace

import torch

from ..core.errors import UsageError, unknown
from .features.base import DTYPES
from .modelsource import DEFAULT_NUM, Generation
from .presets import get_preset
from .sources import Reading

_DEFAULTS = {"kid_subset_size": 1000, "splits": 10, "k": 5}
_LEAST = {"num": 2, "steps": 1, "batch_size": 1, "resize": 1, "workers": 0, "kid_subsets": 1, "kid_subset_size": 2}
_LEAST |= {"splits": 1, "k": 1}
_BELONGS = {
    ("fd_infinity", "interval"): ("fid",),
    ("kid_subsets", "kid_subset_size"): ("kid",),
    ("splits",): ("is",),
    ("k",): ("prdc",),
    ("captions",): ("clip",),
    ("clip_weights",): ("cmmd", "clip"),
}


@dataclass(frozen=True)
class Settings:
    """Settings of `run.evaluate_images`; every field is a keyword there and an option of the command line.

    Attributes:
        metrics: names in `measure.METRICS`.
        features: registered extractor, "module:pkg.mod:Class", or "auto": what a statistics file was made with, else
            digits64 or mnist64 for 8×8 or 28×28 grey images, else random-conv with a note.
        weights: file, folder or hub name of the extractor's weights; for one that is not bundled.
        clip_weights: the same for the CLIP model of cmmd and clip.
        filter: resize filter of the inception features (`features.resize.FILTERS`).
        preset: name in `presets.PRESETS`; sets features, filter and the conventions below, where they are not given.
        download: allow weights to be fetched from the hub.
        verify: require that published weights are used.
        num, steps, sampler, seed, batch_size: how images of a model are drawn.
        guidance_scale: of classifier-free guidance; None for what the pipeline does by itself (see `generation.generate`).
        prompts: what a text-to-image model draws in turn, see `prompts.load_prompts`; None for its own prompts.
        skip_bad: leave unusable image files out and list them in the report.
        resize: bring all images to this height and width first (Pillow, bicubic, antialiased, 8 bits).
        workers: processes that decode image files; None for as many as help (see `sources.Reading`).
        interval: compute uncertainties that need many distances (the jackknife of the Fréchet distance).
        fd_infinity: also extrapolate the Fréchet distance to infinitely many images.
        kid_subsets, kid_subset_size: also compute KID as mean and deviation over random subsets, as other tools do.
        splits: parts of the Inception Score.
        k: neighbours of precision, recall, density, coverage.
        captions: file with captions of the fake images; default: beside the images.
        device: "auto", "cpu", "cuda", …
        dtype: "float32", or "bfloat16" for faster and less exact features.
        compile: run extractors through torch.compile.
    """

    metrics: tuple[str, ...] = ("fid",)
    features: str = "auto"
    weights: str | None = None
    clip_weights: str | None = None
    filter: str | None = None
    preset: str | None = None
    download: bool = False
    verify: bool = True
    num: int = DEFAULT_NUM
    steps: int | None = None
    sampler: str | None = None
    seed: int = 0
    batch_size: int = 256
    guidance_scale: float | int | None = None
    prompts: str | None = None
    skip_bad: bool = False
    resize: int | None = None
    workers: int | None = None
    interval: bool = True
    fd_infinity: bool = False
    kid_subsets: int | None = None
    kid_subset_size: int | None = None
    splits: int | None = None
    k: int | None = None
    captions: str | None = None
    device: str = "auto"
    dtype: str = "float32"
    compile: bool = False

    def __post_init__(self):
        names = (self.metrics,) if isinstance(self.metrics, str) else tuple(self.metrics)
        object.__setattr__(self, "metrics", names)
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, os.PathLike | torch.device):
                value = str(value)
                object.__setattr__(self, entry.name, value)
            wrong = isinstance(value, bool) and entry.type is not bool
            if entry.name != "metrics" and (wrong or not isinstance(value, entry.type)):
                kind = getattr(entry.type, "__name__", entry.type)
                raise UsageError(f"{entry.name} must be of type {kind}, got {value!r}.")
        if not self.metrics:
            raise UsageError("Name at least one metric.")
        for name, low in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"{name} must be at least {low}, got {value}.")
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)

    def complete(self) -> tuple["Settings", list[str]]:
        """These settings with the conventions of the preset and the defaults where nothing was asked for; and warnings.

        Raises:
            UsageError: unknown preset, or features that contradict it.
        """
        wanted, warnings = dict(_DEFAULTS), self._without_effect()
        if self.preset is not None:
            preset = get_preset(self.preset)
            if self.features not in ("auto", preset.features):
                raise UsageError(f"The preset {preset.name} is for {preset.features} features, not {self.features}.")
            own = {
                "features": preset.features,
                "filter": preset.resize,
                "kid_subsets": preset.kid_subsets,
                "kid_subset_size": preset.kid_subset_size,
                "splits": preset.is_splits,
                "k": preset.prdc_k,
            }
            wanted |= {key: value for key, value in own.items() if value is not None}
        if self.kid_subset_size is not None:
            wanted.setdefault("kid_subsets", 100)
        unset = {key: value for key, value in wanted.items() if getattr(self, key) in (None, "auto")}
        return replace(self, **unset), warnings

    def _without_effect(self) -> list[str]:
        """Settings that were given for metrics that were not."""
        found = []
        for names, metrics in _BELONGS.items():
            for name in names:
                given = getattr(self, name) != getattr(Settings, name)
                if given and not set(metrics) & set(self.metrics):
                    found.append(f"{name.replace('_', '-')} has no effect without the metric {' or '.join(metrics)}")
        return found

    def generation(self) -> Generation:
        """How images of a model are drawn."""
        device = None if self.device == "auto" else self.device
        names = ("num", "steps", "sampler", "seed", "batch_size", "guidance_scale", "prompts")
        return Generation(device=device, **{name: getattr(self, name) for name in names})

    def reading(self) -> Reading:
        """How images are brought in."""
        return Reading(self.skip_bad, self.resize, self.workers)

    def to_dict(self) -> dict:
        """JSON-able content."""
        return asdict(self) | {"metrics": list(self.metrics)}


def make_settings(given: dict) -> Settings:
    """Settings from keywords.

    Raises:
        UsageError: an unknown keyword or a value out of range.
    """
    names = [entry.name for entry in fields(Settings)]
    for name in given:
        if name not in names:
            raise unknown("setting", name, names)
    return Settings(**given)
