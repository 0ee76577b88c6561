"""`diffaccel calibrate`: the norms of guidance without a cap, and the cap to start from."""

import json
import shlex
from typing import Annotated

import typer

from .output import note
from .sample import settings


def calibrate(
    model: Annotated[str, typer.Argument(help="Teacher name, or a model folder.", show_default=False)],
    guidance_scale: Annotated[float, typer.Option(help="The scale that you mean to use.")] = 7.5,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; default: the model's own.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="See `diffaccel list samplers`; default: the model's own.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="As for `diffaccel sample`, such as apg.space=raw; repeat it.", show_default=False),
    ] = None,
    num: Annotated[int, typer.Option("--num", "-n", help="Number of samples.")] = 100,
    seed: Annotated[int, typer.Option(help="Sample i depends on the seed and on i only.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Samples per network call.")] = 256,
    device: Annotated[str | None, typer.Option(help="Torch device; default CUDA where there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")] = False,
):
    """Measure how long guidance differences are, and propose APG's cap on them.

    Runs the model under adaptive projected guidance without a cap. The cap depends on model, image size and space.

    Examples:

    - `diffaccel calibrate digits --guidance-scale 10`

    - `diffaccel calibrate digits --guidance-scale 10 --steps 8 --sampler ghvb --set apg.space=raw --json`
    """
    options = settings(overrides, sampler, "apg")
    from ..models.teachers import resolve_teacher

    resolve_teacher(model)  # here, because torch and diffusers take seconds to import
    from ..core.processes import usable_device
    from ..generation import generate
    from ..guidance.calibrate import recording
    from ..guidance.registry import build_rule

    rule, recorder = recording(build_rule("apg", guidance_scale, options["guidance_options"]))
    drawn = generate(
        model,
        num,
        steps=steps,
        sampler=sampler,
        sampler_options=options["sampler_options"],
        seed=seed,
        guidance=rule,
        batch_size=batch_size,
        device=device and str(usable_device(device)),
        progress=True,
    )
    for _ in drawn:
        pass
    found = recorder.calibration()
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    cap = f"{found.norm_threshold:.4g}"
    # The same run again, with the cap.
    chosen = [item for item in overrides or [] if not item.replace(" ", "").startswith("apg.norm_threshold=")]
    words = ["diffaccel", "sample", model, "--guidance", "apg", "--guidance-scale", f"{guidance_scale:g}"]
    words += [] if steps is None else ["--steps", steps]
    words += [] if sampler is None else ["--sampler", sampler]
    words += [part for item in (*chosen, f"apg.norm_threshold={cap}") for part in ("--set", item)]
    typer.echo(found)
    typer.echo(f"norm_threshold: {cap} in {found.rule.space} space, the median of all lengths with momentum")
    note(f"Next: {shlex.join(map(str, [*words, '--grid', 'guided.png']))}")
