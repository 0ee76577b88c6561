"""Images as a stream, and those that are in memory."""

import hashlib
from collections.abc import Iterator

import torch

from ..core.captions import load_captions
from ..core.errors import DataError
from ..core.imagefiles import ImageBatch
from ..core.images import resize_image


class ImageSource:
    """Images as a stream.

    Attributes:
        kind: "folder", "zip", "dataset", "model" or "tensor".
        name: what the user typed, or what identifies it.
        shape: (C, H, W) of the first image.
        count: number of positions, usable or not.
        resize: side of the square that images were brought to, None for as they are.
        labels: (count,) classes of a sample with fixed class proportions; None where unknown or independent draws.
        features: name of the extractor that belongs to these images; None for what suits their shape.
        records: by position, what was read (JSON-able): complete for this process after one iteration.
    """

    features: str | None = None

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
