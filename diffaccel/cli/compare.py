"""`diffaccel compare`: several settings of one model side by side."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..core.config import parse_overrides
from ..core.errors import UsageError
from .output import make_folder, table
from .sample import check_output

app = typer.Typer(
    name="compare", help="Settings of one model side by side.", no_args_is_help=True, rich_markup_mode="markdown"
)


@app.callback()
def group():
    """Settings of one model side by side."""


@app.command()
def guidance(
    model: Annotated[
        str, typer.Argument(help="Teacher name or model folder, with classes or prompts.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for guidance.png, report.json and report.html.")
    ],
    rules: Annotated[
        str, typer.Option(help="See `diffaccel list guidance`; wrappers go in front, as in interval:apg.")
    ] = "cfg,apg",
    scales: Annotated[str, typer.Option(help="Guidance scales, for every rule.")] = "2,5,10,15",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="RULE.NAME=VALUE, such as apg.eta=0.5; repeat it.", show_default=False),
    ] = None,
    num: Annotated[
        int, typer.Option("--num", "-n", min=6, help="Images per rule, scale and seed; recall needs 6.")
    ] = 1000,
    seeds: Annotated[str, typer.Option(help="Several give a mean with its deviation.")] = "0",
    steps: Annotated[int | None, typer.Option(help="Sampling steps; default: the model's own.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="See `diffaccel list samplers`; default: the model's own.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Real images or their statistics: folder, zip, dataset, file; default: the teacher's."),
    ] = None,
    features: Annotated[str, typer.Option(help="Of FD, precision and recall; see `diffaccel list features`.")] = "auto",
    prompts: Annotated[
        str | None,
        typer.Option(
            help="What a text-to-image model draws in turn: text file with a prompt a line, or a teacher or folder that brings some; "
            "default: its own.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per network call; changes them by rounding at most.")] = 256,
    device: Annotated[str | None, typer.Option(help="Torch device; default CUDA where there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
):
    """Guidance rules at several scales: quality, variety, oversaturation, and a picture from the same noise.

    Examples:

    - `diffaccel compare guidance digits --sampler ddim --steps 20 -o guidance/`

    - `diffaccel compare guidance digits --rules cfg,rescale:cfg,apg --scales 5,10 --set apg.norm_threshold=0.5 -o guidance/`

    - `diffaccel compare guidance tiny-sd --rules cfg,apg --scales 2,5,10 --num 500 -o guidance/`
    """
    wanted = [name.strip() for name in rules.split(",") if name.strip()]
    numbers = _numbers("--scales", scales, float), _numbers("--seeds", seeds, int)
    for item in overrides or []:
        if "." not in item.partition("=")[0]:
            raise UsageError(f"--set takes RULE.NAME=VALUE here, such as apg.eta=0.5; got {item!r}.")
    options = parse_overrides(overrides or [])
    check_output(output)
    from ..core.processes import usable_device

    device = device and str(usable_device(device))
    from ..models.prompts import load_prompts

    texts = None if prompts is None else load_prompts(prompts)
    from ..evaluate.guidance_page import header, lines, notes, write_sweep
    from ..evaluate.guidance_sweep import sweep_guidance

    sweep = sweep_guidance(
        model,
        wanted,
        numbers[0],
        seeds=numbers[1],
        num=num,
        steps=steps,
        sampler=sampler,
        options=options,
        reference=reference,
        features=features,
        prompts=texts,
        batch_size=batch_size,
        device=device,
        progress=True,
    )
    make_folder(output)
    text = json.dumps(sweep.to_dict(), indent=2, ensure_ascii=False)
    write_sweep(sweep, output, text)
    typer.echo(text if as_json else "\n".join([table(header(sweep), lines(sweep)), "", *notes(sweep)]))


def _numbers(option: str, text: str, kind: type) -> list:
    try:
        return [kind(item) for item in text.split(",") if item.strip()]
    except ValueError:
        raise UsageError(f"{option} takes numbers separated by commas, such as 2,5,10; got {text!r}.") from None
