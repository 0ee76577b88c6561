"""What can stand on either side of a comparison: image files, statistics files, datasets, models, tensors."""

import difflib
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..core.errors import DataError
from ..core.imagefiles import ImageBatch, ImageReader, check_records, open_container, summarise
from ..core.images import EXTENSIONS, resize_image
from ..models.data import load_digits
from .captions import find_captions, load_captions
from .statistics import Statistics, load_sample_batch, load_statistics

DATASETS = {"digits": ("train", "heldout", "all")}
DEFAULT_NUM = 2000
LABELS_FILE = "dataset.json"
_WORKERS_FROM = 1000  # files


@dataclass(frozen=True)
class Generation:
    """How images of a model are drawn; ignored by sides that hold images already."""

    num: int = DEFAULT_NUM
    steps: int | None = None
    sampler: str | None = None
    seed: int = 0
    batch_size: int = 256
    device: str | None = None


@dataclass(frozen=True)
class Reading:
    """How images are brought in: see `core.imagefiles.ImageReader`; workers None means one per spare CPU, up to 8."""

    skip_bad: bool = False
    resize: int | None = None
    workers: int | None = None

    def workers_for(self, count: int) -> int:
        """Decoding processes for so many files; starting them costs more than decoding a few hundred."""
        if multiprocessing.current_process().daemon:  # may not have children
            return 0
        if self.workers is not None:
            return self.workers
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of this job on this machine
        return min(cpus // beside - 1, 8) if count >= _WORKERS_FROM and cpus > beside else 0


class ImageSource:
    """Images as a stream.

    Attributes:
        kind: "folder", "zip", "dataset", "model" or "tensor".
        name: what the user typed, or what identifies it.
        shape: (C, H, W) of the first image.
        count: number of positions, usable or not.
        resize: side of the square that images were brought to, None for as they are.
        labels: (count,) classes of a sample with fixed class proportions; None where unknown or independent draws.
        records: by position, what was read (JSON-able): complete for this process after one iteration.
    """

    def __init__(self, kind: str, name: str, shape, count: int, labels: torch.Tensor | None, resize: int | None):
        self.kind, self.name, self.count, self.labels, self.resize = kind, name, count, labels, resize
        self.shape: tuple[int, int, int] = (shape[0], resize, resize) if resize else tuple(shape)
        self.records: dict[int, dict] = {}

    def batches(self, channels: int, batch_size: int, mixed: bool = False, shard=(0, 1)) -> Iterator[ImageBatch]:
        """Yield uint8 images in a fixed order.

        Args:
            channels: 1 or 3, what the extractor reads.
            batch_size: images per batch; a model's batches have the size it was asked to draw in.
            mixed: whether sizes may differ within the set.
            shard: (rank, world); block b of the batches belongs to process b % world.
        """
        raise NotImplementedError

    def check(self, records: dict[int, dict]) -> None:
        """Refuse what was read, from the records of all processes.

        Raises:
            DataError: unusable files, or fewer than two images.
        """
        usable = sum("reason" not in record for record in records.values())
        if usable < 2:
            raise DataError(f"{self.name} has {usable} usable image(s); a set needs at least 2.")

    def describe(self, records: dict[int, dict]) -> dict:
        """JSON-able description from the records of all processes."""
        digest = hashlib.sha256(repr(self.shape).encode())
        for position in sorted(records):
            digest.update(bytes.fromhex(records[position]["sha256"]))
        return {**self._head(), "count": len(records), "digest": digest.hexdigest()}

    def _head(self) -> dict:
        resized = {"resized": self.resize} if self.resize else {}
        classes = {} if self.labels is None else {"fixed_mix_of_classes": len(self.labels.unique())}
        return {"kind": self.kind, "name": self.name, "shape": list(self.shape), **resized, **classes}

    def captions(self, given) -> list[str]:
        """One caption per position, from a file, or where None is given from beside the images.

        Raises:
            DataError: there are none, or not one for every image.
        """
        if given is None:
            raise DataError(f"{self.name} has no captions; give a file of them: --captions FILE.")
        return load_captions(given, [str(position) for position in range(self.count)])


class FileSource(ImageSource):
    """A folder or zip archive of image files, read with the policy of `core.images`."""

    def __init__(self, path: Path, reading: Reading):
        self._reading, self._files = reading, open_container(path)
        names = self._files.names
        kind = "folder" if path.is_dir() else "zip"
        labels, self._note = _read_labels(self._files)
        super().__init__(kind, str(path), self._first_shape(), len(names), labels, reading.resize)

    def _first_shape(self) -> tuple[int, int, int]:
        reading = self._reading
        return ImageReader(self._files, skip_bad=reading.skip_bad, mixed=True, resize=reading.resize).first_shape()

    def batches(self, channels, batch_size, mixed=False, shard=(0, 1)):
        reading = self._reading
        reader = ImageReader(
            self._files,
            channels,
            skip_bad=reading.skip_bad,
            mixed=mixed,
            resize=reading.resize,
            workers=reading.workers_for(self.count),
            shard=shard,
            size=None if mixed else self.shape[1:],
        )
        self.records = reader.records
        yield from reader.batches(batch_size)

    def check(self, records):
        check_records(records, self._reading.skip_bad, self.count)
        super().check(records)

    def describe(self, records):
        return {**self._head(), **({"labels": self._note} if self._note else {}), **summarise(records)}

    def captions(self, given):
        if given is None:
            return find_captions(self._files.names, self._files.side_file)
        return load_captions(given, self._files.names)


class TensorSource(ImageSource):
    """Images in memory: a split of a bundled dataset, a sample batch, or tensors handed over in Python."""

    def __init__(self, kind: str, name: str, images: torch.Tensor, labels=None, resize: int | None = None):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
            got = f"{images.dtype} of shape {tuple(images.shape)}"
            raise DataError(f"{name} must be uint8 (N, C, H, W) with N ≥ 1 and 1 or 3 channels, got {got}.")
        if labels is not None and labels.shape != images.shape[:1]:
            raise DataError(f"{name}: {len(images)} images need as many labels, got shape {tuple(labels.shape)}.")
        super().__init__(kind, name, images.shape[1:], len(images), labels, resize)
        self._images = images

    def batches(self, channels, batch_size, mixed=False, shard=(0, 1)):
        for start in range(0, self.count, batch_size)[shard[0] :: shard[1]]:
            yield self._batch(start, self._images[start : start + batch_size], channels)

    def _batch(self, start: int, images: torch.Tensor, channels: int) -> ImageBatch:
        images = images.cpu()
        for position, image in enumerate(images, start):
            self.records[position] = {"sha256": hashlib.sha256(image.contiguous().numpy()).hexdigest()}
        if self.resize:
            images = torch.stack([resize_image(image, self.resize) for image in images])
        return ImageBatch(torch.arange(start, start + len(images)), with_channels(images, channels))


class ModelSource(TensorSource):
    """Images generated by a model; the noise is keyed by the sample index, so the batch size does not matter."""

    def __init__(self, name: str, model: str, generation: Generation, resize: int | None = None):
        from ..models.teachers import load_pipeline

        self._pipeline, self._generation = load_pipeline(model), generation
        self._generate((0, 1))  # refuses unsuitable settings before anything is drawn
        classes, num = self._pipeline.num_classes, generation.num
        labels = torch.arange(num) % classes if classes else None
        ImageSource.__init__(self, "model", name, self._pipeline.sample_shape, num, labels, resize)

    def _generate(self, shard):
        from ..generation import generate

        wanted = self._generation
        return generate(
            self._pipeline,
            wanted.num,
            steps=wanted.steps,
            sampler=wanted.sampler,
            seed=wanted.seed,
            batch_size=wanted.batch_size,
            device=wanted.device,
            shard=shard,
        )

    def batches(self, channels, batch_size, mixed=False, shard=(0, 1)):
        starts = range(0, self.count, self._generation.batch_size)[shard[0] :: shard[1]]
        for start, (images, _) in zip(starts, self._generate(shard), strict=True):
            yield self._batch(start, images, channels)

    def describe(self, records):
        wanted = self._generation
        settings = {"steps": wanted.steps, "sampler": wanted.sampler, "seed": wanted.seed}
        return {**super().describe(records), **settings}


@dataclass
class StatisticsSource:
    """A statistics file, with or without the features themselves."""

    path: Path
    statistics: Statistics
    kind: str = "statistics"

    @property
    def name(self) -> str:
        return str(self.path)


def resolve(
    side, generation: Generation | None = None, reading: Reading | None = None
) -> ImageSource | StatisticsSource:
    """Find out what a side is.

    Args:
        side: uint8 tensor or array (N, C, H, W), or a pair of it and the classes (N,) of a sample whose class
            proportions were fixed; or a string or path: an image folder; a zip
            archive of images; an ``.npz`` or ``.safetensors`` statistics file; ``images:FILE.npz`` for the images of a
            sample batch (arr_0); a dataset (``digits``, ``digits:heldout``); a folder with model_index.json; a teacher
            name, where ``model:digits`` means the teacher and a bare ``digits`` the dataset. Existing paths come first.
        generation: number of images, sampler, steps and seed for models.
        reading: what to do with unusable files, resizing, worker processes.

    Raises:
        DataError: nothing of that name, an empty folder, unusable images.
    """
    generation, reading = generation or Generation(), reading or Reading()
    if not isinstance(side, (str, Path)):
        return _in_memory(side, reading)
    text = str(side)
    dataset, _, split = text.partition(":")
    if dataset in DATASETS and not Path(text).exists():
        return _dataset(text, dataset, split, reading)
    if text.startswith("images:"):
        return TensorSource("sample batch", text, load_sample_batch(text[len("images:") :]), resize=reading.resize)
    if text.startswith("model:"):
        return ModelSource(text, text.removeprefix("model:"), generation, reading.resize)
    path = Path(text).expanduser()
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return ModelSource(text, str(path), generation, reading.resize)
        return FileSource(path, reading)
    if path.is_file():
        return _file(path, reading)
    if text in _teachers():
        return ModelSource(text, text, generation, reading.resize)
    raise DataError(_not_found(text))


def _in_memory(side, reading: Reading) -> TensorSource:
    images, *labels = side if isinstance(side, tuple) else (side,)
    images = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    if not isinstance(images, torch.Tensor) or len(labels) > 1:
        raise DataError(
            "A side is a name, a path, a uint8 tensor or array (N, C, H, W), or a pair of that and class labels; got "
            f"{type(images).__name__ if len(labels) <= 1 else f'{1 + len(labels)} things'}."
        )
    if not labels or labels[0] is None:
        return TensorSource("tensor", "the tensor", images, resize=reading.resize)
    try:
        classes = torch.as_tensor(labels[0])
    except (TypeError, ValueError, RuntimeError):
        classes = torch.zeros(0)
    if classes.is_floating_point() or classes.is_complex():
        raise DataError("Class labels must be integers, as many labels as images.")
    return TensorSource("tensor", "the tensor", images, classes.cpu().long(), reading.resize)


def _read_labels(files) -> tuple[torch.Tensor | None, str]:
    """Classes from dataset.json, in the form of EDM and StyleGAN: {"labels": [["000000.png", 3], …]}; and a remark.

    They only count if all classes are equally frequent, up to one image: then their proportions were fixed.
    """
    data = files.side_file(LABELS_FILE)
    if data is None:
        return None, ""
    try:
        entries = json.loads(data)["labels"] or []
        labels = {name: label for name, label in entries if type(label) is int and 0 <= label < 2**31}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{LABELS_FILE} of {files.label} is not a list of labels: {error}.") from None
    known = torch.tensor([labels.get(name, -1) for name in files.names])
    missing = int((known < 0).sum())
    if missing:
        return None, f"{LABELS_FILE} is not used: {missing} of {len(known)} images have no whole number in it"
    sizes = known.unique(return_counts=True)[1]
    if int(sizes.max() - sizes.min()) > 1:
        return None, f"{LABELS_FILE} is not used: the classes are not equally frequent, hence were drawn independently"
    return known, ""


def _dataset(text: str, dataset: str, split: str, reading: Reading) -> TensorSource:
    if (split or "train") not in DATASETS[dataset]:
        raise DataError(f"Dataset {dataset} has no split {split!r}; it has {', '.join(DATASETS[dataset])}.")
    images, labels = load_digits(split or "train")
    return TensorSource("dataset", text if split else f"{text}:train", images, labels, reading.resize)


def _file(path: Path, reading: Reading) -> FileSource | StatisticsSource:
    suffix = path.suffix.lower()
    if suffix in (".npz", ".safetensors"):
        return StatisticsSource(path, load_statistics(path))
    if suffix == ".zip":
        return FileSource(path, reading)
    if suffix in EXTENSIONS:
        raise DataError(f"{path} is a single image; a distance between sets needs a folder of at least 2.")
    raise DataError(
        f"{path} is neither a folder or zip archive of images nor an .npz or .safetensors statistics file "
        "(other formats are not opened)."
    )


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
    return f"{text} does not exist: no folder, archive, statistics file, dataset or model.{hint} Names: {', '.join(names)}."


def with_channels(images, channels: int):
    """uint8 (N, C, H, W), or a list of (C, H, W), in 1 or 3 channels.

    Grey → RGB by repetition, RGB → grey by the same ITU-R 601 weights and rounding as Pillow.
    """
    if not isinstance(images, torch.Tensor):
        return [with_channels(image[None], channels)[0] for image in images]
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    red, green, blue = images.to(torch.int64).unbind(dim=1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)[:, None]
