"""`diffaccel bench`: what is fastest here."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .pipelines import Approximate, Device, Dtype, Model, bytes_of, names_of, opened, resolved

app = typer.Typer(name="bench", help="What is fastest here.", no_args_is_help=True, rich_markup_mode="markdown")


@app.callback()
def group():
    """What is fastest here."""


@app.command()
def attention(
    model: Model,
    backends: Annotated[
        str | None, typer.Option(help="Separated by commas; default: every usable one, see `diffaccel list attention`.")
    ] = None,
    memory_cap: Annotated[
        str | None, typer.Option(help="What one attention call may allocate, such as 500MiB.", show_default=False)
    ] = None,
    approximate: Approximate = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what earlier runs measured.")] = False,
    rounds: Annotated[int, typer.Option(min=3, help="How often each backend is timed.")] = 20,
    seconds: Annotated[float, typer.Option(help="After which a kind of call is timed no more.")] = 2.0,
    dtype: Dtype = None,
    device: Device = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the report.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
):
    """Time attention backends on the calls that a model really makes, and say which one each kind of call should have.

    Backends are compared with double precision first; wrong ones are out. `diffaccel.optimize_attention(pipe)` does the same in
    Python and installs the choice.

    Examples:

    - `diffaccel bench attention --model tiny-sd`

    - `diffaccel bench attention --model /path/to/sdxl --dtype float16 --backends flash,cudnn,xformers`
    """
    asked, cap = names_of(backends), bytes_of(memory_cap)
    if output is not None:
        from ..core.files import check_target

        check_target(output)
    resolved(model, dtype)
    from ..attention.backends import candidates
    from ..attention.examples import has_example
    from ..attention.optimize import optimize_attention
    from ..core.files import write_atomic
    from ..core.processes import usable_device
    from ..execution.runs import standard_run
    from ..models.networks import eager, networks_of

    candidates(asked, approximate, usable_device(device or "auto"))
    pipe = opened(model, dtype, device)
    networks = list(map(eager, networks_of(pipe).values()))
    run = None if all(map(has_example, networks)) else standard_run(pipe, len(networks))
    settings = {"backends": asked, "memory_cap": cap, "approximate": approximate, "fresh": fresh, "run": run}
    report = optimize_attention(pipe, **settings, rounds=rounds, seconds=seconds)
    text = json.dumps(report.to_dict(), indent=2)
    if output is not None:
        write_atomic(output, text + "\n")
    typer.echo(text if as_json else report.explain())
