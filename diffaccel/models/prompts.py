"""Prompts to draw: from a text file, or those that a model brings."""

from pathlib import Path

from ..core.errors import DataError, UsageError
from .teachers import TEACHERS, resolve_teacher

_FILE = "prompts.txt"


def load_prompts(path) -> list[str]:
    """Read prompts, without white space at their ends.

    Args:
        path: text file in UTF-8 with a prompt a line, empty lines aside; or a teacher or model folder that brings prompts.

    Raises:
        UsageError: another kind of file than ``.txt``.
        DataError: not readable, not text, or no prompts.
    """
    path = Path(path).expanduser()
    if path.is_dir() or (str(path) in TEACHERS and not path.exists()):
        own = own_prompts(str(path))
        if own is None:
            raise DataError(
                f"{path} brings no prompts; give a text file with a prompt a line, or a teacher such as tiny-sd."
            )
        return own
    if path.suffix.lower() != ".txt":
        raise UsageError(f"{path} is no file of prompts; expected .txt, a prompt a line, or a teacher such as tiny-sd.")
    return _read(path)


def own_prompts(name_or_path: str) -> list[str] | None:
    """The prompts that stand for what a text-to-image model was trained on, from prompts.txt in its folder.

    None for a model without that file.

    Raises:
        UsageError, DataError, MissingWeightsError: as `teachers.resolve_teacher`, and for the file as `load_prompts`.
    """
    file = resolve_teacher(name_or_path)[0] / _FILE
    return _read(file) if file.is_file() else None


def save_prompts(prompts: list[str], folder: Path) -> None:
    """Write the prompts that a text-to-image model was trained on into its folder, as `own_prompts` finds them."""
    text = "".join(f"{' '.join(prompt.split())}\n" for prompt in prompts)
    (folder / _FILE).write_text(text, encoding="utf-8")


def _read(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"Cannot read the prompts {path}: {error.strerror}.") from error
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise DataError(f"{path} is not text in UTF-8; write one prompt a line.")
    found = [line.strip() for line in text.split("\n") if line.strip()]
    if not found:
        raise DataError(f"{path} holds no prompt; write one a line.")
    return found
