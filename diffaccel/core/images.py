"""Image files in and out: one written policy for everything that can be in a folder of pictures.

Decode policy: 8-bit grey and RGB are kept; 16-bit grey is scaled, round(v·255/65535); of 16-bit colour PNGs Pillow
keeps the upper byte; bilevel, palette, CMYK and YCbCr become RGB or grey; grey → RGB repeats the channel, RGB → grey is
ITU-R 601 luma; transparency is composited on white, the page pictures are looked at on; EXIF orientation is applied.
Refused with a reason: animated files, 32-bit integer and float pixels, damaged files, files that are not images.
"""

import io
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from .errors import DataError, NumericalError, UsageError
from .files import write_atomic

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # never EPS: Pillow would start Ghostscript
_MAX_LISTED = 10


class UnusableImageError(DataError):
    """One file that the decode policy refuses; the text is the reason."""


def find_images(folder) -> list[Path]:
    """All image files below a folder: recursive, extensions in any case, hidden names skipped, sorted by relative path.

    Symbolic links are followed, each real folder is entered once, so loops end.

    Raises:
        DataError: not a folder, or one that cannot be listed.
    """
    root, found, entered = Path(folder), [], set()
    pending = [root]
    while pending:
        current = pending.pop()
        try:
            status = os.stat(current)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            # Sorted, so that of two links to one folder the same one wins on every machine.
            entries = sorted(os.scandir(current), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise DataError(f"Cannot list {current}: {error.strerror}.") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                pending.append(Path(entry.path))
            elif entry.name.lower().endswith(EXTENSIONS):
                found.append(Path(entry.path))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def decode_image(data: bytes, channels: int | None = None) -> tuple[torch.Tensor, str]:
    """Decode one image file under the policy above.

    Args:
        data: the bytes of the file.
        channels: 1 or 3; None keeps grey files at 1 and all others at 3.

    Returns:
        uint8 (C, H, W) and the format name, e.g. "PNG".

    Raises:
        UnusableImageError: with the reason.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not data:
        raise UnusableImageError("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                kind = image.format or "unknown"
                # MPO is how phones store a JPEG with a preview; its first frame is the photograph.
                if getattr(image, "n_frames", 1) > 1 and kind != "MPO":
                    raise UnusableImageError("the file is animated or has several pages")
                image.load()
                pixels = _to_array(ImageOps.exif_transpose(image), channels)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise UnusableImageError("the picture is too large (decompression bomb limit of Pillow)") from error
        except UnidentifiedImageError as error:
            raise UnusableImageError("not an image file, whatever its name says") from error
        except UnusableImageError:
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, …
            raise UnusableImageError(f"damaged: {error}") from error
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous(), kind


def _to_array(image, channels: int | None) -> np.ndarray:
    from PIL import Image

    mode = image.mode
    if mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.rint(levels * (255.0 / 65535.0)).astype(np.uint8))
    elif mode in ("I", "F"):
        raise UnusableImageError(f"pixels of mode {mode} (32 bits) have no agreed range; save as 8 or 16 bits")
    elif mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    grey = image.mode in ("1", "L") or mode in ("LA", "La")
    target = {None: "L" if grey else "RGB", 1: "L", 3: "RGB"}[channels]
    return np.asarray(image if image.mode == target else image.convert(target))


class ImageFiles:
    """Iterates over image files as uint8 (C, H, W), all of one size, and keeps account of what it read.

    Attributes (complete after one full iteration):
        count: images that were yielded.
        formats: files per format.
        first: name of the first usable file.
        digest: SHA-256 of the list of (relative name, content hash): the identity of the image set.
        skipped: (name, reason) of every file left out; stays empty in strict mode, which raises instead.

    Raises:
        DataError: (strict) lists up to 10 offenders with reasons; (skip_bad) no usable file is left.
    """

    def __init__(self, paths: Iterable, channels: int | None = None, *, skip_bad: bool = False, root=None):
        self.paths = [Path(path) for path in paths]
        self.channels, self.skip_bad, self._root = channels, skip_bad, root
        self._reset()

    def _reset(self) -> None:
        self.count, self.formats, self.skipped = 0, Counter(), []
        self._hash, self._shape, self.first = sha256(), None, None

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[torch.Tensor]:
        self._reset()
        for path in self.paths:
            try:
                image = self._read(path)
            except UnusableImageError as error:
                self.skipped.append((self._name(path), str(error)))
                if not self.skip_bad and len(self.skipped) == _MAX_LISTED:
                    break
                continue
            if self.skip_bad or not self.skipped:  # after the first offender a strict reader only looks for more
                self.count += 1
                yield image
        if self.skipped and (not self.skip_bad or self.count == 0):
            raise DataError(self._sentence())

    def _read(self, path: Path) -> torch.Tensor:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UnusableImageError(f"cannot be read ({error.strerror})") from error
        image, kind = decode_image(data, self.channels)
        if self._shape is None:
            self._shape, self.first = tuple(image.shape), self._name(path)
        elif tuple(image.shape) != self._shape:
            got, expected = ("×".join(map(str, shape)) for shape in (tuple(image.shape), self._shape))
            raise UnusableImageError(f"is {got} (channels×height×width) but {self.first} is {expected}")
        self.formats[kind] += 1
        self._hash.update(os.fsencode(self._name(path)) + b"\0" + sha256(data).digest())
        return image

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix() if self._root is not None else str(path)

    def _sentence(self) -> str:
        listed = "; ".join(f"{name}: {reason}" for name, reason in self.skipped[:_MAX_LISTED])
        if self.skip_bad:
            return f"None of the {len(self.paths)} image files can be used: {listed}."
        more = " (reading stopped there)" if len(self.skipped) == _MAX_LISTED else ""
        return f"{len(self.skipped)} image file(s) cannot be used{more}: {listed}. To leave them out use --skip-bad."


def read_images(paths: Iterable, channels: int | None = None, *, skip_bad: bool = False) -> torch.Tensor:
    """Read image files of one size into uint8 (N, C, H, W); use `ImageFiles` to stream or to see what was skipped.

    Raises:
        DataError: no files, or files that the policy refuses (see `ImageFiles`).
    """
    images = list(ImageFiles(paths, channels, skip_bad=skip_bad))
    if not images:
        raise DataError("There are no image files to read.")
    return torch.stack(images)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Quantise images in [−1, 1] to uint8 by rounding, as a PNG would hold them; values outside are clipped.

    Raises:
        NumericalError: NaN or infinite pixels.
    """
    if not bool(torch.isfinite(x).all()):
        raise NumericalError("The images contain NaN or infinite pixels.")
    return ((x.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 images as float32 in [−1, 1]; the inverse of `to_uint8`."""
    return images.float() / 127.5 - 1.0


def png_bytes(image: torch.Tensor) -> bytes:
    """One uint8 image, (C, H, W) with 1 or 3 channels or (H, W), as a PNG file in memory."""
    from PIL import Image

    image = image.cpu() if image.ndim == 3 else image.cpu()[None]
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise UsageError(f"PNG files need uint8 with 1 or 3 channels, got {image.dtype} of shape {tuple(image.shape)}.")
    pixels = image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def sheet(images: torch.Tensor, columns: int = 10, scale: int = 1, gutter: int = 2) -> torch.Tensor:
    """Lay uint8 images (N, C, H, W) out as one image (C, height, width), row by row, for people to look at.

    Args:
        columns: images per row; the last row is filled up with white.
        scale: whole-number enlargement; nearest neighbour, so that pixels stay visible as they are.
        gutter: white pixels between images and around the sheet.
    """
    if images.ndim != 4 or len(images) == 0 or columns < 1 or scale < 1:
        raise UsageError("A sheet needs images (N, C, H, W) with N ≥ 1, columns ≥ 1 and scale ≥ 1.")
    images = images.cpu().repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    number, channels, height, width = images.shape
    columns = min(columns, number)
    rows = -(-number // columns)
    result = images.new_full((channels, rows * (height + gutter) + gutter, columns * (width + gutter) + gutter), 255)
    for index, image in enumerate(images):
        top = gutter + (index // columns) * (height + gutter)
        left = gutter + (index % columns) * (width + gutter)
        result[:, top : top + height, left : left + width] = image
    return result


def save_png(image: torch.Tensor, path) -> None:
    """Write one uint8 image as PNG, atomically; see `png_bytes`."""
    write_atomic(path, png_bytes(image))


def save_grid(images: torch.Tensor, path, columns: int = 10, scale: int | None = None, gutter: int = 2) -> None:
    """Write a `sheet` of uint8 images (N, C, H, W) as one PNG; by default small images are enlarged to about 40 pixels."""
    save_png(sheet(images, columns, scale or max(1, 40 // images.shape[-1]), gutter), path)
