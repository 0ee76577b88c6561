"""`diffaccel train`: the recipes behind everything that ships."""

from typing import Annotated

import typer

from ..core.config import merge, to_yaml
from . import options
from .output import note, run_folder


def train(
    recipe: Annotated[str, typer.Option(help="See `diffaccel list recipes`.")] = "digits",
    output: options.Output = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    seed: options.Seed = None,
    device: options.Device = None,
    threads: options.Threads = None,
    config: options.Config = None,
    settings: options.Set = None,
    dry_run: options.DryRun = False,
    resume: options.Resume = False,
    quiet: options.Quiet = False,
):
    """Train a shipped model from scratch: teachers and feature extractors.

    Examples:

    - `diffaccel train --recipe digits -o runs/teacher`

    - `diffaccel train --recipe digits -o runs/teacher --resume`

    - `diffaccel train --recipe digits-features --seed 1`

    - `diffaccel train --recipe tiny-sd -o runs/sd --set method.autoencoder=runs/vae/final --set method.text=runs/text/final`

    - `torchrun --nproc_per_node 2 -m diffaccel train --recipe mnist -o runs/mnist`
    """
    from ..core.processes import is_main_process
    from ..training.launch import launch, stored_settings
    from ..training.recipes import complete, method_settings, read_recipe, resolve
    from ..training.registry import load_method
    from ..training.rundir import check_output, last_validation

    flags = options.trainer_flags(steps=steps, batch_size=batch_size, seed=seed, device=device, threads=threads)
    base = read_recipe("train", recipe)
    if resume:
        base = merge(base, stored_settings(output, base["method"]["name"]))
    run_config = resolve(base, config, settings or [], flags)
    method_class = load_method(run_config.method["name"])
    method = method_class(method_settings(run_config, method_class.Config), run_config.trainer.seed)
    folder = output or run_folder("train", recipe)
    if dry_run:
        typer.echo(to_yaml(complete(run_config, list(method.roles))), nl=False)
        return
    main = is_main_process()
    if main:
        check_output(folder, resume)
    if main and not quiet:
        note(f"Training {recipe!r} for {run_config.trainer.steps} steps in {folder}")
    final = launch(method, run_config, folder, resume, progress=main and not quiet)
    if not main:
        return
    typer.echo(f"Finished: {final}")
    for key, value in last_validation(folder).items():
        typer.echo(f"{key}: {value:.4f}")
    if method.reference:
        from ..evaluate.run import evaluate_fid

        report = evaluate_fid(final, method.reference, num=1000, progress=not quiet, **method.drawing)
        report.save(folder / "report.json")
        typer.echo(str(report))
        if not quiet:
            note(f"Next: diffaccel sample {final} --grid sheet.png")
