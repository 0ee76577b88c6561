"""`diffaccel sample`: images from a teacher, a student, any pixel model folder or a text-to-image pipeline."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ..core.config import parse_overrides
from ..core.errors import UsageError
from .output import make_folder, note


def sample(
    model: Annotated[
        str, typer.Argument(help="Teacher name, or a model folder such as RUN/final.", show_default=False)
    ],
    steps: Annotated[int | None, typer.Option(help="Sampling steps; default: the model's own.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="See `diffaccel list samplers`; default: the model's own.")
    ] = None,
    nfe: Annotated[
        int | None,
        typer.Option(help="In place of --steps: a budget of network evaluations, guidance pairs counted as two."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="A plan of `diffaccel search`, in place of --sampler and --steps; at its guidance scale.",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="NAME=VALUE for the sampler, such as solver_order=2, or RULE.NAME=VALUE for guidance, such as apg.eta=0.5; "
            "repeat it.",
            show_default=False,
        ),
    ] = None,
    num: Annotated[
        int | None,
        typer.Option(
            "--num", "-n", help="Number of images; default one for each prompt given, else 100.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Image i depends on the seed and on i only.")] = 0,
    classes: Annotated[
        str | None, typer.Option(help="Classes to draw in turn, such as 3 or 1,4,7; default all.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What a text-to-image model draws; repeat it to draw several in turn.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file with a prompt a line, or a teacher or folder that brings some; they follow those of --prompt. "
            "Default: the model's own.",
            show_default=False,
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What guidance leads away from, in every image.", show_default=False)
    ] = None,
    guidance: Annotated[
        str | None, typer.Option(help="See `diffaccel list guidance`; default: classifier-free guidance.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale; default: the rule's own, and without --guidance the pipeline's own: 1, no guidance, for "
            "pixel models, 7.5 for Stable Diffusion. Other values than 1 double the NFE.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per network call; changes them by rounding at most.")] = 256,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for one PNG per image, dataset.json with classes and settings, and metadata.jsonl with prompts.",
            show_default=False,
        ),
    ] = None,
    grid: Annotated[Path | None, typer.Option(help="One PNG with all images, ten a row.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="Torch device; default CUDA where there is one.")] = None,
    parallel_cfg: Annotated[
        bool,
        typer.Option("--parallel-cfg", help="Under torchrun: every process evaluates its part of each guidance pair."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")] = False,
):
    """Generate images.

    Examples:

    - `diffaccel sample digits --steps 8 --sampler flow-adams --num 100 --grid digits.png`

    - `diffaccel sample digits --nfe 16 --sampler ghvb --set ghvb_order=2.3 --guidance-scale 5 --grid digits.png`

    - `diffaccel sample digits --plan plan.json --num 1000 --output samples/`

    - `diffaccel sample runs/my-run/final --num 1000 --output samples/`

    - `diffaccel sample digits --classes 3,8 --guidance-scale 2 --grid threes-and-eights.png`

    - `diffaccel sample tiny-sd --prompt 'red apple' --prompt 'grinning face' --guidance-scale 3 --grid apples.png`

    - `diffaccel sample tiny-sd --prompts prompts.txt --negative-prompt letters --num 200 --output samples/`

    - `diffaccel sample digits --guidance apg --guidance-scale 12 --set apg.norm_threshold=2 --grid digits.png`

    - `diffaccel sample digits --guidance cfg --guidance-scale 7 --set 'interval.sigma_range=[0.3,5]' --grid digits.png`

    - `diffaccel sample digits --guidance perp-neg --guidance-scale 5 --set perp-neg.negatives=3 --grid no-threes.png`

    - `diffaccel sample digits --guidance autoguidance --set autoguidance.model=runs/early/final --grid digits.png`

    - `torchrun --nproc_per_node 2 -m diffaccel sample tiny-sd --prompt 'red apple' --parallel-cfg --grid apple.png`
    """
    if output is None and grid is None:
        raise UsageError("Say where the images go: --output FOLDER for single files, --grid FILE for one sheet.")
    if output is not None:
        check_output(output)
    if grid is not None and grid.suffix.lower() != ".png":
        raise UsageError(f"--grid writes PNG files; got {grid.name}.")
    if steps is not None and nfe is not None:
        raise UsageError("Give either --steps or --nfe, not both.")
    own = {"--steps": steps, "--nfe": nfe, "--sampler": sampler}
    if plan is not None and (given := [name for name, value in own.items() if value is not None]):
        raise UsageError(f"A plan brings its own sampler and steps: leave out {given[0]}, or --plan.")
    wanted, options = _classes(classes), settings(overrides, sampler, guidance)
    texts = _prompts(prompt, prompts)
    from ..models.teachers import read_index, resolve_teacher

    folder, info = resolve_teacher(model)  # here, because torch and diffusers take seconds to import
    if steps is not None and steps > 1 and read_index(folder).get("num_inference_steps") == 1:
        note("Note: this student was trained for one step; more steps make its images worse.")
    import torch

    from ..core.processes import is_main_process, rank_and_world, usable_device

    device = device and str(usable_device(device))
    from ..core.captions import METADATA
    from ..core.files import write_atomic
    from ..core.images import save_grid, save_png
    from ..evaluate.sources import LABELS_FILE
    from ..generation import generate

    started, drawn_from = time.monotonic(), model
    if plan is not None:
        drawn_from, steps, scale = _planned(model, plan, device)
        guidance_scale = scale if guidance is None and guidance_scale is None else guidance_scale
    if parallel_cfg:
        (drawn_from, parted), device = _shared(drawn_from, device), None
    elif rank_and_world()[1] > 1:
        raise UsageError(
            "Several processes share the drawing of guidance pairs only: add --parallel-cfg, or start one process."
        )
    main = is_main_process()
    drawn = generate(
        drawn_from,
        num if num is not None else len(texts or range(100)),
        steps=steps,
        sampler=sampler,
        nfe=nfe,
        seed=seed,
        guidance=guidance,
        guidance_scale=guidance_scale,
        **options,
        batch_size=batch_size,
        classes=wanted,
        prompts=texts,
        negative_prompt=negative_prompt,
        device=device,
        progress=main,
    )
    if not main:
        for _ in drawn:
            pass
        return
    if output is not None:
        make_folder(output)
    if grid is not None:
        make_folder(grid.parent)
    written, sheet, named = 0, [], []
    for images, labels in drawn:
        if output is not None:
            for index, image in enumerate(images, start=written):
                save_png(image, output / f"{index:06d}.png")
            if labels is not None:
                named += [[f"{written + i:06d}.png", label] for i, label in enumerate(labels.tolist())]
        if grid is not None:
            sheet.append(images)
        written += len(images)
    if grid is not None:
        save_grid(torch.cat(sheet), grid)
    if parallel_cfg and not parted.parted:
        note("No process was spared anything: without guidance, a single image has no pair to share.")
    cost = {"steps": drawn.steps, "nfe": drawn.nfe}
    if output is not None:
        rule = {"guidance": guidance or "cfg", "guidance_scale": drawn.scale, "set": overrides or []}
        rule |= {} if negative_prompt is None else {"negative_prompt": negative_prompt}
        facts = {
            "settings": {"model": model, "sampler": sampler or (plan and str(plan)), **cost, **rule, "seed": seed},
            "labels": named or None,
        }
        write_atomic(output / LABELS_FILE, json.dumps(facts) + "\n")
    if output is not None and drawn.prompts:
        lines = [{"file_name": f"{index:06d}.png", "text": text} for index, text in enumerate(drawn.prompts)]
        write_atomic(output / METADATA, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    result = {"images": written, "seconds": round(time.monotonic() - started, 2), **cost}
    places = {key: str(path) for key, path in (("output", output), ("grid", grid)) if path is not None}
    if as_json:
        typer.echo(json.dumps(result | places))
    else:
        plural = "" if drawn.steps == 1 else "s"
        typer.echo(
            f"{written} images in {result['seconds']} s, {drawn.steps} step{plural}, NFE {drawn.nfe} with guidance pairs "
            f"counted as two: {', '.join(places.values())}"
        )
        if output is not None and sys.stderr.isatty():
            note(f"Next: diffaccel evaluate fid {output} {info.data if info and info.data else 'REFERENCE'}")


def _planned(model: str, path: Path, device: str | None) -> tuple:
    """The pipeline with a plan, its number of network calls, and the guidance scale at which it was searched."""
    import torch

    from ..models.teachers import load_pipeline
    from ..samplers.searched import PlanFile
    from ..search.layers import apply_plan

    file, pipe = PlanFile.load(path), load_pipeline(model)
    apply_plan(pipe, file)
    pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        scale = float(file.record["asked"]["call"]["guidance_scale"])
    except (KeyError, TypeError, ValueError):  # searched without, or a record of somebody's own
        scale = None
    return pipe, file.plan.nfe, scale


def _shared(model, device: str | None):
    """The pipeline on the device of this process with its guidance pairs shared with the others, and what counts them."""
    from ..core.processes import Processes
    from ..execution.rows import parallel_cfg
    from ..models.teachers import load_pipeline

    pipe = load_pipeline(model) if isinstance(model, str) else model
    pipe.to(Processes(device or "auto").device)
    return pipe, parallel_cfg(pipe)


def check_output(folder: Path) -> None:
    """Refuse a folder that could not be filled at the end of long work, before the work; nothing is left behind.

    Raises:
        UsageError: it is not empty, or cannot be made or written to.
    """
    from ..core.files import check_target

    if os.path.isfile(folder) or (os.path.isdir(folder) and os.listdir(folder)):  # Path's own refuse long names
        raise UsageError(f"{folder} is not an empty folder; give another --output.")
    first = folder / "dataset.json"
    while not os.path.exists(first.parent):
        first = first.parent
    check_target(first)


def settings(overrides: list[str] | None, sampler: str | None, guidance: str | None) -> dict[str, dict]:
    """What `--set` says: arguments ``sampler_options`` and ``guidance_options`` of `generation.generate`.

    Raises:
        UsageError: a setting of something that was not chosen.
    """
    dotted, plain = [], []
    for item in overrides or []:
        (dotted if "." in item.partition("=")[0] else plain).append(item)
    if plain and sampler is None:
        raise UsageError(
            f"--set {plain[0]} changes a sampler: name it with --sampler, see `diffaccel list samplers`; settings of "
            "guidance have the rule in front, such as apg.eta=0.5."
        )
    rules = parse_overrides(dotted)
    if rules and guidance is None:
        from ..guidance.registry import RULES

        first = next(iter(rules))
        choice = first if first in RULES and not RULES[first].wrapper else "RULE, see `diffaccel list guidance`"
        raise UsageError(f"--set {dotted[0]} changes guidance: choose it with --guidance {choice}.")
    return {"sampler_options": parse_overrides(plain), "guidance_options": rules}


def _classes(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise UsageError(f"--classes takes numbers separated by commas, such as 1,4,7; got {text!r}.") from None


def _prompts(typed: list[str] | None, file: Path | None) -> list[str] | None:
    """Prompts of the command line, None where there are none.

    Raises:
        UsageError, DataError: see `prompts.load_prompts`.
    """
    if file is None:
        return typed or None
    from ..models.prompts import load_prompts

    return [*(typed or []), *load_prompts(file)]
