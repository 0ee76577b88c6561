"""What verbs share: tables, default run folders."""

import signal
import time
from collections.abc import Sequence
from pathlib import Path

import typer

from ..core.errors import InterruptedRun, UsageError


def note(text: str) -> None:
    """Progress and hints go to stderr; stdout is for results."""
    typer.echo(text, err=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; the first left, numbers right."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    numeric = [all(_number(row[i]) for row in rows) for i in range(len(header))]

    def line(cells):
        parts = [f"{c!s:>{w}}" if right else f"{c!s:<{w}}" for c, w, right in zip(cells, widths, numeric, strict=True)]
        return "  ".join(parts).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def make_folder(path: Path) -> None:
    """Create a folder for results.

    Raises:
        UsageError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"Cannot write to {path}: {error.strerror}.") from None


def run_folder(verb: str, *names: str) -> Path:
    """runs/DATE-TIME-VERB-NAMES, made of safe characters."""
    safe = ["".join(c if c.isalnum() or c in "-_." else "-" for c in Path(name).name) for name in names]
    return Path("runs") / "-".join([time.strftime("%Y%m%d-%H%M%S"), verb, *safe])


def interrupted(stop: BaseException, text: str) -> InterruptedRun:
    """The error of work that Ctrl-C (KeyboardInterrupt) or SIGTERM (SystemExit) ended, with one sentence of what is left."""
    return InterruptedRun(text, signal.SIGTERM if isinstance(stop, SystemExit) else signal.SIGINT)


def _number(cell) -> bool:
    return str(cell)[:1].isdigit() or str(cell).startswith(("-", "–", "+"))
