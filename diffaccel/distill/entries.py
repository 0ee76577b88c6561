"""What a comparison trains, as it is typed: `dmd`, `f-distill:divergence=forward-kl`, `recipe:digits-scott:eta=0.1`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.config import merge, parse_overrides
from ..core.errors import DiffaccelError, UsageError, error_of
from ..training.recipes import RunConfig
from .run import resolve_distillation

_RECIPE = "recipe:"
_COMMA = re.compile(r",(?![^\[]*\])")  # not those inside a list
_SETTING = re.compile(r":(?=[A-Za-z_][\w.]*=)")  # not the colon of teacher:1000
_OF_RUN = ("data", "prompts", "lora")


@dataclass(frozen=True)
class Entry:
    """Attributes:
    label: what was typed, but for the folder of a Python file.
    method: name or Python file; None for that of the recipe.
    recipe: None for the one that belongs to teacher and method.
    assignments: as for ``--set``.
    """

    label: str
    method: str | None
    recipe: str | None
    assignments: tuple[str, ...]

    def folder(self, seed: int) -> str:
        """Name of the run folder of a seed."""
        safe = re.sub(r"[^\w.]+", "-", self.label).strip("-")
        return f"{safe}-seed-{seed}"

    def resolve(self, flags: Mapping[str, Any], assignments: Sequence[str], seed: int, steps: int | None) -> RunConfig:
        """The settings of a run: its recipe < ``assignments`` < those of the entry < ``flags``, seed and steps.

        Raises:
            UsageError: unknown method, recipe or setting; seeds or steps that are set twice.
        """
        given = [*assignments, *self.assignments]
        trainer = {"seed": seed} | ({} if steps is None else {"steps": steps})
        twice = [name for name in trainer if name in parse_overrides(given).get("trainer", {})]
        if twice:
            raise UsageError(f"{self.label}: trainer.{twice[0]} belongs to the whole comparison; leave it out here.")
        own = {"method": {"name": self.method}} if self.method else {}
        with self.named():
            return resolve_distillation(merge(flags, own, {"trainer": trainer}), None, given, self.recipe)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors of what is inside begin with the label."""
        try:
            yield
        except DiffaccelError as error:
            raise error_of(error.exit_code, f"{self.label}: {error}") from None


def parse_entries(methods: str | Sequence[str]) -> list[Entry]:
    """Entries that are separated by commas, or a list of them.

    Raises:
        UsageError: none, one without a name, or two of the same name.
    """
    texts = _COMMA.split(methods) if isinstance(methods, str) else list(methods)
    entries = [_entry(text.strip()) for text in texts if text.strip()]
    if not entries:
        raise UsageError("Say what to compare: --methods dmd,f-distill,sid; see `diffaccel list methods`.")
    folders: dict[str, str] = {}
    for entry in entries:
        if entry.folder(0) in folders:
            raise UsageError(f"{folders[entry.folder(0)]!r} and {entry.label!r} cannot be told apart; leave one out.")
        folders[entry.folder(0)] = entry.label
    return entries


def _entry(text: str) -> Entry:
    head, *settings = _SETTING.split(text)
    name = head.removeprefix(_RECIPE)
    if not name or "=" in name:
        raise UsageError(
            f"{text!r} is not METHOD, METHOD:NAME=VALUE or recipe:NAME, such as f-distill:divergence=forward-kl."
        )
    whole = [item if _path(item) in _OF_RUN or "." in _path(item) else f"method.{item}" for item in settings]
    short = ":".join(
        [f"{_RECIPE}{name}" if head != name else Path(name).stem if name.endswith(".py") else name, *settings]
    )
    recipe = name if head != name else None
    return Entry(short, None if recipe else name, recipe, tuple(whole))


def _path(assignment: str) -> str:
    return assignment.partition("=")[0]
