"""How an evaluation is made: everything but its two sides."""

from dataclasses import asdict, dataclass, fields, replace

from ..core.errors import UsageError, unknown
from .features.base import DTYPES
from .presets import get_preset
from .sources import DEFAULT_NUM, Generation, Reading


@dataclass(frozen=True)
class Settings:
    """Settings of `run.evaluate_images`; every field is a keyword there and an option of the command line.

    Attributes:
        metrics: names in `measure.METRICS`.
        features: registered extractor, "module:pkg.mod:Class", or "auto": what a statistics file was made with, else
            digits64 for 8×8 grey images, else random-conv with a note.
        weights: file, folder or hub name of the extractor's weights; for one that is not bundled.
        clip_weights: the same for the CLIP model of cmmd and clip.
        filter: resize filter of the inception features (`features.resize.FILTERS`).
        preset: name in `presets.PRESETS`; sets features, filter and the conventions below, where they are not given.
        download: allow weights to be fetched from the hub.
        verify: require that published weights are used.
        num, steps, sampler, seed, batch_size: how images of a model are drawn.
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
        object.__setattr__(self, "metrics", tuple(self.metrics))
        if not self.metrics:
            raise UsageError("Name at least one metric.")
        least = {"num": 2, "steps": 1, "batch_size": 1, "resize": 1, "workers": 0, "kid_subsets": 1}
        for name, low in (least | {"kid_subset_size": 2, "splits": 1, "k": 1}).items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"{name} must be at least {low}, got {value}.")
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)

    def with_preset(self) -> "Settings":
        """These settings with the conventions of the preset where nothing else was asked for.

        Raises:
            UsageError: unknown preset, or features that contradict it.
        """
        if self.preset is None:
            return self
        preset = get_preset(self.preset)
        if self.features not in ("auto", preset.features):
            raise UsageError(f"The preset {preset.name} is for {preset.features} features, not {self.features}.")
        wanted = {
            "filter": preset.resize,
            "kid_subsets": preset.kid_subsets,
            "kid_subset_size": preset.kid_subset_size,
            "splits": preset.is_splits,
            "k": preset.prdc_k,
        }
        unset = {key: value for key, value in wanted.items() if getattr(self, key) is None}
        return replace(self, features=preset.features, **unset)

    def generation(self) -> Generation:
        """How images of a model are drawn."""
        device = None if self.device == "auto" else self.device
        return Generation(self.num, self.steps, self.sampler, self.seed, self.batch_size, device)

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
