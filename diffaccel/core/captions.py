"""Captions of images, from one file for all of them or from files beside them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from .errors import DataError, UsageError

METADATA = "metadata.jsonl"
TEXT_KEYS = ("text", "prompt", "caption")  # the first that an entry has
_MAX_LISTED = 10


def load_captions(path, names: Sequence[str]) -> list[str]:
    """Read the captions of images from one file in UTF-8.

    Args:
        path: ``.txt``, one caption a line in the order of the images; ``.jsonl``, one object a line with "file_name"
            and "text", "prompt" or "caption", as metadata.jsonl of Hugging Face's imagefolder; or ``.json``, one
            object from names to captions. The last two may hold other images too.
        names: relative names of the N images with "/", in their order.

    Returns:
        N captions, none empty, without white space at their ends.

    Raises:
        UsageError: another kind of file.
        DataError: not readable, not text, images without a caption, or a number of lines other than N.
    """
    path = Path(path).expanduser()
    kind = path.suffix.lower()
    if kind not in (".txt", ".jsonl", ".json"):
        raise UsageError(
            f"{path} is no file of captions; expected .txt (a caption a line, in the order of the images), .jsonl or .json."
        )
    try:
        text = _text(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"Cannot read the captions {path}: {error.strerror}.") from error
    if kind == ".txt":
        return _from_lines(text, names, str(path))
    table = _from_objects(text, str(path)) if kind == ".jsonl" else _from_mapping(text, str(path))
    return _look_up(table, names, str(path))


def find_captions(names: Sequence[str], read: Callable[[str], bytes | None]) -> list[str]:
    """Read the captions that lie beside images: metadata.jsonl at the top, else a text file for each image.

    Args:
        names: relative names of the N images with "/"; the caption of a/1.png is a/1.txt.
        read: gives the bytes of a file by its relative name, None where there is none.

    Returns:
        N captions, as from `load_captions`.

    Raises:
        DataError: images without a caption, or damaged files.
    """
    metadata = read(METADATA)
    if metadata is not None:
        return _look_up(_from_objects(_text(metadata, METADATA), METADATA), names, METADATA)
    files = {name: PurePosixPath(name).with_suffix(".txt").as_posix() for name in names}
    found = {name: read(file) for name, file in files.items()}
    if names and all(data is None for data in found.values()):
        raise DataError(
            f"The images have no captions: neither {METADATA} nor text files such as {files[names[0]]} lie beside them; "
            "give a file of captions with --captions FILE."
        )
    texts = {name: _text(data, files[name]) for name, data in found.items() if data is not None}
    captions = {name: _caption(" ".join(text.split()), files[name]) for name, text in texts.items()}
    return _look_up(captions, names, "The text files beside the images")


def _text(data: bytes, label: str) -> str:
    if b"\0" in data:
        raise DataError(f"{label} is not text in UTF-8 (it contains zero bytes); save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{label} is not text in UTF-8 (line {line}); save it as UTF-8.") from None


def _lines(text: str) -> list[str]:
    """Lines without their ends; not str.splitlines, which also splits at characters that captions may contain."""
    return [line.strip() for line in text.removesuffix("\n").split("\n")] if text else []


def _from_lines(text: str, names: Sequence[str], label: str) -> list[str]:
    lines = _lines(text)
    empty = [str(number) for number, line in enumerate(lines, 1) if not line]
    if empty:
        raise DataError(f"{label} has empty lines, but every line is the caption of one image: {_listed(empty)}.")
    if len(lines) != len(names):
        order = f" (sorted by name: {names[0]} first, {names[-1]} last)" if names else ""
        raise DataError(f"{label} has {len(lines)} captions, one a line, but there are {len(names)} images{order}.")
    return lines


def _from_objects(text: str, label: str) -> dict[str, str]:
    table: dict[str, str] = {}
    for number, line in enumerate(_lines(text), 1):
        if not line:
            continue
        place = f"{label}, line {number}"
        entry = _json(line, place)
        name = entry.get("file_name") if isinstance(entry, dict) else None
        key = next((key for key in TEXT_KEYS if isinstance(entry, dict) and key in entry), None)
        if not isinstance(name, str) or key is None:
            raise DataError(f'{place} must be an object with "file_name" and one of {", ".join(TEXT_KEYS)}.')
        name, caption = _normal(name), _caption(entry[key], place)
        if table.setdefault(name, caption) != caption:
            raise DataError(f"{place} gives {name} a second caption; one for each image is expected.")
    return table


def _from_mapping(text: str, label: str) -> dict[str, str]:
    table = _json(text, label)
    if not isinstance(table, dict):
        raise DataError(f"{label} must be one object from image names to captions, not a {type(table).__name__}.")
    return {_normal(name): _caption(caption, f"{label}, {name}") for name, caption in table.items()}


def _json(text: str, label: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{label} is not valid JSON: {error}.") from error


def _caption(value, label: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{label}: the caption must be a text that is not empty, got {value!r}.")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        raise DataError(f"{label}: the caption contains characters that do not exist in Unicode.") from None
    return value.strip()


def _normal(name: str) -> str:
    return PurePosixPath(name).as_posix()


def _look_up(table: Mapping[str, str], names: Sequence[str], label: str) -> list[str]:
    missing = [name for name in names if _normal(name) not in table]
    if missing:
        known = f" It names {next(iter(table))}, for example." if table and len(missing) == len(names) else ""
        verb = "lack" if label.startswith("The ") else "lacks"
        raise DataError(f"{label} {verb} captions of {len(missing)} of {len(names)} images: {_listed(missing)}.{known}")
    return [table[_normal(name)] for name in names]


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return ", ".join(items[:_MAX_LISTED]) + more
