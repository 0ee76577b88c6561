"""Options that the training verbs share."""

from pathlib import Path
from typing import Annotated, Any

import typer

_LOOP, _FILES = "Training loop", "Settings and files"

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Run folder; default runs/DATE-…", rich_help_panel=_FILES)
]
Config = Annotated[Path | None, typer.Option(help="YAML file over the recipe.", rich_help_panel=_FILES)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Any setting, repeatable: --set trainer.ema=0.999 (see --dry-run).", rich_help_panel=_FILES
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print plan and settings, then stop.", rich_help_panel=_FILES)]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --output.", rich_help_panel=_FILES)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no hints.", rich_help_panel=_FILES)]
Steps = Annotated[int | None, typer.Option(help="Training steps.", rich_help_panel=_LOOP)]
BatchSize = Annotated[int | None, typer.Option(help="Samples per update.", rich_help_panel=_LOOP)]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.", rich_help_panel=_LOOP)]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.", rich_help_panel=_LOOP)]
Threads = Annotated[int | None, typer.Option(help="CPU threads; 0 for torch's default.", rich_help_panel=_LOOP)]


def trainer_flags(**values) -> dict[str, Any]:
    """The flags that were given, as the ``trainer`` group of settings."""
    given = {key: value for key, value in values.items() if value is not None}
    return {"trainer": given} if given else {}
