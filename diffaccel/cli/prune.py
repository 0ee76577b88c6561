"""`diffaccel prune`: whole layers leave a model, and what is left opens like any other."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import UsageError
from . import options
from .output import interrupted, note, run_folder, table

_what = partial(typer.Option, rich_help_panel="What goes")
_scores = partial(typer.Option, rich_help_panel="Scores")
_recovery = partial(typer.Option, rich_help_panel="Recovery")
_measure = partial(typer.Option, rich_help_panel="Measurement")


def prune(
    model: Annotated[str | None, _what(help="Teacher name, or a folder that diffusers opens.")] = None,
    method: Annotated[str | None, _what(help="See `diffaccel list pruning`; default laptop.")] = None,
    ratio: Annotated[float | None, _what(help="Share to be saved, from 0 to below 1; default 0.3.")] = None,
    cost: Annotated[str | None, _what(help="Of what: parameters, macs or latency; default parameters.")] = None,
    select: Annotated[
        str | None, _what(help="How layers are chosen, see `diffaccel list selections`; default: the method's own.")
    ] = None,
    evaluations: Annotated[int | None, _what(help="Of --select searched: sets to try; default 200.")] = None,
    single: Annotated[
        bool | None, _what("--single/--no-single", help="Single convolutions may go, too.", show_default=False)
    ] = None,
    samples: Annotated[int | None, _scores(help="Samples that scores are computed on; default 16.")] = None,
    steps: Annotated[int | None, _scores(help="Network calls that draw them; default 10.")] = None,
    prompts: Annotated[
        str | None, _scores(help="Of text-to-image models: a text file, one a line, or a teacher; default: its own.")
    ] = None,
    guidance_scale: Annotated[
        float | None, _scores(help="Of all that is drawn; default: as the pipeline's call.")
    ] = None,
    batch_size: Annotated[int | None, _scores(help="Samples drawn at once; default 64.")] = None,
    recover: Annotated[int | None, _recovery(help="Training steps after pruning; 0 for none, the default.")] = None,
    features: Annotated[
        str | None, _recovery(help="Feature distillation: normalized, plain or none; default normalized.")
    ] = None,
    data: Annotated[
        str | None, _recovery(help="Real images, a data set or a folder; default: samples of the model itself.")
    ] = None,
    settings: Annotated[
        list[str] | None, _recovery("--set", help="Any other setting of it, repeatable: --set trainer.batch_size=32.")
    ] = None,
    curve: Annotated[
        str | None, _measure(help='Ratios of the trade-off curve; default 0.2,0.35,0.5; "" for none.')
    ] = None,
    num: Annotated[int | None, _measure(help="Images of a Fréchet distance, default 1000; 0 measures none.")] = None,
    reference: Annotated[
        str | None, _measure(help="Real images or statistics; default: the teacher's, else what the whole model draws.")
    ] = None,
    repeats: Annotated[int | None, _measure(help="Rounds in which time is measured; default 5, 0 for none.")] = None,
    output: options.Output = None,
    seed: options.Seed = None,
    device: options.Device = None,
    resume: options.Resume = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")] = False,
    quiet: options.Quiet = False,
):
    """Remove the layers of a model that it needs least, and let the rest recover if wanted.

    The run folder gets final/, which diffusers.DiffusionPipeline.from_pretrained opens after `import diffaccel`, with a model card;
    plan.json (what was removed), scores.png, tradeoff.png and .json, report.html and .json, and every score for --resume.

    Examples:

    - `diffaccel prune --model digits --ratio 0.3 -o runs/small`

    - `diffaccel prune --model digits --method ld-pruner --ratio 0.35 --recover 500 -o runs/small`

    - `diffaccel prune --model digits --method ld-pruner --ratio 0.35 --recover 500 -o runs/small --resume`

    - `diffaccel prune --model mnist --cost latency --select searched --ratio 0.4 --curve "" -o runs/fast`

    - `diffaccel prune --model tiny-sd --guidance-scale 3 --ratio 0.3 --recover 1000 --features plain -o runs/sd`
    """
    given = {
        "model": model, "method": method, "ratio": ratio, "cost": cost, "select": select, "evaluations": evaluations,
        "single": single, "samples": samples, "steps": steps, "prompts": prompts, "guidance_scale": guidance_scale,
        "batch_size": batch_size, "curve": None if curve is None else _ratios(curve), "num": num, "reference": reference,
        "repeats": repeats, "seed": seed, "device": device,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    recovery = {"data": data, "method": features and {"features": features}}
    recovery = {key: value for key, value in recovery.items() if value is not None}
    stored = None
    if resume:
        from ..pruning import stored_pruning

        stored = stored_pruning(output)
    elif model is None:
        raise UsageError("Say what to prune: --model digits, another name of `diffaccel list teachers`, or a folder.")
    from ..models.teachers import resolve_teacher
    from ..prune.settings import resolve_pruning

    config, run = resolve_pruning(given, recover, recovery, settings or [], stored)
    resolve_teacher(config.model)  # here, because torch and diffusers take seconds to import
    folder = output or run_folder("prune", config.model, config.method)
    from ..pruning import run_pruning

    try:
        outcome = run_pruning(config, run, folder, resume, (lambda text: None) if quiet else note, not quiet)
    except (KeyboardInterrupt, SystemExit) as stop:
        known = (folder / "config.yaml").exists()
        told = f" Every score so far is in {folder}: repeat the command with --resume to go on." if known else ""
        raise interrupted(stop, f"Interrupted.{told}") from None
    _report(outcome, folder, as_json, quiet)


def _ratios(text: str) -> list[float]:
    try:
        return [float(one) for one in text.split(",") if one.strip()]
    except ValueError:
        raise UsageError(f'--curve takes ratios such as 0.2,0.35,0.5, or "" for none; got {text!r}.') from None


def _report(outcome, folder: Path, as_json: bool, quiet: bool) -> None:
    """Write the reports, and say what was found."""
    import json

    from ..evaluate.prune_page import figures, header, lines, notes, write_pruning

    write_pruning(outcome, folder)
    if as_json:
        told = {key: value for key, value in figures(outcome).items() if key != "settings"}
        typer.echo(json.dumps({"final": str(outcome.final), "plan": str(folder / "plan.json"), **told}))
        return
    typer.echo("\n".join([table(header(outcome), lines(outcome)), "", *notes(outcome)]))
    typer.echo(f"Finished: {outcome.final}; report: {folder / 'report.html'}")
    if not quiet:
        note(f"Next: diffaccel sample {outcome.final} --num 100 --grid pruned.png")
