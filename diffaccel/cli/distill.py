"""`diffaccel distill`: a one-step student from a teacher."""

from pathlib import Path
from typing import Annotated

import typer

from ..core.config import merge, parse_overrides, read_yaml, to_yaml
from ..core.errors import UsageError
from . import options
from .output import note, run_folder


def distill(
    teacher: Annotated[str | None, typer.Option(help="Name in `diffaccel list teachers`, or a model folder.")] = None,
    method: Annotated[
        str | None, typer.Option(help="dmd or f-distill; default: the teacher's recommended one.")
    ] = None,
    divergence: Annotated[str | None, typer.Option(help="f-distill only; see `diffaccel list divergences`.")] = None,
    data: Annotated[str | None, typer.Option(help="Real images for a discriminator: `digits` or a folder.")] = None,
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
    """Distil a diffusion model into a generator that needs one network evaluation.

    The run folder gets config.yaml, metrics.jsonl, sample sheets over time, checkpoints and final/, which
    diffusers.DiffusionPipeline.from_pretrained opens after `import diffaccel`.

    Examples:

    - `diffaccel distill --teacher digits`

    - `diffaccel distill --teacher digits --method dmd --seed 1 -o runs/dmd`

    - `diffaccel distill --teacher digits --method f-distill --divergence forward-kl`

    - `diffaccel distill --teacher digits -o runs/dmd --resume`

    - `diffaccel distill --teacher path/to/ddpm-folder --set trainer.optimizers.student.lr=2e-5 --dry-run`
    """
    from ..distill.run import resolve_distillation
    from ..models.teachers import check_adapter

    flags = options.trainer_flags(steps=steps, batch_size=batch_size, seed=seed, device=device, threads=threads)
    if divergence is not None and method not in (None, "f-distill"):
        raise UsageError(f"--divergence belongs to f-distill, not to {method!r}; use --method f-distill.")
    chosen = {"name": method or (divergence and "f-distill"), "divergence": divergence}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    given = {"teacher": teacher, "data": data, "method": chosen or None}
    flags |= {key: value for key, value in given.items() if value is not None}
    if resume:
        from ..training.launch import stored_settings

        # What this command names lies over what is stored, so that a change is refused instead of ignored.
        stored = stored_settings(output, chosen.get("name"))
        flags = merge(stored, read_yaml(config) if config else {}, parse_overrides(settings or []), flags)
    run_config = resolve_distillation(flags, config, settings)
    check_adapter(run_config.teacher)  # here, because torch and diffusers take seconds to import
    folder = output or run_folder("distill", run_config.teacher, run_config.method["name"])
    from ..core.processes import is_main_process
    from ..distillation import report_student, run_distillation

    if dry_run:
        from ..distill.run import build_method

        _print_plan(build_method(run_config), run_config, folder)
        return
    run_distillation(run_config, folder, resume, say=None if quiet else note)
    if not is_main_process():
        return
    final = folder / "final"
    typer.echo(f"Finished: {final}, one network evaluation per image")
    report = report_student(run_config, folder)
    if report:
        typer.echo(str(report))
    if not quiet:
        note(f"Next: diffaccel sample {final} --num 100 --grid student.png")


def _print_plan(method, run_config, folder: Path) -> None:
    from ..training.recipes import complete

    resolved = complete(run_config, list(method.roles))
    trainer = resolved["trainer"]
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in method.roles.items()}
    frozen = sum(p.numel() for p in method.teacher.parameters())
    # float32: weights, gradients and two Adam moments per trained role, one copy for the moving average.
    memory = 4 * (4 * sum(parameters.values()) + frozen + parameters["student"])
    typer.echo(f"# Plan: {resolved['method']['name']} on teacher {resolved['teacher']}, run folder {folder}")
    typer.echo(f"# teacher {frozen:,} parameters (frozen); " + ", ".join(f"{k} {v:,}" for k, v in parameters.items()))
    typer.echo(f"# weights, gradients, optimisers and average: {memory / 2**20:,.1f} MiB, plus activations")
    typer.echo(
        f"# {trainer['steps']} steps of {trainer['batch_size']} samples; real images: {resolved.get('data', 'none needed')}"
    )
    typer.echo(to_yaml(resolved), nl=False)
