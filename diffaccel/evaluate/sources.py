"""What can stand on either side of a comparison: image folders, statistics files, datasets, models, tensors."""

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import torch

from ..core.errors import DataError, UsageError
from ..core.images import EXTENSIONS, ImageFiles, find_images, read_images
from ..models.data import load_digits

DATASETS = {"digits": ("train", "heldout", "all")}
DEFAULT_NUM = 2000
LABELS_FILE = "dataset.json"

Batch = tuple[torch.Tensor, torch.Tensor | None]  # images and, where classes are known, labels


@dataclass(frozen=True)
class Generation:
    """How images of a model are drawn; ignored by sides that hold images already."""

    num: int = DEFAULT_NUM
    steps: int | None = None
    sampler: str | None = None
    seed: int = 0
    batch_size: int = 256


@dataclass
class ImageSource:
    """Images of one size as a stream.

    Attributes:
        kind: "folder", "dataset", "model" or "tensor".
        name: what the user typed, or what identifies it.
        shape: (C, H, W) as stored.
        details: JSON-able description; complete (count, digest) after one iteration over `batches`.
    """

    kind: str
    name: str
    shape: tuple[int, int, int]
    details: dict = field(default_factory=dict)

    def batches(self, channels: int, batch_size: int) -> Iterator[Batch]:
        """Yield uint8 (n, channels, H, W) in a fixed order, with labels (n,) or None.

        Raises:
            DataError: unusable files, or fewer than two images.
        """
        count = 0
        for images, labels in self._batches(channels, batch_size):
            count += len(images)
            yield images, labels
        if count < 2:
            raise DataError(
                f"{self.name} has {count} usable image(s); a distance between sets needs at least 2 on a side."
            )

    def _batches(self, channels: int, batch_size: int) -> Iterator[Batch]:
        raise NotImplementedError


@dataclass
class StatisticsSource:
    """A statistics file; read by `statistics.load_statistics`."""

    path: Path
    kind: str = "statistics"

    @property
    def name(self) -> str:
        return str(self.path)


class FolderSource(ImageSource):
    """An image folder, read with the policy of `core.images`."""

    def __init__(self, folder: Path, skip_bad: bool):
        self._folder, self._skip_bad = folder, skip_bad
        self._paths = find_images(folder)
        if not self._paths:
            raise DataError(f"{folder} contains no image files ({' '.join(EXTENSIONS)}).")
        super().__init__("folder", str(folder), self._stored_shape())
        self._labels = _read_labels(folder)

    def _stored_shape(self) -> tuple[int, int, int]:
        if not self._skip_bad:
            try:
                return tuple(read_images(self._paths[:1]).shape[1:])
            except DataError:  # let the strict reader name all offenders, not only the first
                list(ImageFiles(self._paths, root=self._folder))
        return tuple(next(iter(ImageFiles(self._paths, skip_bad=True, root=self._folder))).shape)

    def _batches(self, channels, batch_size):
        files = ImageFiles(self._paths, channels, skip_bad=self._skip_bad, root=self._folder)
        names = (path.relative_to(self._folder).as_posix() for path in self._paths)
        labels = torch.tensor([self._labels.get(name, -1) for name in names])
        known = len(labels) > 0 and bool((labels >= 0).all()) and not self._skip_bad
        start = 0
        for images in _stacked(files, batch_size):
            yield images, labels[start : start + len(images)] if known else None
            start += len(images)
        self.details = {
            "count": files.count,
            "digest": files.digest,
            "first": files.first,
            "formats": dict(sorted(files.formats.items())),
            "skipped": [{"name": name, "reason": reason} for name, reason in files.skipped],
        }


class TensorSource(ImageSource):
    """Images in memory: a split of a bundled dataset, or tensors handed over in Python."""

    def __init__(self, kind: str, name: str, images: torch.Tensor, labels: torch.Tensor | None = None):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
            got = f"{images.dtype} of shape {tuple(images.shape)}"
            raise DataError(f"{name} must be uint8 (N, C, H, W) with N ≥ 1 and 1 or 3 channels, got {got}.")
        if labels is not None and labels.shape != images.shape[:1]:
            raise DataError(f"{name}: {len(images)} images need as many labels, got shape {tuple(labels.shape)}.")
        super().__init__(kind, name, tuple(images.shape[1:]))
        self._images, self._labels = images, labels

    def _batches(self, channels, batch_size):
        parts = self._images.split(batch_size)
        labels = repeat(None) if self._labels is None else self._labels.split(batch_size)
        yield from self._digested(zip(parts, labels, strict=False), channels)

    def _digested(self, batches: Iterable[Batch], channels: int, **details) -> Iterator[Batch]:
        """Pass batches on in the wanted number of channels, keeping count, classes and digest of the pixels."""
        digest, count, classes = hashlib.sha256(repr(self.shape).encode()), 0, set()
        for images, labels in batches:
            digest.update(images.cpu().contiguous().numpy().tobytes())
            count += len(images)
            classes.update([] if labels is None else labels.tolist())
            yield _with_channels(images, channels), labels
        self.details = {"count": count, "classes": len(classes), "digest": digest.hexdigest(), **details}


