"""An append-only record of what was evaluated, so that a search that was stopped can be continued."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from ..core.errors import DataError, UsageError


class Journal:
    """Scores by key, one JSON object per line, after a first line with the settings they belong to.

    Args:
        path: of the file; None for a journal in memory only.
        settings: what scores depend on; a file with other settings is refused.
        resume: continue a file that exists; without, an existing one is refused.
        what: it is the record of, for messages.

    Attributes:
        scores: of all keys so far.
        facts: what was settled once for the whole search, such as the budget that a time was turned into.

    Raises:
        UsageError: a file that exists, or does not; settings that differ, with their names; a path that cannot be written.
        DataError: a file that is no journal.
    """

    def __init__(self, path: Path | None, settings: Mapping, resume: bool = False, what: str = "search"):
        self.path, self.scores, self.facts, self.what = path and Path(path), {}, {}, what
        if self.path is None:
            return
        if resume:
            self._read(json.loads(json.dumps(settings)))
        elif self.path.exists():
            raise UsageError(f"{self.path} holds another {self.what}: continue it with --resume, or remove it first.")
        else:
            self._append({"settings": settings})

    def add(self, key: str, score: float) -> None:
        """Write a score down; it is on the disk when this returns. Scores that are not finite count as infinite."""
        self.scores[key] = score if math.isfinite(score) else math.inf
        if self.path is not None:
            self._append({"key": key, "score": score if math.isfinite(score) else None})

    def settle(self, name: str, value):
        """The value written under this name, which is the given one unless the journal has one already."""
        if name not in self.facts:
            self.facts[name] = value
            if self.path is not None:
                self._append({"fact": name, "value": value})
        return self.facts[name]

    def _append(self, entry: Mapping) -> None:
        line = json.dumps(entry) + "\n"
        self._write("ab", lambda file: file.write(line.encode()))

    def _write(self, mode: str, change: Callable[[BinaryIO], object]) -> None:
        try:
            with open(self.path, mode) as file:
                change(file)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UsageError(f"Cannot write {self.path}: {error.strerror}.") from error

    def _read(self, settings: Mapping) -> None:
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise UsageError(f"There is no {self.what} to resume at {self.path}: {error.strerror}.") from None
        whole = data[: data.rfind(b"\n") + 1]  # a line that was being written when the machine stopped is dropped
        try:
            lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
            found = dict(lines[0]["settings"])
            for line in lines[1:]:
                if "fact" in line:
                    self.facts[line["fact"]] = line["value"]
                else:
                    score = math.inf if line["score"] is None else float(line["score"])
                    self.scores[line["key"]] = score if math.isfinite(score) else math.inf
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise DataError(f"{self.path} is not the journal of a {self.what}: {error!r}.") from None
        changed = [key for key in {**found, **settings} if found.get(key) != settings.get(key)]
        if changed:
            listed = ", ".join(f"{key} was {found.get(key)!r} and is {settings.get(key)!r}" for key in sorted(changed))
            raise UsageError(f"{self.path} belongs to a {self.what} with other settings: {listed}.")
        if len(whole) < len(data):
            self._write("rb+", lambda file: file.truncate(len(whole)))
