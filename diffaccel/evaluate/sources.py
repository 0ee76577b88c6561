"""What can stand on either side of a comparison: image files, statistics files, datasets, models, tensors."""

import difflib
import json
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..core.captions import find_captions, load_captions
from ..core.errors import DataError
from ..core.imagefiles import ImageReader, check_records, open_container, summarise
from ..core.images import EXTENSIONS
from ..models.data import SPLITS, load_labelled
from ..models.shipped import ASSETS, check_shipped
from .imagesource import ImageSource, TensorSource
from .modelsource import Generation, ModelSource
from .statistics import Statistics, load_sample_batch, load_statistics

DATASETS = {"digits": SPLITS, "mnist": SPLITS, "emoji": ("all",)}
_FEATURES = {"emoji": "emoji128"}  # of data sets whose shape says nothing
_SHIPPED_STATISTICS = "statistics.safetensors"
_STATISTICS = {
    "mnist": "mnist",
    "emoji": "tiny-sd",
}  # data sets that are not shipped themselves: folder of their features
LABELS_FILE = "dataset.json"
_WORKERS_FROM = 1000  # files


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


@dataclass
class StatisticsSource:
    """A statistics file, with or without the features themselves."""

    path: Path
    statistics: Statistics
    kind: str = "statistics"
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or str(self.path)


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
        entries = json.loads(data)["labels"]
        if entries is None:  # a sample without classes
            return None, ""
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


def _dataset(text: str, dataset: str, split: str, reading: Reading) -> TensorSource | StatisticsSource:
    if split and split not in DATASETS[dataset]:
        raise DataError(f"Dataset {dataset} has no split {split!r}; it has {', '.join(DATASETS[dataset])}.")
    if not split and dataset in _STATISTICS:
        folder = _STATISTICS[dataset]
        check_shipped(folder, _SHIPPED_STATISTICS)
        file = ASSETS / folder / _SHIPPED_STATISTICS
        return StatisticsSource(file, load_statistics(file), label=dataset)
    if dataset == "emoji":
        from ..models.emoji import load_emoji

        images, labels = load_emoji().on_white(), None
    else:
        images, labels = load_labelled(dataset, split or "train")
    source = TensorSource("dataset", text if split else f"{text}:train", images, labels, reading.resize)
    source.features = _FEATURES.get(dataset) if reading.resize is None else None
    return source


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
