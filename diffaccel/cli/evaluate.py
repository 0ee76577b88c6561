"""`diffaccel evaluate`: distances between image sets, with their uncertainty."""

import inspect
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .output import note

app = typer.Typer(
    name="evaluate", help="Measure the quality of generated images.", no_args_is_help=True, rich_markup_mode="markdown"
)

_SIDE = (
    "Image folder, zip, statistics (.npz, .safetensors), dataset (digits, digits:heldout, mnist, emoji), model folder, or teacher "
    "(model:digits)."
)
_FEATURES, _CLIP, _MODEL, _FILES = "Features", "CLIP model", "Images of a model", "Image files"
_CONVENTIONS, _COMPUTING, _RESULT = "Conventions", "Computing", "Result"


def _option(panel: str, kind, text: str, *names: str, **limits):
    return Annotated[kind, typer.Option(*names, help=text, rich_help_panel=panel, **limits)]


# Every option is a field of `evaluate.settings.Settings`; None and False mean its default.
_OPTIONS = {
    "features": _option(
        _FEATURES,
        str | None,
        "digits64, mnist64, emoji128, random-conv, inception, dinov2, clip, module:PKG.MOD:CLASS, or auto (the default: what a statistics "
        "file was made with, else by image size).",
    ),
    "weights": _option(
        _FEATURES, str | None, "Weights of the extractor: file, folder or hub name (see `diffaccel list features`)."
    ),
    "unverified_weights": _option(
        _FEATURES, bool, "Accept Inception weights other than the published ones.", "--unverified-weights"
    ),
    "filter": _option(
        _FEATURES, str | None, "Resize filter in front of Inception: tf1-bilinear (default), bilinear, …"
    ),
    "preset": _option(
        _FEATURES, str | None, "Follow another tool: pytorch-fid, clean-fid, edm, torchmetrics, torch-fidelity."
    ),
    "clip_weights": _option(
        _CLIP, str | None, "Folder or hub name of the CLIP model; default openai/clip-vit-large-patch14-336."
    ),
    "download": _option(_COMPUTING, bool, "Allow weights to be fetched from the hub.", "--download"),
    "captions": _option(
        _CLIP, str | None, "File with a caption for every fake image (.txt, .jsonl, .json); default: beside the images."
    ),
    "num": _option(_MODEL, int | None, "Images to draw where a side is a model; default 2000.", min=2),
    "steps": _option(_MODEL, int | None, "Sampling steps; default: the model's own.", min=1),
    "sampler": _option(_MODEL, str | None, "Sampler; default: the model's own."),
    "seed": _option(_MODEL, int | None, "Seed of the images; default 0."),
    "batch_size": _option(
        _MODEL, int | None, "Images drawn at once, default 256; changes the result by rounding at most.", min=1
    ),
    "guidance_scale": _option(
        _MODEL,
        float | None,
        "Scale of classifier-free guidance; default: 1 for pixel models, 7.5 for Stable Diffusion.",
    ),
    "prompts": _option(
        _MODEL,
        str | None,
        "What a text-to-image model draws in turn: text file with a prompt a line, or a teacher or folder that brings some; "
        "default: its own.",
    ),
    "skip_bad": _option(_FILES, bool, "Leave unusable files out and list them.", "--skip-bad"),
    "resize": _option(_FILES, int | None, "Bring all images to this height and width first (bicubic).", min=1),
    "workers": _option(
        _FILES, int | None, "Processes that decode files; 0: none but the main one. Default: by CPUs and files.", min=0
    ),
    "no_interval": _option(
        _CONVENTIONS,
        bool,
        "Skip the jackknife of the Fréchet distance: faster, a tenth of the memory.",
        "--no-interval",
    ),
    "fd_infinity": _option(
        _CONVENTIONS, bool, "Also extrapolate the Fréchet distance to infinitely many images.", "--fd-infinity"
    ),
    "kid_subsets": _option(
        _CONVENTIONS, int | None, "Also give KID as mean ± deviation over this many subsets, as other tools do.", min=1
    ),
    "kid_subset_size": _option(_CONVENTIONS, int | None, "Images per subset; default 1000.", min=2),
    "k": _option(_CONVENTIONS, int | None, "Nearest neighbours; default 5.", min=1),
    "splits": _option(_CONVENTIONS, int | None, "Parts of the Inception Score; default 10.", min=1),
    "device": _option(_COMPUTING, str | None, "auto (default), cpu, cuda, …"),
    "dtype": _option(_COMPUTING, str | None, "float32 (default), or bfloat16 for faster, less exact features."),
    "compile": _option(_COMPUTING, bool, "Compile the extractor with torch.compile.", "--compile"),
    "as_json": _option(_RESULT, bool, "Print one JSON object on stdout instead of text.", "--json"),
    "output": _option(_RESULT, Path | None, "Also write the report to this JSON file.", "--output", "-o"),
    "html": _option(_RESULT, Path | None, "Also write a page with pictures to this file."),
}
_FLAGS = {name for name, option in _OPTIONS.items() if option.__origin__ is bool}
_NETWORK = ["download", "dtype", "compile"]
_MAIN = ["features", "weights", "unverified_weights", "filter", "preset", *_NETWORK]
_CLIP_SPACE = ["clip_weights", *_NETWORK]
_DRAWING = ["num", "steps", "sampler", "seed", "batch_size", "guidance_scale", "prompts"]
_COMMON = [*_DRAWING, "skip_bad", "resize", "workers", "device"]
_OUT = ["as_json", "output", "html"]


