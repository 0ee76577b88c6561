"""Reading image files in batches, by as many processes as wanted, with an account of every file.

What a file may hold is the policy of `images`, where files may lie that of `containers`. Whatever the number of workers
and the size of the batches, images, order and records are the same. A *strict* reader refuses the set if any file
cannot be used, and names up to 10 of them; with ``skip_bad`` they are left out and listed. Files that vanish or change
while they are read are such files; a worker process that dies ends the reading.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256

import numpy as np
import torch

from .containers import Container, FolderFiles, PathFiles, ZipFiles, find_images, open_container
from .errors import DataError, UsageError
from .imagerecords import MAX_LISTED, check_records, summarise
from .images import EXTENSIONS, DecodedImage, UnusableImageError, decode_image, target_size
from .workers import WorkerDiedError, ordered_map

_BLOCK = 64  # images per batch where the caller does not see batches


@dataclass(frozen=True)
class ImageBatch:
    """Usable images of one block of positions.

    Attributes:
        index: (n,) int64 positions in the container's names, ascending.
        images: uint8 (n, C, H, W); where sizes differ within the batch a list of (C, H, W).
        records: by position, those of the whole block, unusable files included.
    """

    index: torch.Tensor
    images: torch.Tensor | list[torch.Tensor]
    records: dict[int, dict] = field(default_factory=dict)


class ImageReader:
    """Reads the images of a container in its order, and keeps an account of every file.

    Args:
        container: see `open_container`.
        channels: 1 or 3; None takes over those of the first usable image.
        skip_bad: leave unusable files out instead of refusing the set.
        mixed: images may have different sizes; else those of another size than the first usable one are unusable.
        resize: side of a square or (height, width) to which every image is brought when it is decoded.
        workers: processes that read and decode; 0 for this one.
        shard: (rank, world): block b of ``batch_size`` positions is read if b % world == rank.
        size: (height, width) to expect, instead of that of the first usable image of the whole container.

    Attributes:
        records: by position, of every file read so far in the current pass: {name, sha256, format, mode, size: [height,
            width] before resizing, rotated}, or {name, reason} of an unusable one (with size, if that is the reason).

    Raises:
        UsageError: arguments outside their range.
    """

    def __init__(
        self,
        container: Container,
        channels: int | None = None,
        *,
        skip_bad: bool = False,
        mixed: bool = False,
        resize: int | tuple[int, int] | None = None,
        workers: int = 0,
        shard: tuple[int, int] = (0, 1),
        size: tuple[int, int] | None = None,
    ):
        if channels not in (None, 1, 3) or workers < 0 or not 0 <= shard[0] < shard[1]:
            raise UsageError(
                "Images are read with 1 or 3 channels, 0 or more workers and a shard (rank, world) with rank < world, "
                f"not with {channels}, {workers} and {tuple(shard)}."
            )
        self.container, self.workers, self.records = container, workers, {}
        self._channels, self._skip_bad, self._mixed, self._shard = channels, skip_bad, mixed, shard
        self._resize = None if resize is None else target_size(resize)
        self._size = self._resize or (None if size is None else tuple(size))

    def first_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the first usable image, as it would be yielded.

        Raises:
            DataError: none is usable.
        """
        image, _, records = self._first
        if image is None:
            check_records(records, self._skip_bad, len(self.container.names))
        return image.pixels.shape

    def batches(self, batch_size: int) -> Iterator[ImageBatch]:
        """Start a pass over the files of this shard; blocks without a usable image are left out.

        Raises (while iterating):
            DataError: unusable files in strict mode, found in one go up to the tenth; no usable file; a worker died.
                Where the work is shared by several processes only the last: join their records, then `check_records`.
        """
        if batch_size < 1:
            raise UsageError(f"The batch size must be at least 1, not {batch_size}.")
        return self._batches(batch_size)

    def _batches(self, batch_size: int) -> Iterator[ImageBatch]:
        self.records.clear()
        total, (rank, world) = len(self.container.names), self._shard
        try:
            task = self._task()
        except _NoneUsableError as none:
            self.records.update(none.records)
        else:
            blocks = [(start, min(start + batch_size, total)) for start in range(0, total, batch_size)][rank::world]
            yield from self._read(task, blocks)
        if world == 1:
            check_records(self.records, self._skip_bad, total)

    def _read(self, task: "_ReadBlock", blocks: list[tuple[int, int]]) -> Iterator[ImageBatch]:
        unusable, names = 0, self.container.names
        try:
            with closing(ordered_map(task, blocks, self.workers)) as results:
                for found, pixels in results:
                    records = {}
                    for position, record in found["records"]:
                        records[position] = record
                        unusable += "reason" in record
                        if unusable == MAX_LISTED and not self._skip_bad:
                            break
                    self.records.update(records)
                    if unusable and not self._skip_bad:  # from the first one on it only looks for more
                        if unusable == MAX_LISTED:
                            return
                    elif found["shapes"]:
                        index = torch.tensor([position for position, record in records.items() if "sha256" in record])
                        yield ImageBatch(index, _unpack(pixels, found["shapes"]), records)
        except WorkerDiedError as error:
            first, last = names[error.item[0]], names[error.item[1] - 1]
            raise DataError(
                f"{self.container.label}: {error} while it read {first} … {last}; it was killed, for lack of memory "
                "perhaps. Try fewer --workers, or 0."
            ) from error

    def _task(self) -> "_ReadBlock":
        channels, size, first = self._channels, self._size, None
        if channels is None or not (self._mixed or size):
            image, first, records = self._first
            if image is None:
                raise _NoneUsableError(records)
            channels = image.pixels.shape[0]
            size = size or image.pixels.shape[1:]
        shape = (channels, None, None) if self._mixed and not self._resize else (channels, *size)
        return _ReadBlock(self.container, self._channels, self._resize, shape, first, self._skip_bad)

    @cached_property
    def _first(self) -> tuple[DecodedImage | None, str | None, dict[int, dict]]:
        """The first usable image of the whole container and its name; records of the unusable ones before it."""
        records: dict[int, dict] = {}
        for position, name in enumerate(self.container.names):
            try:
                return decode_image(self.container.read(name), self._channels, self._resize), name, records
            except UnusableImageError as error:
                records[position] = {"name": name, "reason": str(error)}
            if len(records) == MAX_LISTED and not self._skip_bad:
                break
        return None, None, records


