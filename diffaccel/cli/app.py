"""The `diffaccel` command. Verbs live in one file each and import torch and diffusers only when they run."""

import logging
import os
import signal
import sys
import threading
from typing import Annotated

import typer

from .. import __version__
from ..core.errors import DiffaccelError
from . import (
    bench,
    calibrate,
    compare,
    demo,
    distill,
    distill_compare,
    environment,
    evaluate,
    listing,
    optimize,
    prune,
    sample,
    search,
    train,
)

app = typer.Typer(
    name="diffaccel",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with `diffaccel demo`. Exit codes: 0 ok, 1 internal error, 2 usage, 3 bad input data, "
    "4 missing weights, 5 numerical failure, 130/143 interrupted after saving.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"diffaccel {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
):
    """Diffusion models in 1 to 10 network evaluations: better samplers, one-step distillation, honest evaluation."""


app.command(name="demo")(demo.demo)
distill.app.command(name="compare")(distill_compare.compare)
app.add_typer(distill.app)
app.command(name="prune")(prune.prune)
app.command(name="train")(train.train)
app.command(name="sample")(sample.sample)
app.command(name="calibrate")(calibrate.calibrate)
app.command(name="search")(search.search)
app.command(name="optimize")(optimize.optimize)
app.add_typer(bench.app)
app.add_typer(evaluate.app)
app.add_typer(compare.app)
app.command(name="list")(listing.show)
app.command(name="env")(environment.env)


def main() -> None:
    """Entry point: every error ends as one sentence on stderr and a documented exit code."""
    # Library chatter, such as the banner of xformers without CUDA operators, is not for users of this command.
    logging.getLogger("xformers").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if threading.current_thread() is threading.main_thread():
        # Outside training, which saves first, SIGTERM ends like Ctrl-C does: files half-written are cleaned up.
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        app(prog_name="diffaccel")
    except SystemExit as stop:
        if stop.code in (130, 143):
            _fail("Interrupted.", stop.code)
        raise
    except DiffaccelError as error:
        if error.told_elsewhere:
            sys.exit(error.exit_code)
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("Interrupted.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if os.environ.get("DIFFACCEL_DEBUG"):
            raise
        if type(error).__name__ == "OutOfMemoryError":
            _fail(
                "The device ran out of memory: lower --batch-size, or split the batch with --set trainer.micro_batches=4 (also on --resume).",
                1,
            )
        _fail(f"Internal error: {type(error).__name__}: {error}. Set DIFFACCEL_DEBUG=1 for the traceback.", 1)


def _fail(text: str, code: int) -> None:
    typer.echo(f"Error: {text}", err=True)
    sys.exit(code)