def _settings(given: dict) -> dict:
    """The options that were given, as keywords of `evaluate_images`."""
    wanted = {name: value for name, value in given.items() if value is not None and value is not False}
    for flag, field in (("no_interval", "interval"), ("unverified_weights", "verify")):
        if wanted.pop(flag, False):
            wanted[field] = False
    return wanted


def _measure(fake: str, real: str | None, metrics: list[str], given: dict) -> None:
    from ..core.errors import UsageError
    from ..core.files import check_target
    from ..core.processes import is_main_process

    as_json, output, html = (given.pop(name) for name in _OUT)
    for path in filter(None, (output, html)):
        check_target(path)
    if output and output == html:
        raise UsageError("--output and --html name the same file.")
    from ..evaluate.report_page import write_report_page
    from ..evaluate.run import evaluate_images

    report = evaluate_images(fake, real, metrics, progress=sys.stderr.isatty(), together=True, **_settings(given))
    if not is_main_process():
        return
    if output:
        report.save(output)
    if html:
        write_report_page(report, html)
    typer.echo(report.to_json() if as_json else str(report))


def _parameter(name: str, annotation, default=inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _command(name: str, text: str, options: list[str], call, arguments: list[inspect.Parameter]) -> None:
    """Register a verb whose options come from the one table."""

    def verb(**given):
        call(given)

    parameters = [*arguments, *(_parameter(o, _OPTIONS[o], False if o in _FLAGS else None) for o in options)]
    verb.__signature__ = inspect.Signature(parameters)
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    verb.__doc__ = inspect.cleandoc(text)
    app.command(name=name)(verb)


_FAKE = _parameter("fake", Annotated[str, typer.Argument(help=f"Generated side. {_SIDE}", show_default=False)])
_REAL = _parameter("real", Annotated[str, typer.Argument(help="Reference side, same choices.", show_default=False)])
_REAL_IF_ANY = _parameter(
    "real", Annotated[str | None, typer.Argument(help="Reference side, if wanted.", show_default=False)], None
)


def _metric_command(name: str, text: str, options: list[str], real: inspect.Parameter = _REAL) -> None:
    def call(given):
        _measure(given.pop("fake"), given.pop("real"), [name], given)

    _command(name, text, [*options, *_COMMON, *_OUT], call, [_FAKE, real])


_metric_command(
    "fid",
    """
    Fréchet distance between generated and real images, with a jackknife interval.

    The label says which features were used (FD-digits64, FD-inception): numbers of different features never compare.

    Examples:

    - `diffaccel evaluate fid samples/ digits`

    - `diffaccel evaluate fid model:digits digits:heldout --steps 10 --num 2000`

    - `diffaccel evaluate fid runs/my-run/final emoji/ --prompts tiny-sd --guidance-scale 3`

    - `diffaccel evaluate fid samples.zip ref.npz --preset pytorch-fid --weights pt_inception-2015-12-05-6726825d.pth`
    """,
    [*_MAIN, "no_interval", "fd_infinity"],
)
_metric_command(
    "kid",
    """
    Kernel distance (KID): unbiased, hence the better choice for few images; may be negative.

    Examples:

    - `diffaccel evaluate kid samples/ digits`

    - `diffaccel evaluate kid samples/ photos/ --features random-conv --kid-subsets 100 --kid-subset-size 500`
    """,
    [*_MAIN, "kid_subsets", "kid_subset_size"],
)
_metric_command(
    "prdc",
    """
    Precision, recall, density and coverage: quality and variety apart.

    Example: `diffaccel evaluate prdc samples/ digits --k 5`
    """,
    [*_MAIN, "k"],
)
_metric_command(
    "is",
    """
    Inception Score of generated images, and of real ones beside it if given.

    Examples:

    - `diffaccel evaluate is samples/`

    - `diffaccel evaluate is model:digits digits --steps 10`
    """,
    [*_MAIN, "splits"],
    _REAL_IF_ANY,
)
_metric_command(
    "cmmd",
    """
    CLIP maximum mean discrepancy: needs few images and CLIP weights.

    Example: `diffaccel evaluate cmmd samples/ photos/ --clip-weights models/clip-vit-large-patch14-336`
    """,
    _CLIP_SPACE,
)
_metric_command(
    "clip",
    """
    CLIP score: how well images fit their captions.

    Captions stand beside the images (metadata.jsonl, or NAME.txt for NAME.png) or in one file.

    Example: `diffaccel evaluate clip samples/ --captions prompts.txt --clip-weights models/clip-vit-base-patch16`
    """,
    [*_CLIP_SPACE, "captions"],
    _REAL_IF_ANY,
)
_metric_command(
    "appearance",
    """
    Saturation, contrast and share of clipped values (0 or 255) of images, and of real ones beside them if given.

    Strong guidance tends to raise all three. Neither low nor high is good in itself: closer to real images is better.

    Examples:

    - `diffaccel evaluate appearance samples/`

    - `diffaccel evaluate appearance samples/ photos/ -o guided.json`
    """,
    [],
    _REAL_IF_ANY,
)


def _all(given: dict) -> None:
    metrics = [name.strip() for name in given.pop("metrics").split(",") if name.strip()]
    _measure(given.pop("fake"), given.pop("real"), metrics, given)


_command(
    "all",
    """
    Several metrics in one pass over the images.

    Examples:

    - `diffaccel evaluate all samples/ digits --html report.html`

    - `diffaccel evaluate all samples/ photos/ --metrics fid,kid,cmmd -o report.json`
    """,
    [
        *dict.fromkeys([*_MAIN, *_CLIP_SPACE, "captions", "no_interval", "fd_infinity", "kid_subsets"]),
        *["kid_subset_size", "k", "splits", *_COMMON, *_OUT],
    ],
    _all,
    [
        _FAKE,
        _REAL_IF_ANY,
        _parameter(
            "metrics",
            Annotated[
                str,
                typer.Option(help="Comma-separated: fid, kid, prdc, is, cmmd, clip, appearance.", show_default=True),
            ],
            "fid,kid,prdc,appearance",
        ),
    ],
)


def _stats(given: dict) -> None:
    from ..core.files import check_target
    from ..core.processes import is_main_process

    source, output, as_json = given.pop("source"), given.pop("output"), given.pop("as_json")
    check_target(output)
    from ..evaluate.run import write_statistics

    moments = write_statistics(source, output, progress=sys.stderr.isatty(), together=True, **_settings(given))
    if not is_main_process():
        return
    result = {"path": str(output), "n": moments.count, "num_features": moments.num_features}
    sentence = f"Wrote {output}: {moments.count} images, {moments.num_features} features."
    typer.echo(json.dumps(result) if as_json else sentence)


_command(
    "stats",
    """
    Save mean and covariance of a side, to compare with later; pytorch-fid and EDM can read the .npz too.

    Examples:

    - `diffaccel evaluate stats digits -o ref.npz`

    - `diffaccel evaluate stats photos/ --features random-conv --vectors -o photos.safetensors`
    """,
    [*_MAIN, *_COMMON, "as_json"],
    _stats,
    [
        _parameter("source", Annotated[str, typer.Argument(help=_SIDE, show_default=False)]),
        _parameter(
            "output",
            _option(_RESULT, Path, "File to write: .npz or .safetensors.", "--output", "-o", show_default=False),
        ),
        _parameter(
            "vectors", _option(_RESULT, bool, "Keep every image's features, for kid and prdc.", "--vectors"), False
        ),
    ],
)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Report of one evaluation (JSON).", show_default=False)],
    second: Annotated[Path, typer.Argument(help="Report of another, against the same reference.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
):
    """Difference of two evaluations with its interval: which is better, or cannot they be told apart?

    Example: `diffaccel evaluate compare ddim.json flow-adams.json`
    """
    from ..evaluate.compare import compare_reports
    from ..evaluate.report import load_report

    result = compare_reports(load_report(first), load_report(second), (str(first), str(second)))
    typer.echo(json.dumps(result.to_dict(), indent=2, ensure_ascii=False) if as_json else str(result))


@app.command()
def verify(
    report: Annotated[Path, typer.Argument(help="Report to repeat (JSON).", show_default=False)],
    fake: Annotated[str | None, typer.Option(help="Where the generated side is now, if it moved.")] = None,
    real: Annotated[str | None, typer.Option(help="Where the reference side is now, if it moved.")] = None,
    features: Annotated[
        str | None, typer.Option(help="Class that the report used (module:…), if its code may run.")
    ] = None,
    unverified_weights: Annotated[
        bool, typer.Option("--unverified-weights", help="Accept that it used other than published weights.")
    ] = False,
    download: Annotated[bool, typer.Option("--download", help="Allow weights to be fetched from the hub.")] = False,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Relative difference of numbers that counts as equal.")
    ] = 1e-6,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
):
    """Repeat an evaluation from its report and say what differs; exit code 3 if anything does.

    Example: `diffaccel evaluate verify report.json`
    """
    from ..evaluate.report import load_report
    from ..evaluate.verify import verify_report

    allowed = {"features": features, "unverified": unverified_weights, "download": download}
    result = verify_report(load_report(report), fake=fake, real=real, tolerance=tolerance, **allowed)
    typer.echo(json.dumps(result.to_dict(), indent=2, ensure_ascii=False) if as_json else str(result))
    if not result.matches:
        note(f"{report} could not be reproduced.")
        raise typer.Exit(3)
