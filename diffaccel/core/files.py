"""Files that are either complete or absent: atomic writes, atomic folders and their manifests.

A crash at any moment leaves the old file (or no folder) behind, never half of a new one: bytes go to a hidden
temporary name on the same file system, are flushed to disk, and one rename makes them visible.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from .errors import DataError, DiffaccelError, UsageError

MANIFEST = "manifest.json"
_SCHEMA = 1


def sha256_file(path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path, data: bytes | str) -> None:
    """Write ``data`` (text as UTF-8) to ``path``; readers see the old content or the new, nothing in between.

    Raises:
        UsageError: the folder is missing or read-only, or ``path`` is a folder.
        DiffaccelError: the disk refused the bytes; an existing file is left as it was.
    """
    path = Path(path)
    data = data.encode() if isinstance(data, str) else data
    if path.is_dir():
        raise UsageError(f"Cannot write {path}: it is a folder; give a file name.")
    temporary = _temporary(path)
    try:
        file = open(temporary, "wb")  # noqa: SIM115  an error here is the user's path, an error below is the disk
    except OSError as error:
        raise UsageError(f"Cannot write {path}: {error.strerror}.") from error
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            free = shutil.disk_usage(path.parent).free
            raise DiffaccelError(f"Cannot write {path}: {error.strerror}; {len(data)} bytes, {free} free.") from error
        raise
    _fsync(path.parent)


def check_target(path) -> None:
    """Refuse a file that could not be written at the end of long work, before the work; nothing is left behind.

    Raises:
        UsageError: the folder is missing or read-only, the name too long, or ``path`` is a folder.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UsageError(f"Cannot write {path}: it is a folder; give a file name.")
        probe = _temporary(path)
        open(probe, "wb").close()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"Cannot write {path}: {error.strerror}.") from error


def inside(folder, name: str) -> Path:
    """Return ``folder/name`` for a relative POSIX ``name`` that stays inside the folder, also after symbolic links.

    Raises:
        DataError: an absolute name, one with "..", or a link that leads outside.
    """
    folder = Path(folder)
    parts = PurePosixPath(name)
    if not name or "\\" in name or "\0" in name or parts.is_absolute() or ".." in parts.parts:
        raise DataError(f"The file name {name!r} is not allowed: it must stay inside {folder}.")
    if not (folder / parts).resolve().is_relative_to(folder.resolve()):
        raise DataError(f"The file name {name!r} is not allowed: it leads outside {folder} through a link.")
    return folder / parts


@contextmanager
def atomic_directory(final_path) -> Iterator[Path]:
    """Build a folder under a hidden temporary name; on success write its manifest and rename it to ``final_path``.

    ``manifest.json`` (size and SHA-256 of every file, POSIX relative names) is written last, so a folder with a valid
    manifest is complete. If the block raises, the temporary folder is removed and ``final_path`` does not appear.

    Raises:
        UsageError: ``final_path`` exists, or its parent cannot be written to.
        DataError: the block left a symbolic link or something that is not a plain file in the folder.
    """
    final_path = Path(final_path)
    if final_path.name in ("", ".."):
        raise UsageError(f"{final_path} does not name a new folder.")
    if os.path.lexists(final_path):
        raise UsageError(f"{final_path} exists already; choose another name or remove it first.")
    temporary = final_path.with_name(f".tmp-{final_path.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process that had the same number
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"Cannot create {final_path}: {error.strerror}.") from error
    try:
        yield temporary
        seal(temporary)
        os.rename(temporary, final_path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync(final_path.parent)


def verify_manifest(folder) -> list[str]:
    """Compare a folder with its ``manifest.json``; return one sentence per problem, none if all is intact.

    Files that the manifest does not list are ignored. Nothing outside the folder is read.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [f"{MANIFEST} is missing: the folder was not completed."]
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} cannot be read: {error}."]
    if (
        not isinstance(manifest, dict)
        or manifest.get("schema") != _SCHEMA
        or not isinstance(manifest.get("files"), dict)
    ):
        return [f"{MANIFEST} is not a manifest of schema {_SCHEMA}."]
    found = (_compare(folder, name, record) for name, record in sorted(manifest["files"].items()))
    return [problem for problem in found if problem]


def _compare(folder: Path, name: str, record) -> str | None:
    if not isinstance(record, dict) or not {"size", "sha256"} <= record.keys():
        return f"{name}: the manifest entry is damaged."
    try:
        path = inside(folder, name)
    except DataError as error:
        return str(error)
    if not path.is_file():
        return f"{name} is missing."
    if path.stat().st_size != record["size"]:
        return f"{name} has {path.stat().st_size} bytes, expected {record['size']}."
    if sha256_file(path) != record["sha256"]:
        return f"{name} is damaged: its SHA-256 differs from the manifest."
    return None


def seal(folder: Path) -> None:
    """Flush every file of a folder to disk, then write the manifest that lists them; again, if one was changed since."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise DataError(f"{name} is not a plain file; links and devices are not stored.")
        _fsync(path)
        if path.is_file() and name != MANIFEST:
            files[name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    write_atomic(folder / MANIFEST, json.dumps({"schema": _SCHEMA, "files": files}, indent=1) + "\n")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _fsync(path: Path) -> None:
    with suppress(OSError):  # some network file systems cannot flush folders; the rename is still atomic there
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
