"""Prompts to draw, from a text file or those that a model brings."""

from pathlib import Path

from ..core.errors import DataError, UsageError
from ..models.teachers import TEACHERS, own_prompts
from .captions import load_captions


def load_prompts(path) -> list[str]:
    """Read prompts.

    Args:
        path: text file in UTF-8 with a prompt a line; or a teacher or model folder that brings prompts.

    Raises:
        UsageError: another kind of file than ``.txt``.
        DataError: not readable, not text, empty, or with empty lines.
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
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read the prompts {path}: {error.strerror}.") from error
    if not content.strip():
        raise DataError(f"{path} is empty; expected a prompt a line.")
    lines = content.removesuffix(b"\n").count(b"\n") + 1
    return load_captions(path, [str(number) for number in range(lines)])  # as captions, of as many images
