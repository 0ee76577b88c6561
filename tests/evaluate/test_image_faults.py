"""Every fault of an image set, one by one: what a strict reading says, and what is left when bad files are skipped."""

import io
import os
import signal
import stat
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from diffaccel.core.errors import DataError
from diffaccel.core.imagefiles import FolderFiles, ImageReader, ZipFiles, open_container, summarise

SIZE = (8, 6)


def _encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _picture(mode="RGB", size=SIZE, seed=0):
    shape = (*size, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).convert(mode)


def _rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encoded(_picture(size=SIZE[::-1]), "JPEG", exif=exif)


def _animated():
    return _encoded(_picture(), "GIF", save_all=True, append_images=[_picture(seed=1)])


def _huge():
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))  # noqa: E731
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


REFUSED = {
    "zero-byte.png": (lambda: b"", "the file is empty"),
    "truncated.jpg": (lambda: _encoded(_picture(size=(64, 64)), "JPEG")[:700], "damaged: .*truncated"),
    "truncated.png": (lambda: _encoded(_picture(size=(64, 64)))[:700], "damaged: .*truncated"),
    "text.png": (lambda: b"I am a text", "not an image file, whatever its name says"),
    "32-bit.tif": (lambda: _encoded(Image.new("I", SIZE[::-1]), "TIFF"), "32 bits"),
    "float.tif": (lambda: _encoded(Image.new("F", SIZE[::-1]), "TIFF"), "32 bits"),
    "animated.gif": (_animated, "animated or has several pages"),
    "20000.png": (_huge, "limit against decompression bombs"),
    "1x1.png": (lambda: _encoded(_picture(size=(1, 1))), "is 3×1×1 .* but 0.png is 3×8×6"),
}
ACCEPTED = {
    "16-bit.png": (lambda: _encoded(Image.fromarray(np.full(SIZE, 40_000, np.uint16))), "I;16"),
    "rgba.png": (lambda: _encoded(_picture("RGBA")), "RGBA"),
    "palette.png": (lambda: _encoded(_picture("P")), "P"),
    "cmyk.jpg": (lambda: _encoded(_picture("CMYK"), "JPEG"), "CMYK"),
    "grey.png": (lambda: _encoded(_picture("L")), "L"),
    "bilevel.png": (lambda: _encoded(_picture("1")), "1"),
    "rotated.jpg": (_rotated, "RGB"),
    "UPPER.PNG": (lambda: _encoded(_picture(seed=2)), "RGB"),
    "double.png": (lambda: _encoded(_picture()), "RGB"),
    "x.webp": (lambda: _encoded(_picture(), "WEBP"), "RGB"),
}