class _NoneUsableError(Exception):
    def __init__(self, records: dict[int, dict]):
        super().__init__()
        self.records = records


@dataclass(frozen=True)
class _ReadBlock:
    """What a worker does with a block of positions; no torch in here (see `workers`)."""

    container: Container
    channels: int | None
    resize: tuple[int, int] | None
    shape: tuple[int, int | None, int | None]
    first: str | None
    skip_bad: bool

    def __call__(self, block: tuple[int, int]) -> tuple[dict, np.ndarray]:
        records, shapes, images, unusable = [], [], [], 0
        single = None not in self.shape
        room = np.empty((block[1] - block[0], *self.shape), dtype=np.uint8) if single else None
        for position in range(*block):
            name = self.container.names[position]
            try:
                data = self.container.read(name)
                image = decode_image(data, self.channels, self.resize)
                reason = self._misfit(image)
            except UnusableImageError as error:
                records.append((position, {"name": name, "reason": str(error)}))
            else:
                if reason is not None:
                    records.append((position, {"name": name, "reason": reason, "size": list(image.size)}))
                else:
                    if single:
                        room[len(shapes)] = image.pixels
                    else:
                        images.append(image.pixels.ravel())
                    shapes.append(image.pixels.shape)
                    records.append((position, _record(name, data, image)))
                    continue
            unusable += 1
            if unusable == MAX_LISTED and not self.skip_bad:
                break
        pixels = room[: len(shapes)].reshape(-1) if single else np.concatenate([np.empty(0, np.uint8), *images])
        return {"records": records, "shapes": shapes}, pixels

    def _misfit(self, image: DecodedImage) -> str | None:
        got = image.pixels.shape
        if all(wanted in (None, side) for wanted, side in zip(self.shape, got, strict=True)):
            return None
        wanted = "×".join("any" if side is None else str(side) for side in self.shape)
        but = f", expected {wanted}" if self.first is None else f" but {self.first} is {wanted}"
        return f"is {'×'.join(map(str, got))} (channels×height×width){but}"


def _record(name: str, data: bytes, image: DecodedImage) -> dict:
    return {
        "name": name,
        "sha256": sha256(data).hexdigest(),
        "format": image.format,
        "mode": image.mode,
        "size": list(image.size),
        "rotated": image.rotated,
    }


def _unpack(pixels: np.ndarray, shapes: list) -> torch.Tensor | list[torch.Tensor]:
    flat = torch.from_numpy(pixels)
    if all(shape == shapes[0] for shape in shapes):
        return flat.view(len(shapes), *shapes[0])
    parts = flat.split([int(np.prod(shape)) for shape in shapes])
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]


def read_images(paths: Iterable, channels: int | None = None, *, skip_bad: bool = False) -> torch.Tensor:
    """Read image files of one size into uint8 (N, C, H, W); use `ImageReader` to stream or to see what was skipped.

    Raises:
        DataError: no files, or files that the policy refuses.
    """
    reader = ImageReader(PathFiles(paths), channels, skip_bad=skip_bad)
    return torch.cat([batch.images for batch in reader.batches(_BLOCK)])


__all__ = [
    "EXTENSIONS",
    "Container",
    "FolderFiles",
    "ImageBatch",
    "ImageReader",
    "PathFiles",
    "ZipFiles",
    "check_records",
    "find_images",
    "open_container",
    "read_images",
    "summarise",
]
