"""The decode policy of image files, and pictures for people."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from diffaccel.core.errors import NumericalError, UsageError
from diffaccel.core.imagefiles import read_images
from diffaccel.core.images import UnusableImageError, decode_image, resize_image, save_grid, save_png, to_uint8


def _encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _pixels(image, kind="PNG", channels=None, **options):
    return decode_image(_encoded(image, kind, **options), channels).tensor


def _grey(height=8, width=8):
    return np.arange(height * width, dtype=np.uint8).reshape(height, width)


def _colour(height=5, width=7):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_grey_and_rgb_are_kept():
    grey = decode_image(_encoded(Image.fromarray(_grey())))
    assert (grey.format, grey.mode, grey.size, grey.rotated) == ("PNG", "L", (8, 8), False)
    assert grey.tensor.dtype == torch.uint8 and torch.equal(grey.tensor[0], torch.from_numpy(_grey()))
    assert torch.equal(_pixels(Image.fromarray(_colour())).permute(1, 2, 0), torch.from_numpy(_colour()))
    assert _pixels(Image.new("RGB", (1, 1), (1, 2, 3))).flatten().tolist() == [1, 2, 3]


def test_grey_to_rgb_and_back_is_the_identity():
    rgb = _pixels(Image.fromarray(_grey()), channels=3)
    assert rgb.shape == (3, 8, 8) and bool((rgb == rgb[:1]).all())
    assert torch.equal(_pixels(Image.fromarray(rgb.permute(1, 2, 0).numpy()), channels=1)[0], torch.from_numpy(_grey()))


def test_16_bit_grey_is_scaled_not_saturated():
    levels = np.array([[0, 257, 32896, 65535, 128, 129]], dtype=np.uint16)
    assert _pixels(Image.fromarray(levels)).flatten().tolist() == [0, 1, 128, 255, 0, 1]
    pgm = decode_image(b"P5 6 1 65535\n" + levels.astype(">u2").tobytes())
    assert pgm.tensor.flatten().tolist() == [0, 1, 128, 255, 0, 1] and pgm.tensor.shape == (1, 1, 6)


def test_16_bit_colour_keeps_the_upper_byte():
    samples = struct.pack(">6H", 0x12FF, 0x3400, 0x5680, 0xFFFF, 0x00FF, 0x0100)
    decoded = decode_image(_png(2, 1, bits=16, kind=2, rows=b"\0" + samples))
    assert decoded.tensor.permute(1, 2, 0).flatten().tolist() == [0x12, 0x34, 0x56, 0xFF, 0x00, 0x01]


def _png(width, height, bits, kind, rows):
    """A PNG file by hand, for what Pillow does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_transparency_shows_the_white_page():
    assert _pixels(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).unique().tolist() == [255]
    assert _pixels(Image.new("LA", (2, 2), (0, 51)), channels=1).unique().tolist() == [204]
    grey = _pixels(Image.fromarray(_grey(1, 4)), transparency=2)
    assert grey.shape == (1, 1, 4) and grey.flatten().tolist() == [0, 1, 255, 3]