def _containers(tmp_path, files):
    """The same files as a folder and as an archive."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in files.items():
            (folder / name).write_bytes(data)
            archive.writestr(name, data)
    return [open_container(folder), open_container(tmp_path / "x.zip")]


def _read(container, skip_bad=False, workers=0):
    reader = ImageReader(container, 3, skip_bad=skip_bad, workers=workers)
    shapes = [tuple(image.shape) for batch in reader.batches(4) for image in batch.images]
    return shapes, summarise(reader.records)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    make, reason = REFUSED[name]
    good = _encoded(_picture())
    for container in _containers(tmp_path, {"0.png": good, name: make(), "z.png": good}):
        with pytest.raises(DataError, match=rf"^1 image file\(s\) cannot be used: {name}: .*{reason}.*--skip-bad"):
            _read(container)
        shapes, summary = _read(container, skip_bad=True)
        assert shapes == [(3, *SIZE)] * 2 and summary["count"] == 2
        assert [entry["name"] for entry in summary["skipped"]] == [name]


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(tmp_path, name):
    make, mode = ACCEPTED[name]
    for container in _containers(tmp_path, {"0.png": _encoded(_picture()), name: make()}):
        for skip_bad in (False, True):
            shapes, summary = _read(container, skip_bad)
            assert shapes == [(3, *SIZE)] * 2 and summary["sizes"] == {"8x6": 2} and not summary["skipped"]
            assert mode in summary["modes"] and summary["rotated"] == (name == "rotated.jpg")
            assert summary["duplicates"] == (name == "double.png")


def test_sets_of_one_pixel(tmp_path):
    for container in _containers(tmp_path, {"a.png": _encoded(_picture(size=(1, 1)))}):
        assert _read(container)[0] == [(3, 1, 1)]


def test_all_faults_together_are_counted_by_any_number_of_workers(tmp_path):
    files = {"0.png": _encoded(_picture()), ".hidden.png": b"", "notes.txt": b"", "._UPPER.PNG": b"x"}
    files |= {name: make() for name, (make, _) in {**REFUSED, **ACCEPTED}.items()}
    first = None
    for container in _containers(tmp_path, files):
        for workers in (0, 2):
            shapes, summary = _read(container, True, workers)
            assert len(shapes) == summary["count"] == len(ACCEPTED) + 1
            assert {entry["name"] for entry in summary["skipped"]} == set(REFUSED)
            first = first or summary
            assert summary == first
            with pytest.raises(DataError, match=f"^{len(REFUSED)} image"):
                _read(container, False, workers)


def test_links_loops_and_folders_called_like_images(tmp_path):
    (tmp_path / "x.png").mkdir()
    (tmp_path / "x.png" / "a.png").write_bytes(_encoded(_picture()))
    (tmp_path / "x.png" / "loop").symlink_to(tmp_path)
    assert _read(open_container(tmp_path))[1]["count"] == 1
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle.png").symlink_to("circle.png")
    with pytest.raises(
        DataError, match=r"^2 .*circle\.png: cannot be read \(Too many.*dangling\.png: .*\(No such file"
    ):
        _read(open_container(tmp_path))
    assert _read(open_container(tmp_path), skip_bad=True)[1]["count"] == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_unreadable(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(_encoded(_picture()))
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(DataError, match=r"a\.png: cannot be read \(Permission denied\)"):
        _read(open_container(tmp_path))
    assert _read(open_container(tmp_path), skip_bad=True)[1]["count"] == 1


def test_names_that_are_not_utf8(tmp_path):
    for name, data in ((b"\xff.png", _encoded(_picture())), (b"\xfe.png", b"")):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(data)
    with pytest.raises(DataError, match=r"\\xfe\.png: the file is empty") as error:
        _read(open_container(tmp_path))
    assert str(error.value).encode()
    summary = _read(open_container(tmp_path), True, workers=1)[1]
    assert summary["first"] == "\\xff.png" and summary["skipped"][0]["name"] == "\\xfe.png"


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png", "..\\x.png", "C:\\x.png"])
def test_archives_that_reach_outside_are_refused_whatever_is_skipped(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", _encoded(_picture()))
        archive.writestr(name, _encoded(_picture()))
    with pytest.raises(DataError, match="names outside it or links"):
        open_container(tmp_path / "x.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


def test_archives_with_links_are_refused(tmp_path):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(link, "../secret.png")
    with pytest.raises(DataError, match="links"):
        open_container(tmp_path / "x.zip")


def test_one_damaged_entry_of_an_archive_is_one_bad_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in "abc":
            archive.writestr(f"{name}.png", _encoded(_picture()))
        offset = archive.getinfo("b.png").header_offset
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[offset + 100] ^= 1
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"^1 .*b\.png: damaged in the archive"):
        _read(ZipFiles(tmp_path / "x.zip"))
    assert _read(ZipFiles(tmp_path / "x.zip"), True, workers=2)[1]["count"] == 2


class Fatal(FolderFiles):
    """Reading one of its files kills the process that tries."""

    def read(self, name):
        if name == "05.png" and os.getpid() != PARENT:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(name)


PARENT = os.getpid()


@pytest.fixture
def ten(tmp_path):
    for index in range(10):
        (tmp_path / f"{index:02d}.png").write_bytes(_encoded(_picture(seed=index)))
    return tmp_path


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_worker_that_dies_is_named_with_what_it_read(ten, skip_bad):
    reader = ImageReader(Fatal(ten), 3, workers=2, skip_bad=skip_bad)
    batches = reader.batches(2)
    assert next(batches).index.tolist() == [0, 1] and next(batches).index.tolist() == [2, 3]
    with pytest.raises(DataError, match=r"worker process \d+ died \(SIGKILL\) while it read 04\.png … 05\.png.*--work"):
        next(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_is_deleted_during_the_reading_is_a_bad_file(ten, workers):
    def read(skip_bad):
        batches = ImageReader(container, 3, workers=workers, skip_bad=skip_bad).batches(1)
        yield next(batches)
        (ten / "09.png").unlink()
        yield from batches

    container = open_container(ten)
    with pytest.raises(DataError, match=r"^1 .*09\.png: cannot be read \(No such file or directory\)"):
        list(read(False))
    (ten / "09.png").write_bytes(_encoded(_picture()))
    assert [int(batch.index) for batch in read(True)] == list(range(9))
