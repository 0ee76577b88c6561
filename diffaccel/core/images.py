"""Pictures as tensors and back: one written policy for everything that an image file can hold.

Kept: 8-bit grey and RGB. Converted:

- 16-bit grey is scaled, round(v·255/65535); of 16-bit colour, or grey with transparency, Pillow keeps the upper byte.
- Bilevel becomes grey; palette, CMYK and YCbCr become RGB. Colour profiles are ignored.
- Grey → RGB repeats the channel, RGB → grey is ITU-R 601 luma.
- Transparency is composited on white, the page that pictures are looked at on.
- EXIF orientation is applied, so height and width are those that people see.
- On request the picture is brought to one size, aspect ratio ignored, by Pillow's antialiased bicubic filter, which
  rounds to 8 bits again; a picture of that size already is left as it is.

Refused with a reason: empty, truncated and damaged files, files that are not images whatever their name says, animated
ones and those of several pages, 32-bit integer and float pixels, colour spaces without a fixed conversion to RGB, and
more than 89,478,485 pixels (Pillow's limit against decompression bombs), which are refused before memory is taken.
Settings of Pillow that other code of the process changed (truncated files, the size limit) make no difference.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .errors import DataError, NumericalError, UsageError
from .files import write_atomic

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # never EPS: Pillow would start Ghostscript
_MAX_PIXELS = 89_478_485
_ORIENTATION = 0x0112  # EXIF tag
_GREY = ("1", "L", "LA", "La")
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
_OPAQUE = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr")


class UnusableImageError(DataError):
    """One file that the decode policy refuses; the text is the reason."""


@dataclass(frozen=True)
class DecodedImage:
    """One picture and what its file was like.

    Attributes:
        pixels: uint8 (C, H, W); a view, to be copied into its place in a batch.
        format: Pillow's name, e.g. "PNG".
        mode: Pillow's name of the stored pixels, e.g. "RGBA" or "I;16".
        size: (height, width) as shown, after rotation and before resizing.
        rotated: an EXIF orientation was applied.
    """

    pixels: np.ndarray
    format: str
    mode: str
    size: tuple[int, int]
    rotated: bool

    @property
    def tensor(self) -> torch.Tensor:
        """The pixels as a tensor of their own, uint8 (C, H, W)."""
        return torch.from_numpy(np.array(self.pixels, order="C"))


def decode_image(data: bytes, channels: int | None = None, resize: tuple[int, int] | None = None) -> DecodedImage:
    """Decode one image file under the policy above; Pillow and NumPy only, so it is safe in a forked process.

    Args:
        data: the bytes of the file.
        channels: 1 or 3; None keeps grey files at 1 and all others at 3.
        resize: (height, width) to bring the picture to, or None.

    Raises:
        UnusableImageError: with the reason.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise UnusableImageError("the file is empty")
    with _strict_pillow():
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                return _decode(image, channels, resize)
        except Image.DecompressionBombError as error:
            raise UnusableImageError(_TOO_LARGE) from error
        except UnidentifiedImageError as error:
            raise UnusableImageError("not an image file, whatever its name says") from error
        except (UnusableImageError, MemoryError):
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, …
            raise UnusableImageError(f"damaged: {error}") from error


_TOO_LARGE = f"the picture has more than {_MAX_PIXELS:,} pixels (limit against decompression bombs): too large"


def _decode(image, channels: int | None, resize: tuple[int, int] | None) -> DecodedImage:
    kind, mode = image.format or "unknown", image.mode
    if image.width * image.height > _MAX_PIXELS:
        raise UnusableImageError(_TOO_LARGE)
    # MPO is how phones store a JPEG with a preview; its first frame is the photograph.
    if getattr(image, "n_frames", 1) > 1 and kind != "MPO":
        raise UnusableImageError("the file is animated or has several pages")
    early = image.getexif().get(_ORIENTATION) if kind == "TIFF" else None  # Pillow turns TIFFs while it loads them
    image.load()
    method = _turns().get(image.getexif().get(_ORIENTATION))
    turned = image if method is None else image.transpose(method)
    converted = _convert(turned, mode, kind, channels)
    rotated = method is not None or early in _turns()
    return DecodedImage(_pixels(converted, resize), kind, mode, turned.size[::-1], rotated)


