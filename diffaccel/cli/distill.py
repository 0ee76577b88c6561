"""`diffaccel distill`: a student of one or a few steps from a teacher."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..core.config import merge, parse_overrides, read_yaml, to_yaml
from ..core.errors import MissingWeightsError, UsageError
from . import options
from .output import note, run_folder

_TEXT = "Text-to-image teachers"

app = typer.Typer(name="distill", rich_markup_mode="markdown")


@app.callback(invoke_without_command=True)
def distill(
    context: typer.Context,
    teacher: Annotated[str | None, typer.Option(help="Name in `diffaccel list teachers`, or a model folder.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Name in `diffaccel list methods`, or a Python file that registers one; default: the teacher's."
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Of the method: dmd2, ladd, …; see `list methods`.")] = None,
    divergence: Annotated[str | None, typer.Option(help="f-distill only; see `diffaccel list divergences`.")] = None,
    student_steps: Annotated[int | None, typer.Option(help="Network evaluations of the student.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance of the teacher, folded into the student.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Real samples: digits, a folder, or teacher:N for N of the teacher's own.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="What the student learns to draw, a prompt a line; default: the teacher's own, or the captions of --data.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(
            help="Rank of adapters that are trained in place of whole networks: student, critic and teacher share one "
            "frozen network.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    output: options.Output = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Packaged settings; see `diffaccel list recipes`.", rich_help_panel="Settings and files"),
    ] = None,
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
    """Distil a diffusion model into a generator that needs one or a few network evaluations.

    The run folder gets config.yaml, metrics.jsonl, sample sheets over time, checkpoints and final/, which
    diffusers.DiffusionPipeline.from_pretrained opens after `import diffaccel`.

    Examples:

    - `diffaccel distill --teacher digits`

    - `diffaccel distill --teacher digits --method f-distill --divergence forward-kl`

    - `diffaccel distill --teacher digits --method consistency --student-steps 4 -o runs/cd`

    - `diffaccel distill --teacher digits -o runs/dmd --resume`

    - `diffaccel distill --teacher tiny-sd --guidance-scale 3`

    - `diffaccel distill --teacher sd15 --prompts prompts.txt --lora 64 --dry-run`

    - `diffaccel distill --teacher path/to/ddpm-folder --set trainer.optimizers.student.lr=2e-5 --dry-run`
    """
    if context.invoked_subcommand:
        if any(context.params.values()):
            verb = context.invoked_subcommand
            raise UsageError(f"`diffaccel distill {verb}` takes its options after the word {verb}; see its --help.")
        return
    from ..distill.run import resolve_distillation
    from ..models.released import has_released
    from ..models.teachers import check_adapter

    flags = options.trainer_flags(steps=steps, batch_size=batch_size, seed=seed, device=device, threads=threads)
    if divergence is not None and method not in (None, "f-distill", "disback", "multi-student"):
        raise UsageError(f"--divergence belongs to f-distill, not to {method!r}; use --method f-distill.")
    chosen = {
        "name": method or (divergence and "f-distill"),
        "preset": preset,
        "divergence": divergence,
        "student_steps": student_steps,
        "guidance_scale": guidance_scale,
    }
    chosen = {key: value for key, value in chosen.items() if value is not None}
    given = {"teacher": teacher, "data": data, "prompts": prompts, "lora": lora, "method": chosen or None}
    flags |= {key: value for key, value in given.items() if value is not None}
    if resume:
        from ..training.launch import stored_settings

        # What this command names lies over what is stored, so that a change is refused instead of ignored.
        stored = stored_settings(output, chosen.get("name"))
        flags = merge(stored, read_yaml(config) if config else {}, parse_overrides(settings or []), flags)
    run_config = resolve_distillation(flags, config, settings, None if resume else recipe)
    folder = output or run_folder("distill", run_config.teacher, Path(run_config.method["name"]).stem)
    try:
        check_adapter(run_config.teacher)  # here, because torch and diffusers take seconds to import
    except MissingWeightsError as error:
        if not has_released(run_config.teacher):
            raise
        if dry_run:
            _plan_unseen(run_config)
            raise
        raise MissingWeightsError(f"{error} The plan of the run needs no weights: add --dry-run.") from None
    from ..core.processes import is_main_process
    from ..distillation import report_student, run_distillation

    if dry_run:
        _print_plan(run_config, folder)
        return
    final = run_distillation(run_config, folder, resume, say=None if quiet else note)
    if not is_main_process():
        return
    count = run_config.method.get("student_steps", 1)
    evaluations = "one network evaluation" if count == 1 else f"{count} network evaluations"
    typer.echo(f"Finished: {final}, {evaluations} per image")
    report = report_student(run_config, final.parent)
    if report:
        typer.echo(str(report))
    typer.echo(f"Report: {final.parent / 'report.html'}")
    if not quiet:
        note(f"Next: diffaccel sample {final} --num 100 --grid student.png")


def _plan_unseen(run_config) -> None:
    from ..distill.planning import plan_unseen

    plan = plan_unseen(run_config)
    typer.echo("\n".join(plan.lines()))
    plan.require_fit()


def _print_plan(run_config, folder: Path) -> None:
    """The plan as comments over the settings, so that all of it is a file for --config."""
    from ..core.config import to_dict
    from ..distill.planning import plan_run
    from ..distill.run import build_method
    from ..distill.student_runs import trains_all
    from ..training.recipes import complete

    several = trains_all(run_config)
    planned = replace(run_config, method={**run_config.method, "student": 0}) if several else run_config
    method = build_method(planned)
    plan = plan_run(method, planned)
    resolved = complete(planned, list(method.roles))
    if several:
        resolved = {**to_dict(run_config), "method": {**resolved["method"], "student": None}}
        typer.echo(f"# {run_config.method.get('students')} students, one after the other; the plan of each:")
    typer.echo("\n".join(f"# {line}" for line in (f"run folder  {folder}", *plan.lines())))
    typer.echo(to_yaml(resolved), nl=False)
    plan.require_fit()
