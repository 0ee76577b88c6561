"""Folders and zip archives: what is listed, in which order, what is refused and what is a reason of one file."""

import os
import stat
import struct
import zipfile
from multiprocessing.reduction import ForkingPickler

import pytest

from diffaccel.core import containers
from diffaccel.core.containers import FolderFiles, PathFiles, ZipFiles, find_images, open_container
from diffaccel.core.errors import DataError
from diffaccel.core.images import UnusableImageError

NAMES = ("b.PNG", "a/z.Jpg", "a.jpeg", ".hidden.png", ".dir/x.png", "notes.txt", "a/._z.png", "a b/ü.webp")
IMAGES = ["a b/ü.webp", "a.jpeg", "a/z.Jpg", "b.PNG"]


def _fill(folder, names=NAMES):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(name.encode())
    return folder


def _zip(path, names=NAMES, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name in names:
            archive.writestr(name, name.encode())
    return path


def _zip_of_one(path, name: bytes):
    """An archive with a name that zipfile would not write, and no word on how it is encoded."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("?" * len(name), b"1")
    path.write_bytes(path.read_bytes().replace(b"?" * len(name), name))
    return path


def test_zip_and_folder_list_and_read_the_same(tmp_path):
    folder = open_container(_fill(tmp_path / "x"))
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        archive = open_container(_zip(tmp_path / "x.zip", compression=method))
        assert folder.names == archive.names == IMAGES
        assert [archive.read(name) for name in IMAGES] == [folder.read(name) for name in IMAGES]
    assert folder.read("a/z.Jpg") == b"a/z.Jpg"
    for container in (folder, archive):
        assert container.side_file("notes.txt") == b"notes.txt" and container.side_file("dataset.json") is None
        copy = ForkingPickler.loads(ForkingPickler.dumps(container))  # as it travels to workers
        assert copy.names == IMAGES and copy.read("b.PNG") == b"b.PNG" and copy.label == container.label


def test_order_is_that_of_names_not_of_folders(tmp_path):
    names = ["a-b.png", "a.png", "a/b.png", "a0.png", "a/b/c.png", "B.png"]
    assert FolderFiles(_fill(tmp_path / "x", names)).names == sorted(names)
    assert ZipFiles(_zip(tmp_path / "x.zip", reversed(names))).names == sorted(names)
    assert [str(path.relative_to(tmp_path / "x")) for path in find_images(tmp_path / "x")] == sorted(names)


def test_folder_follows_links_once_and_loops_end(tmp_path):
    _fill(tmp_path)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "a")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    _fill(tmp_path / "folder.png", ["in.png"])
    files = FolderFiles(tmp_path)
    assert files.names == sorted([*IMAGES, "self.png", "gone.png", "pipe.png", "folder.png/in.png"])
    for name, reason in (("self.png", "symbolic links"), ("gone.png", "No such file"), ("pipe.png", "not a plain")):
        with pytest.raises(UnusableImageError, match=reason):
            files.read(name)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_files_without_permission_have_a_reason(tmp_path):
    _fill(tmp_path, ["a.png"])
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(UnusableImageError, match="Permission denied"):
        FolderFiles(tmp_path).read("a.png")


def test_names_that_are_not_utf8_are_escaped_everywhere(tmp_path):
    raw = b"\xfc.png"
    (tmp_path / "x").mkdir()
    with open(os.path.join(os.fsencode(tmp_path / "x"), raw), "wb") as file:
        file.write(b"1")
    for container in (FolderFiles(tmp_path / "x"), ZipFiles(_zip_of_one(tmp_path / "x.zip", raw))):
        assert container.names == ["\\xfc.png"] and container.read("\\xfc.png") == b"1"
    assert PathFiles(find_images(tmp_path / "x")).read(f"{tmp_path}/x/\\xfc.png") == b"1"


def test_zip_names_without_declared_encoding_are_utf8(tmp_path):
    assert ZipFiles(_zip_of_one(tmp_path / "x.zip", "ü.png".encode())).names == ["ü.png"]


def test_given_paths_keep_their_order_and_may_repeat(tmp_path):
    _fill(tmp_path, ["a.png", "b.png"])
    paths = [tmp_path / "b.png", str(tmp_path / "a.png"), tmp_path / "b.png"]
    files = PathFiles(paths)
    assert files.names == [str(path) for path in paths] and files.read(files.names[2]) == b"b.png"


def test_what_is_neither_folder_nor_archive(tmp_path):
    (tmp_path / "text.zip").write_text("not an archive")
    (tmp_path / "empty.zip").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    cases = {"text.zip": "not a zip", "empty.zip": "not a zip", "gone": "No such file", "empty": "no image files"}
    for name, sentence in cases.items():
        with pytest.raises(DataError, match=sentence):
            open_container(tmp_path / name)
    with pytest.raises(DataError, match="no image files"):
        open_container(_zip(tmp_path / "text.zip", ["notes.txt", "__MACOSX/a.png", ".a.png"]))
    with pytest.raises(DataError, match="Cannot list"):
        find_images(tmp_path / "nope")


UNSAFE = ["../x.png", "a/../../x.png", "/x.png", "C:x.png", "c:/x.txt", "a\\x.png", "..", "__MACOSX/../x", ".a/../x"]


@pytest.mark.parametrize("name", UNSAFE)
def test_zip_with_a_name_that_could_leave_a_folder_is_refused(tmp_path, name):
    archive = _zip(tmp_path / "x.zip", ["good.png", name])
    with pytest.raises(DataError, match="outside it or links") as error:
        ZipFiles(archive)
    assert repr(name) in str(error.value) and "good" not in str(error.value)


def test_zip_names_are_normalised_and_two_dots_are_no_crime(tmp_path):
    assert ZipFiles(_zip(tmp_path / "x.zip", ["./a.png", "b//c.png", "d..png", "e../f.png"])).names == [
        "a.png",
        "b/c.png",
        "d..png",
        "e../f.png",
    ]


def test_zip_links_and_repeated_names_are_refused(tmp_path):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match=r"links: 'link\.png'"):
        ZipFiles(tmp_path / "x.zip")
    with pytest.raises(DataError, match=r"more than once: 'a\.png'"):
        ZipFiles(_zip(tmp_path / "x.zip", ["a.png", "./a.png"]))


def _edited(path, central: dict, size=100):
    """An archive of one deflated entry whose fields in the central directory, by offset, are overwritten."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"x" * size)
    data = bytearray(path.read_bytes())
    start = data.rindex(b"PK\1\2")
    for offset, value in central.items():
        data[start + offset : start + offset + len(value)] = value
    path.write_bytes(data)
    return ZipFiles(path)


ENTRIES = {
    "encrypted": {8: struct.pack("<H", 1)},
    "only stored and deflated": {10: struct.pack("<H", zipfile.ZIP_BZIP2)},
    "checksum": {16: struct.pack("<I", 7)},
    "more than the 268,435,456": {24: struct.pack("<I", 3 << 30)},
    "more than the 99 bytes": {24: struct.pack("<I", 99)},
    "length": {24: struct.pack("<I", 101)},
    "header is not where": {42: struct.pack("<I", 3)},
}


@pytest.mark.parametrize("reason", ENTRIES)
def test_zip_entries_that_cannot_be_read_have_a_reason(tmp_path, reason):
    files = _edited(tmp_path / "x.zip", ENTRIES[reason])
    with pytest.raises(UnusableImageError, match=reason):
        files.read("a.png")
    with pytest.raises(DataError, match=reason):
        files.side_file("a.png")


def test_zip_with_damaged_data_or_cut_short(tmp_path):
    files = _edited(tmp_path / "x.zip", {})
    whole = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(whole[:35] + b"\xff\xff\xff" + whole[38:])
    with pytest.raises(UnusableImageError, match="damaged in the archive"):
        files.read("a.png")
    (tmp_path / "x.zip").write_bytes(whole[:20])
    with pytest.raises(UnusableImageError, match="damaged in the archive"):
        files.read("a.png")
    with pytest.raises(DataError, match="not a zip archive"):
        ZipFiles(tmp_path / "x.zip")
    (tmp_path / "x.zip").unlink()
    with pytest.raises(UnusableImageError, match="No such file"):
        files.read("a.png")


def test_a_bomb_is_stopped_at_what_it_declares(tmp_path, monkeypatch):
    longest = []

    class Watched:
        def __init__(self, bits):
            self.inner = zlib_decompressor(bits)

        def decompress(self, data, limit):
            unpacked = self.inner.decompress(data, limit)
            longest.append(len(unpacked))
            return unpacked

    zlib_decompressor = containers.zlib.decompressobj
    monkeypatch.setattr(containers.zlib, "decompressobj", Watched)
    with pytest.raises(UnusableImageError, match="more than the 99 bytes"):
        _edited(tmp_path / "x.zip", ENTRIES["more than the 99 bytes"], size=10_000_000).read("a.png")
    assert longest == [100]


def test_long_files_of_folders_are_refused_too(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "MAX_BYTES", 4)
    with pytest.raises(UnusableImageError, match="5 bytes, more than the 4"):
        FolderFiles(_fill(tmp_path, ["a.png"])).read("a.png")
    with pytest.raises(DataError, match=r"notes\.txt has 9 bytes"):
        FolderFiles(_fill(tmp_path)).side_file("notes.txt")