def _convert(image, mode: str, kind: str, channels: int | None):
    from PIL import Image

    grey = mode in _GREY
    if mode.startswith("I;16") or (mode == "I" and kind == "PPM"):  # PGM of up to 16 bits; Pillow spreads its levels
        levels = np.asarray(image).astype(np.float64)
        image, grey = Image.fromarray(np.rint(levels * (255.0 / 65535.0)).astype(np.uint8)), True
    elif mode in ("I", "F"):
        raise UnusableImageError(f"pixels of mode {mode} (32 bits) have no agreed range; save as 8 or 16 bits")
    elif mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif mode not in _OPAQUE:
        raise UnusableImageError(f"pixels of mode {mode} have no agreed conversion; save as RGB")
    target = {None: "L" if grey else "RGB", 1: "L", 3: "RGB"}[channels]
    return image if image.mode == target else image.convert(target)


def _pixels(image, size: tuple[int, int] | None) -> np.ndarray:
    """A grey or RGB image of Pillow as a view (C, H, W), brought to a (height, width) if there is one."""
    from PIL.Image import Resampling

    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1], Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@lru_cache(maxsize=1)
def _turns() -> dict:
    from PIL.Image import Transpose

    order = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
    return {orientation: Transpose[name] for orientation, name in enumerate(order, start=2)}


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Silence Pillow, and undo the switches with which other code of the process changes what it lets pass."""
    from PIL import Image, ImageFile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, _MAX_PIXELS
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before


def resize_image(image: torch.Tensor, size: int | tuple[int, int]) -> torch.Tensor:
    """Bring one uint8 image (C, H, W) with 1 or 3 channels to another size, exactly as `decode_image` does.

    Args:
        size: side of a square, or (height, width).
    """
    from PIL import Image

    pixels = image.cpu()[0] if image.shape[0] == 1 else image.cpu().permute(1, 2, 0)
    resized = _pixels(Image.fromarray(pixels.contiguous().numpy()), target_size(size))
    return torch.from_numpy(np.array(resized, order="C"))


def target_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a wanted size: the side of a square, or the pair itself.

    Raises:
        UsageError: sides below 1, or more pixels than an image file may have.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1 or height * width > _MAX_PIXELS:
        raise UsageError(f"Images cannot be brought to {height}×{width} pixels; give sides of at least 1.")
    return height, width


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


def labelled(grid: list[list[tuple[str, torch.Tensor]]], gap: int = 14) -> torch.Tensor:
    """Images in lines, each under its label, as one image (C, height, width) for people to look at.

    Args:
        grid: labels of one or more lines, and uint8 images (C, h, w), none larger than the first.
        gap: white pixels between images.
    """
    from PIL import Image, ImageDraw, ImageFont

    font, spacing = ImageFont.load_default(size=14), 18
    channels, height, width = grid[0][0][1].shape
    texts = [label.split("\n") for line in grid for label, _ in line]
    top = spacing * max(map(len, texts)) + 4
    across = max(width, *(int(font.getlength(text)) + 3 for lines in texts for text in lines)) + gap
    canvas = torch.full((channels, len(grid) * (top + height + gap), gap + max(map(len, grid)) * across), 255).byte()
    places = [
        (gap + i * across, j * (top + height + gap), *b) for j, line in enumerate(grid) for i, b in enumerate(line)
    ]
    for x, y, _, image in places:
        canvas[:, y + top : y + top + image.shape[1], x : x + image.shape[2]] = image
    drawn = Image.fromarray(canvas.permute(1, 2, 0).squeeze(2).numpy())
    for x, y, label, _ in places:
        for index, text in enumerate(label.split("\n")):
            ImageDraw.Draw(drawn).text((x, y + 3 + spacing * index), text, fill="black", font=font)
    return torch.from_numpy(np.array(drawn)).reshape(*canvas.shape[1:], channels).permute(2, 0, 1)


def save_png(image: torch.Tensor, path) -> None:
    """Write one uint8 image as PNG, atomically; see `png_bytes`."""
    write_atomic(path, png_bytes(image))


def save_grid(images: torch.Tensor, path, columns: int = 10, scale: int | None = None, gutter: int = 2) -> None:
    """Write a `sheet` of uint8 images (N, C, H, W) as one PNG; by default small images are enlarged to about 40 pixels."""
    save_png(sheet(images, columns, scale or max(1, 40 // images.shape[-1]), gutter), path)