def test_palette_with_transparent_entry_and_cmyk():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert _pixels(palette).flatten().tolist() == [255, 0, 0, 0, 0, 255]
    assert _pixels(palette, transparency=1)[:, 0, 1].tolist() == [255, 255, 255]
    red = decode_image(_encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert red.mode == "CMYK" and red.pixels[0].min() > 240 and red.pixels[1:].max() < 15


def test_bilevel_is_grey():
    assert _pixels(Image.new("1", (2, 2), 1)).tolist() == [[[255, 255], [255, 255]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda x: np.rot90(x, -1),  # the camera was turned: show it rotated by 90° clockwise
        7: lambda x: np.rot90(x, 2).T,
        8: np.rot90,
    }
    decoded = decode_image(_encoded(Image.fromarray(_grey(2, 3)), kind, exif=exif))
    wanted = shown[orientation](_grey(2, 3))
    assert np.array_equal(decoded.pixels[0], wanted) and decoded.size == wanted.shape
    assert decoded.rotated == (orientation > 1)


def test_resize_is_bicubic_rounded_and_leaves_the_size_that_is_wanted():
    image = Image.fromarray(_colour(40, 30))
    decoded = decode_image(_encoded(image), 3, (10, 20))
    wanted = np.asarray(image.resize((20, 10), Image.Resampling.BICUBIC))
    assert np.array_equal(decoded.pixels.transpose(1, 2, 0), wanted) and decoded.size == (40, 30)
    assert np.array_equal(decode_image(_encoded(image), 3, (40, 30)).pixels.transpose(1, 2, 0), np.asarray(image))
    constant = Image.new("L", (9, 9), 77)
    assert decode_image(_encoded(constant), 1, (4, 5)).tensor.unique().tolist() == [77]


@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_a_tensor_is_resizing_its_file(channels):
    image = torch.from_numpy(_colour(12, 9)).permute(2, 0, 1)[:channels]
    pixels = image[0] if channels == 1 else image.permute(1, 2, 0)
    file = _encoded(Image.fromarray(pixels.contiguous().numpy()))
    assert torch.equal(resize_image(image, (6, 8)), decode_image(file, channels, (6, 8)).tensor)
    assert resize_image(image, 4).shape == (channels, 4, 4) and torch.equal(resize_image(image, (12, 9)), image)
    with pytest.raises(UsageError, match="0×0"):
        resize_image(image, 0)


def _animated(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    return _encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def _broken_png():
    data = bytearray(_encoded(Image.fromarray(_colour(32, 32))))
    data[len(data) // 2] ^= 1
    return bytes(data)


FAULTS = {
    "the file is empty": lambda: b"",
    "not an image": lambda: b"I am text, renamed",
    "animated": lambda: _animated("GIF"),
    "has several": lambda: _animated("PNG"),
    "several pages": lambda: _animated("TIFF"),
    "damaged": lambda: _encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900],
    "damaged: broken": _broken_png,
    "mode F": lambda: _encoded(Image.new("F", (2, 2)), "TIFF"),
    "mode I": lambda: _encoded(Image.new("I", (2, 2)), "TIFF"),
    "mode LAB": lambda: _encoded(Image.new("LAB", (2, 2)), "TIFF"),
    "too large": lambda: _png(20_000, 20_000, 1, 0, b""),
    "89,478,485 pixels": lambda: _png(10_000, 10_000, 1, 0, b""),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_unusable_files_have_a_reason(reason):
    with pytest.raises(UnusableImageError, match=reason):
        decode_image(FAULTS[reason]())


def test_huge_pictures_are_refused_before_their_pixels_are_decoded(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as other code of the process may leave it
    with pytest.raises(UnusableImageError, match="too large"):
        decode_image(_png(20_000, 20_000, 8, 2, b""))


def test_settings_of_pillow_do_not_let_truncated_files_pass(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UnusableImageError, match="damaged"):
        decode_image(FAULTS["damaged"]())
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_lack_of_memory_is_not_blamed_on_the_file(monkeypatch):
    def load(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(MemoryError):
        decode_image(_encoded(Image.new("L", (2, 2))))


def test_postscript_is_not_interpreted():
    with pytest.raises(UnusableImageError, match="not an image"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")


def test_to_uint8_inverts_the_unit_range_for_all_levels():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1.0), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    with pytest.raises(NumericalError):
        to_uint8(torch.tensor([float("nan")]))


def test_png_round_trip(tmp_path):
    for shape in ((1, 5, 4), (3, 5, 4)):
        image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        save_png(image, tmp_path / "x.png")
        assert torch.equal(read_images([tmp_path / "x.png"])[0], image)
    with pytest.raises(UsageError):
        save_png(torch.zeros(1, 2, 2), tmp_path / "x.png")


def test_grid_places_enlarged_images_row_by_row(tmp_path):
    images = torch.arange(0, 5, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2) * 10
    save_grid(images, tmp_path / "g.png", columns=3, scale=4)
    sheet = read_images([tmp_path / "g.png"])[0, 0]
    assert sheet.shape == (2 * 10 + 2, 3 * 10 + 2)
    assert sheet[2:10, 12:20].unique().tolist() == [10]
    assert sheet[12:20, 2:10].unique().tolist() == [30]
    assert sheet[12:20, 22:30].unique().tolist() == [255] and sheet[:2].unique().tolist() == [255]
