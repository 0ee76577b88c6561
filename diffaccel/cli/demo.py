"""`diffaccel demo`: the whole way on the embedded digits, in about two minutes."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..core.config import merge
from .output import note, table


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the demo; continued if it exists.")] = Path(
        "demo"
    ),
    method: Annotated[str | None, typer.Option(help="dmd or f-distill; default: the recommended one.")] = None,
    num: Annotated[int, typer.Option(min=100, help="Images measured per model.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of training and samples.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no hints.")] = False,
):
    """Distil the embedded digits teacher to one step, measure it, and write a report to look at.

    Example: `diffaccel demo -o demo`
    """
    from ..core.files import write_atomic
    from ..core.versions import library_versions
    from ..distill.run import resolve_distillation
    from ..training.launch import stored_settings

    run = output / "run"
    resume = (run / "config.yaml").is_file()
    wanted = {"teacher": "digits", "trainer": {"seed": seed}} | ({"method": {"name": method}} if method else {})
    settings = resolve_distillation(merge(stored_settings(run, method), wanted) if resume else wanted)
    from ..distillation import run_distillation

    final = run_distillation(settings, run, resume, say=None if quiet else note)
    from ..evaluate.contenders import HEADER, Contender, compare_digits, gain, save_overview
    from ..evaluate.page import write_page

    if not quiet:
        note(f"Measuring {num} images of each model")
    contenders = [
        Contender("teacher, 50 steps", "digits", steps=50),
        Contender("teacher, 1 step", "digits", steps=1),
        Contender("student, 1 step", str(final)),
    ]
    rows = compare_digits(contenders, num, seed)
    distances = {row.label: row.report.value for row in rows}
    recovered = gain(distances, "teacher, 1 step", "teacher, 50 steps", "student, 1 step")
    summary = (
        f"The student draws a digit in one network evaluation and recovers {100 * recovered:.1f} % of the distance "
        "between the teacher at one step and the teacher at fifty."
    )
    next_commands = [
        f"diffaccel sample {final} --num 100 --grid student.png",
        f"diffaccel evaluate fid {final} digits:heldout",
        "diffaccel sample digits --steps 5 --sampler flow-adams --grid teacher-5.png",
        "diffaccel distill --teacher digits --method dmd",
        "diffaccel list methods",
    ]
    facts = {
        "gain": recovered,
        "num": num,
        "seed": seed,
        "versions": library_versions(),
        "features": rows[0].report.features,
    }
    content = {**facts, "rows": [row.to_dict() for row in rows]}
    write_atomic(output / "report.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    save_overview(rows, output / "overview.png")
    write_page(output / "report.html", "One-step digits", summary, rows, run, next_commands, facts)
    typer.echo(table(HEADER, [row.cells() for row in rows]))
    typer.echo("FD is biased upwards by about 1/N: compare equal N, or the corrected column.")
    typer.echo(summary)
    typer.echo(f"Report: {output / 'report.html'}   Picture: {output / 'overview.png'}")
    if not quiet:
        note("Try next:\n  " + "\n  ".join(next_commands))
