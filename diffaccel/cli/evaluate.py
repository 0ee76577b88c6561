"""`diffaccel evaluate`: distances between image sets, with their uncertainty."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="evaluate", help="Measure the quality of generated images.", no_args_is_help=True, rich_markup_mode="markdown"
)

_SIDE = "Image folder, .npz statistics, dataset (digits, digits:heldout), model folder, or teacher (model:digits)."
Features = Annotated[str, typer.Option(help="Feature extractor: digits64, random-conv, or auto (by image size).")]
Num = Annotated[int, typer.Option(min=2, help="Images to generate where a side is a model.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampling steps for a model; default: the model's own.")]
Sampler = Annotated[str | None, typer.Option(help="Sampler for a model; default: the model's own.")]
Seed = Annotated[int, typer.Option(help="Seed of the generated images.")]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Images per generation batch; changes the result by rounding at most.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave unusable image files out and list them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]


@app.command()
def fid(
    fake: Annotated[str, typer.Argument(help=f"Generated side. {_SIDE}", show_default=False)],
    real: Annotated[str, typer.Argument(help="Reference side, same choices.", show_default=False)],
    features: Features = "auto",
    num: Num = 2000,
    steps: Steps = None,
    sampler: Sampler = None,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    skip_bad: SkipBad = False,
    as_json: AsJson = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the report to this file.")] = None,
):
    """Fréchet distance between generated and real images, with a jackknife interval.

    The label says which features were used (FD-digits64, FD-random-conv): numbers of different features never compare.

    Examples:

    - `diffaccel evaluate fid samples/ digits`

    - `diffaccel evaluate fid model:digits digits:heldout --steps 10 --num 2000`

    - `diffaccel evaluate fid samples/ ref.npz --json -o report.json`
    """
    from ..evaluate.fid import evaluate_fid

    report = evaluate_fid(
        fake,
        real,
        features,
        num=num,
        steps=steps,
        sampler=sampler,
        seed=seed,
        batch_size=batch_size,
        skip_bad=skip_bad,
        progress=sys.stderr.isatty(),
    )
    if output:
        report.save(output)
    typer.echo(report.to_json() if as_json else str(report))


@app.command()
def stats(
    source: Annotated[str, typer.Argument(help=_SIDE, show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npz file to write.", show_default=False)],
    features: Features = "auto",
    num: Num = 2000,
    steps: Steps = None,
    sampler: Sampler = None,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    skip_bad: SkipBad = False,
    as_json: AsJson = False,
):
    """Save mean and covariance of a side, to compare with later; pytorch-fid can read the file too.

    Examples:

    - `diffaccel evaluate stats digits -o ref.npz`

    - `diffaccel evaluate stats photos/ --features random-conv -o photos.npz`
    """
    from ..evaluate.fid import write_statistics

    moments = write_statistics(
        source,
        output,
        features,
        num=num,
        steps=steps,
        sampler=sampler,
        seed=seed,
        batch_size=batch_size,
        skip_bad=skip_bad,
        progress=sys.stderr.isatty(),
    )
    result = {"path": str(output), "n": moments.count, "num_features": moments.num_features}
    sentence = f"Wrote {output}: {moments.count} images, {moments.num_features} features."
    typer.echo(json.dumps(result) if as_json else sentence)
