"""`diffaccel optimize`: accelerations that leave a model's computation what it is, kept where they pay."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .output import make_folder, note, run_folder
from .pipelines import Approximate, Device, Dtype, Model, bytes_of, names_of, opened, resolved
from .sample import check_output


def optimize(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for report.json, report.txt and waterfall.png; default runs/DATE-…"
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps of the measured runs; default: the model's own.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Try these, separated by commas; see `diffaccel list accelerations`.")
    ] = None,
    skip: Annotated[str | None, typer.Option(help="Leave these out, such as compile, which takes a minute.")] = None,
    memory_cap: Annotated[
        str | None,
        typer.Option(help="What a run should take at its peak, such as 12GiB; comes before time.", show_default=False),
    ] = None,
    approximate: Approximate = False,
    rounds: Annotated[
        int, typer.Option(min=3, help="Each is timed so many times, in turn with what it competes with.")
    ] = 7,
    seconds: Annotated[float, typer.Option(help="After which it is timed no more.")] = 60.0,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
):
    """Try safe accelerations one after the other, and keep those that pay.

    Whole runs are timed with and without each: attention backends, text computed once, guidance in turn, channels-last, compilation.
    A picture shows what each takes off time and memory, and a line of Python applies the same to your pipeline.

    Examples:

    - `diffaccel optimize --model tiny-sd --skip compile -o report/`

    - `diffaccel optimize --model /path/to/sdxl --dtype float16 --memory-cap 12GiB -o report/`
    """
    wanted, left_out, cap = names_of(only), names_of(skip), bytes_of(memory_cap)
    folder = output or run_folder("optimize", model)
    check_output(folder)
    resolved(model, dtype)
    from ..execution.accelerations import ACCELERATIONS
    from ..execution.optimize import optimize as run
    from ..execution.optimize import wanted_of

    wanted_of(wanted, left_out)
    pipe = opened(model, dtype, device)

    def tell(what: str):
        note(f"{what}: {ACCELERATIONS[what].summary} …" if what in ACCELERATIONS else f"{what} …")

    settings = {"only": wanted, "skip": left_out or (), "memory_cap": cap, "approximate": approximate}
    report = run(pipe, steps=steps, **settings, rounds=rounds, seconds=seconds, progress=None if as_json else tell)
    make_folder(folder)
    report.save(folder)
    typer.echo(json.dumps(report.to_dict()) if as_json else report.explain())
    if not as_json:
        note(f"Picture: {folder / 'waterfall.png'}")
