"""Where image files lie: folders and zip archives, listed and read under one policy; nothing is ever extracted.

Image files are found at any depth by their extension, in any case; hidden names (a leading dot) are skipped, and in zip
archives ``__MACOSX`` too. Names are relative, with "/", sorted, and always valid UTF-8: bytes that are not become \\xNN.
In folders symbolic links are followed and each real folder is entered once, so loops end; a folder called x.png is a
folder. What is listed but cannot be read (dangling links, pipes, missing permission, more than 256 MiB; in zip archives
encrypted, oddly compressed and damaged entries) is a reason of that one file. Zip archives with names that could leave
a folder, links, or the same name twice are refused as a whole.
"""

import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

from .errors import DataError
from .images import EXTENSIONS, UnusableImageError

MAX_BYTES = 256 << 20  # 8-bit RGB pixels of the largest picture that `images` decodes
_MAX_LISTED = 10


class Container(Protocol):
    """Image files that can be read by name; picklable, for worker processes.

    Attributes:
        names: the image files, in the order in which they are read.
        label: what to call the container in messages.
    """

    names: list[str]
    label: str

    def read(self, name: str) -> bytes:
        """The bytes of one image file.

        Raises:
            UnusableImageError: with the reason.
        """

    def side_file(self, name: str) -> bytes | None:
        """The bytes of another file, e.g. dataset.json, or None where there is none.

        Raises:
            DataError: it exists and cannot be read.
        """


class PathFiles:
    """A `Container` of given paths, in the given order, which are their names too."""

    def __init__(self, paths: Iterable):
        paths = list(paths)
        self.names = [_readable(os.fsencode(path)) for path in paths]
        self.label, self._paths = "the list of image files", dict(zip(self.names, paths, strict=True))

    def read(self, name: str) -> bytes:
        """As `Container.read`."""
        return _read_plain(self._paths[name])

    def side_file(self, name: str) -> bytes | None:
        """There is none."""
        return None


class FolderFiles:
    """A `Container` of the image files below a folder.

    Raises:
        DataError: not a folder, or one that cannot be listed.
    """

    def __init__(self, root):
        self._root = Path(root)
        self.label = _readable(os.fsencode(root))
        found = {_readable(os.fsencode(name)): name for name in _walk(self._root)}
        self.names = sorted(found)
        self._raw = {name: raw for name, raw in found.items() if name != raw}

    def read(self, name: str) -> bytes:
        """As `Container.read`."""
        return _read_plain(os.path.join(self._root, self._raw.get(name, name)))

    def side_file(self, name: str) -> bytes | None:
        """As `Container.side_file`."""
        path = self._root / name
        try:
            return _read_plain(path) if os.path.lexists(path) else None
        except UnusableImageError as error:
            raise DataError(f"{self.label}/{name} {error}.") from error


class _Entry(NamedTuple):
    offset: int
    packed: int
    size: int
    crc: int
    method: int
    encrypted: bool


