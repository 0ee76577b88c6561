"""The decode policy of image files, every fault of a folder, and pictures for people."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.core.errors import DataError, NumericalError, UsageError
from diffaccel.core.images import (
    ImageFiles,
    UnusableImageError,
    decode_image,
    find_images,
    read_images,
    save_grid,
    save_png,
    to_uint8,
)


def _encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _grey(height=8, width=8):
    return np.arange(height * width, dtype=np.uint8).reshape(height, width)


def test_grey_and_rgb_are_kept():
    grey, kind = decode_image(_encoded(Image.fromarray(_grey())))
    assert kind == "PNG" and grey.dtype == torch.uint8
    torch.testing.assert_close(grey[0], torch.from_numpy(_grey()))
    colour = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    decoded, _ = decode_image(_encoded(Image.fromarray(colour)))
    torch.testing.assert_close(decoded.permute(1, 2, 0), torch.from_numpy(colour))


def test_grey_to_rgb_and_back_is_the_identity():
    data = _encoded(Image.fromarray(_grey()))
    rgb, _ = decode_image(data, 3)
    assert rgb.shape == (3, 8, 8) and bool((rgb == rgb[:1]).all())
    back, _ = decode_image(_encoded(Image.fromarray(rgb.permute(1, 2, 0).numpy())), 1)
    torch.testing.assert_close(back, decode_image(data, 1)[0])


def test_16_bit_grey_is_scaled_not_saturated():
    levels = np.array([[0, 257, 32896, 65535, 128, 129]], dtype=np.uint16)
    decoded, _ = decode_image(_encoded(Image.fromarray(levels)))
    assert decoded.flatten().tolist() == [0, 1, 128, 255, 0, 1]


def test_transparency_shows_the_white_page():
    clear_red = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert decode_image(_encoded(clear_red))[0].unique().tolist() == [255]
    half_black = Image.new("LA", (2, 2), (0, 51))
    assert decode_image(_encoded(half_black), 1)[0].unique().tolist() == [204]


def test_palette_with_transparent_entry_and_cmyk():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert decode_image(_encoded(palette))[0].flatten().tolist() == [255, 0, 0, 0, 0, 255]
    transparent = decode_image(_encoded(palette, transparency=1))[0]
    assert transparent[:, 0, 1].tolist() == [255, 255, 255]
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = decode_image(_encoded(cmyk, "JPEG", quality=100))[0]
    assert red[0].min() > 240 and red[1:].max() < 15


def test_bilevel_is_grey():
    assert decode_image(_encoded(Image.new("1", (2, 2), 1)))[0].tolist() == [[[255, 255], [255, 255]]]


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90° clockwise
    image = Image.fromarray(np.repeat(_grey(2, 3)[..., None] * 40, 3, axis=2))
    decoded, _ = decode_image(_encoded(image, "PNG", exif=exif))
    torch.testing.assert_close(decoded[0], torch.from_numpy(np.rot90(_grey(2, 3) * 40, -1).copy()))


def _animated(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    return _encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def _large_png():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _encoded(Image.new("1", (20_000, 20_000)))


FAULTS = {
    "the file is empty": lambda: b"",
    "not an image": lambda: b"I am text, renamed",
    "animated": lambda: _animated("GIF"),
    "several pages": lambda: _animated("TIFF"),
    "damaged": lambda: _encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900],
    "mode F": lambda: _encoded(Image.new("F", (2, 2)), "TIFF"),
    "mode I": lambda: _encoded(Image.new("I", (2, 2)), "TIFF"),
    "too large": _large_png,
}


@pytest.mark.parametrize("reason", FAULTS)
def test_unusable_files_have_a_reason(reason):
    with pytest.raises(UnusableImageError, match=reason):
        decode_image(FAULTS[reason]())


def test_postscript_is_not_interpreted():
    with pytest.raises(UnusableImageError, match="not an image"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")


def test_find_is_recursive_sorted_and_survives_link_loops(tmp_path):
    for name in ("b.PNG", "a/z.Jpg", "a.jpeg", ".hidden.png", ".dir/x.png", "notes.txt", "a/._z.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "a")
    names = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert names == ["a.jpeg", "a/z.Jpg", "b.PNG"]


def test_find_needs_a_folder(tmp_path):
    with pytest.raises(DataError, match="Cannot list"):
        find_images(tmp_path / "nope")


def test_strict_reader_lists_offenders_and_skip_bad_accounts_for_them(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(_encoded(Image.fromarray(_grey() + index)))
    (tmp_path / "1b.png").write_bytes(b"")
    (tmp_path / "other.png").write_bytes(_encoded(Image.fromarray(_grey(4, 4))))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    paths = find_images(tmp_path)
    with pytest.raises(DataError, match=r"3 image file\(s\).*1b.png: the file is empty.*gone.png.*other.png: is 1×4×4"):
        read_images(paths)
    files = ImageFiles(paths, skip_bad=True, root=tmp_path)
    assert torch.stack(list(files)).shape == (3, 1, 8, 8)
    assert files.count == 3 and files.first == "0.png" and files.formats == {"PNG": 3}
    assert [name for name, _ in files.skipped] == ["1b.png", "gone.png", "other.png"]
    first = files.digest
    assert len(list(files)) == 3 and files.digest == first  # a second pass counts anew


def test_strict_reader_stops_at_ten(tmp_path):
    for index in range(15):
        (tmp_path / f"{index:02d}.png").write_bytes(b"x")
    with pytest.raises(DataError) as error:
        read_images(find_images(tmp_path))
    assert str(error.value).count("not an image") == 10 and "stopped" in str(error.value)
    with pytest.raises(DataError, match="None of the 15"):
        read_images(find_images(tmp_path), skip_bad=True)
    with pytest.raises(DataError, match="no image files"):
        read_images([])


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
