"""`diffaccel distill compare`: methods side by side on one teacher, under one budget."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import UsageError, error_of
from . import options
from .output import note, run_folder, table


def compare(
    teacher: Annotated[str, typer.Option(help="Name in `diffaccel list teachers`, or a model folder.")],
    methods: Annotated[
        str,
        typer.Option(
            help="Separated by commas: names in `diffaccel list methods`, with settings as in "
            "f-distill:divergence=forward-kl, or recipe:NAME."
        ),
    ],
    seeds: Annotated[str, typer.Option(help="Each method is trained with each; several give a mean.")] = "0",
    steps: Annotated[int | None, typer.Option(help="Training steps of each; default: those of its recipe.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="In place of steps: processor time of each, such as 90s or 10m; on a GPU, time."),
    ] = None,
    num: Annotated[int, typer.Option("--num", "-n", min=6, help="Images measured of each; recall needs 6.")] = 1000,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder of the comparison, continued if it holds the same; default runs/DATE-compare-…",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Real images or their statistics to measure against; default: the teacher's, or --data."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Real samples for all methods, as for `diffaccel distill`.")] = None,
    prompts: Annotated[str | None, typer.Option(help="What all students learn to draw, a prompt a line.")] = None,
    device: options.Device = None,
    threads: options.Threads = None,
    settings: options.Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
    quiet: options.Quiet = False,
):
    """Train methods on one teacher under one budget, and measure them beside it: report.html, report.json, a table.

    Every method has its own recipe; --set changes all of them, METHOD:NAME=VALUE one. After Ctrl-C the same command goes on.
    A method that fails is a row with its sentence and does not stop the others; the exit code is then that of the first that
    failed.

    Examples:

    - `diffaccel distill compare --teacher digits --methods dmd,f-distill,sid --budget 60s -o compare/`

    - `diffaccel distill compare --teacher digits --methods f-distill:divergence=js,f-distill:divergence=forward-kl --seeds 0,1,2`

    - `diffaccel distill compare --teacher digits --methods dmd,recipe:digits-f-distill --steps 300 --num 2000 -o compare/`
    """
    wanted = _seeds(seeds)
    from ..distill_comparison import compare_methods
    from ..evaluate.distill_page import header, lines, notes

    folder = output or run_folder("compare", teacher)
    content = compare_methods(
        teacher,
        methods,
        folder,
        seeds=wanted,
        steps=steps,
        budget=budget,
        num=num,
        reference=reference,
        data=data,
        prompts=prompts,
        settings=settings or (),
        device=device,
        threads=threads,
        say=None if quiet else note,
    )
    if as_json:
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        typer.echo("\n".join([table(header(content), lines(content)), "", *notes(content)]))
        typer.echo(f"Report: {folder / 'report.html'}")
    if content["failures"]:
        first, count = content["failures"][0], len(content["failures"])
        also = f"; {count - 1} more failed, too" if count > 1 else ""
        raise error_of(first["exit_code"], f"{first['label']}, seed {first['seed']}, failed: {first['text']}{also}")


def _seeds(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(item) for item in text.split(",") if item.strip()))
    except ValueError:
        raise UsageError(f"--seeds takes whole numbers separated by commas, such as 0,1,2; got {text!r}.") from None