class ModelSource(TensorSource):
    """Images generated by a model; the noise is keyed by the sample index, so the batch size does not matter."""

    def __init__(self, name: str, model: str, generation: Generation):
        from ..models.teachers import load_pipeline

        if generation.num < 1 or generation.batch_size < 1:
            raise UsageError("The number of images and the batch size must be at least 1.")
        self._pipeline, self._generation = load_pipeline(model), generation
        super().__init__("model", name, *next(self._generate(1)))

    def _generate(self, num: int) -> Iterator[Batch]:
        from ..generation import generate

        wanted = self._generation
        settings = {
            "steps": wanted.steps,
            "sampler": wanted.sampler,
            "seed": wanted.seed,
            "batch_size": wanted.batch_size,
        }
        yield from generate(self._pipeline, num, **settings)

    def _batches(self, channels, batch_size):
        wanted = self._generation
        settings = {"seed": wanted.seed, "steps": wanted.steps, "sampler": wanted.sampler}
        yield from self._digested(self._generate(wanted.num), channels, **settings)


def resolve(side, generation: Generation | None = None, skip_bad: bool = False) -> ImageSource | StatisticsSource:
    """Find out what a side is.

    Args:
        side: uint8 tensor (N, C, H, W), or a pair of it and labels (N,); or a string or path: an image folder; an
            ``.npz`` statistics file; a dataset (``digits``, ``digits:heldout``); a folder with model_index.json; a
            teacher name, where ``model:digits`` means the teacher and a bare ``digits`` the dataset. Existing paths
            come first.
        generation: number of images, sampler, steps and seed for models.
        skip_bad: leave unusable files of a folder out and list them, instead of refusing the folder.

    Raises:
        DataError: nothing of that name, an empty folder, unusable images.
    """
    generation = generation or Generation()
    if isinstance(side, torch.Tensor):
        return TensorSource("tensor", "the tensor", side)
    if isinstance(side, tuple):
        return TensorSource("tensor", "the tensor", *side)
    text = str(side)
    dataset, _, split = text.partition(":")
    if dataset in DATASETS and not Path(text).exists():
        return _dataset(text, dataset, split)
    if text.startswith("model:"):
        return ModelSource(text, text.removeprefix("model:"), generation)
    path = Path(text).expanduser()
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return ModelSource(text, str(path), generation)
        return FolderSource(path, skip_bad)
    if path.is_file():
        return _file(path)
    if text in _teachers():
        return ModelSource(text, text, generation)
    raise DataError(_not_found(text))


def _read_labels(folder: Path) -> dict[str, int]:
    """Classes by file name from dataset.json, in the form of EDM and StyleGAN: {"labels": [["000000.png", 3], …]}."""
    file = folder / LABELS_FILE
    if not file.is_file():
        return {}
    try:
        return {str(name): int(label) for name, label in json.loads(file.read_text())["labels"] or []}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a list of labels: {error}.") from None


def _dataset(text: str, dataset: str, split: str) -> TensorSource:
    if (split or "train") not in DATASETS[dataset]:
        raise DataError(f"Dataset {dataset} has no split {split!r}; it has {', '.join(DATASETS[dataset])}.")
    return TensorSource("dataset", text if split else f"{text}:train", *load_digits(split or "train"))


def _file(path: Path) -> StatisticsSource:
    if path.suffix.lower() == ".npz":
        return StatisticsSource(path)
    if path.suffix.lower() in EXTENSIONS:
        raise DataError(f"{path} is a single image; a distance between sets needs a folder of at least 2.")
    raise DataError(f"{path} is neither a folder of images nor an .npz statistics file (other formats are not opened).")


def _teachers() -> list[str]:
    from ..models.teachers import TEACHERS

    return list(TEACHERS)


def _not_found(text: str) -> str:
    names = [*DATASETS, *(f"{name}:{split}" for name, splits in DATASETS.items() for split in splits)]
    names += [teacher if teacher not in DATASETS else f"model:{teacher}" for teacher in _teachers()]
    parent = Path(text).expanduser().parent
    beside = [str(entry) for entry in parent.iterdir() if not entry.name.startswith(".")] if parent.is_dir() else []
    close = difflib.get_close_matches(text, [*names, *beside], n=1, cutoff=0.6)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{text} does not exist: no folder, .npz file, dataset or model.{hint} Names: {', '.join(names)}."


def _stacked(images: Iterable[torch.Tensor], batch_size: int) -> Iterator[torch.Tensor]:
    batch: list[torch.Tensor] = []
    for image in images:
        batch.append(image)
        if len(batch) == batch_size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def _with_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Grey → RGB by repetition, RGB → grey by the same ITU-R 601 weights and rounding as Pillow."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    red, green, blue = images.to(torch.int64).unbind(dim=1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)[:, None]