class ZipFiles:
    """A `Container` of the image files in a zip archive, whose entries are stored or deflated.

    Every read opens the archive anew, so that processes share no position in it.

    Raises:
        DataError: not a zip archive, names that could leave a folder, links, the same name twice.
    """

    def __init__(self, path):
        self._path, self.label = Path(path), _readable(os.fsencode(path))
        try:
            with zipfile.ZipFile(self._path) as archive:
                entries = archive.infolist()
        except OSError as error:
            raise DataError(f"Cannot read {self.label}: {error.strerror}.") from error
        except Exception as error:  # BadZipFile, NotImplementedError, UnicodeDecodeError, struct.error, …
            raise DataError(f"{self.label} is not a zip archive, or a damaged one: {error}.") from error
        self._refuse([_zip_name(entry) for entry in entries if _is_unsafe(entry)], "names outside it or links")
        self._entries, twice = {}, []
        for entry in entries:
            name = PurePosixPath(_zip_name(entry))
            if entry.is_dir() or any(part.startswith(".") or part == "__MACOSX" for part in name.parts):
                continue
            if name.as_posix() in self._entries:
                twice.append(name.as_posix())
            self._entries[name.as_posix()] = _Entry(
                entry.header_offset,
                entry.compress_size,
                entry.file_size,
                entry.CRC,
                entry.compress_type,
                bool(entry.flag_bits & 1),
            )
        self._refuse(twice, "names more than once")
        self.names = sorted(name for name in self._entries if name.lower().endswith(EXTENSIONS))

    def _refuse(self, names: list[str], what: str) -> None:
        if names:
            more = " …" if len(names) > _MAX_LISTED else ""
            listed = ", ".join(repr(name) for name in names[:_MAX_LISTED])
            raise DataError(f"{self.label} has {what}: {listed}{more}. Unpack it with care and pack it again.")

    def read(self, name: str) -> bytes:
        """As `Container.read`."""
        entry = self._entries[name]
        if entry.encrypted:
            raise UnusableImageError("is encrypted")
        if entry.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # bzip2 and lzma cannot be stopped at the declared size: a bomb would burst before it is seen.
            raise UnusableImageError("is compressed in a way that is not read (only stored and deflated entries are)")
        _check_length(max(entry.size, entry.packed))
        try:
            packed = self._packed(entry)
            if entry.method == zipfile.ZIP_STORED:
                data = packed
            else:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, entry.size + 1)
        except OSError as error:
            raise UnusableImageError(f"cannot be read ({error.strerror})") from error
        except (zlib.error, struct.error, ValueError) as error:
            raise UnusableImageError(f"damaged in the archive: {error}") from error
        if len(data) > entry.size:
            raise UnusableImageError(f"damaged in the archive: unpacks to more than the {entry.size} bytes it declares")
        if len(data) != entry.size or zlib.crc32(data) != entry.crc:
            raise UnusableImageError("damaged in the archive: length or checksum differ from what it declares")
        return data

    def _packed(self, entry: _Entry) -> bytes:
        with open(self._path, "rb", buffering=0) as file:
            file.seek(entry.offset)
            header = file.read(30)
            if header[:4] != b"PK\3\4":
                raise ValueError("its header is not where the archive says")
            file.seek(entry.offset + 30 + sum(struct.unpack_from("<HH", header, 26)))
            return file.read(entry.packed)

    def side_file(self, name: str) -> bytes | None:
        """As `Container.side_file`."""
        try:
            return self.read(name) if name in self._entries else None
        except UnusableImageError as error:
            raise DataError(f"{self.label}/{name} {error}.") from error


def open_container(path) -> FolderFiles | ZipFiles:
    """The image files of a folder or of a zip archive.

    Raises:
        DataError: neither of the two, damaged or unsafe (see `FolderFiles`, `ZipFiles`), or without image files.
    """
    container = FolderFiles(path) if os.path.isdir(path) else ZipFiles(path)
    if not container.names:
        raise DataError(f"{container.label} contains no image files ({' '.join(EXTENSIONS)}).")
    return container


def find_images(folder) -> list[Path]:
    """All image files below a folder, in the order and under the policy of `FolderFiles`.

    Raises:
        DataError: not a folder, or one that cannot be listed.
    """
    names = sorted(_walk(Path(folder)), key=lambda name: _readable(os.fsencode(name)))
    return [Path(folder, name) for name in names]


def _walk(root: Path) -> list[str]:
    """Relative names, with "/", of the image files below ``root``."""
    found, entered, pending = [], set(), [""]
    while pending:
        prefix = pending.pop()
        current = os.path.join(root, prefix)
        try:
            status = os.stat(current)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            # Sorted, so that of two links to one folder the same one wins on every machine.
            entries = sorted(os.scandir(current), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise DataError(f"Cannot list {_readable(os.fsencode(current))}: {error.strerror}.") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                pending.append(f"{prefix}{entry.name}/")
            elif entry.name.lower().endswith(EXTENSIONS):
                found.append(prefix + entry.name)
    return found


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: listed as a file, whose reading gives the reason
        return False


def _read_plain(path) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise UnusableImageError("is not a plain file")
        _check_length(status.st_size)
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise UnusableImageError(f"cannot be read ({error.strerror})") from error


def _check_length(length: int) -> None:
    if length > MAX_BYTES:
        raise UnusableImageError(f"has {length:,} bytes, more than the {MAX_BYTES:,} that are read of one file")


def _readable(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _zip_name(entry: zipfile.ZipInfo) -> str:
    """The name of an entry; archives that do not say how names are encoded are read as folders are: as UTF-8."""
    name = entry.orig_filename
    if not entry.flag_bits & 0x800:
        try:
            return _readable(name.encode("cp437"))  # undoes what zipfile assumed
        except UnicodeEncodeError:
            return name
    return name


def _is_unsafe(entry: zipfile.ZipInfo) -> bool:
    name = _zip_name(entry)
    return (
        name.startswith("/")
        or ".." in name.split("/")
        or re.match("[A-Za-z]:", name) is not None
        or "\\" in entry.orig_filename
        or "\0" in name
        or stat.S_ISLNK(entry.external_attr >> 16)
    )
