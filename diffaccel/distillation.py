"""Distillation from Python: one call from a teacher to a measured one-step student."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .core.images import to_uint8
from .core.processes import is_main_process
from .core.rng import KeyedRandom
from .distill.export import add_metrics
from .distill.planning import SMALL, plan_run
from .distill.run import build_method, card_facts, resolve_distillation
from .distill.samples import drawn_count
from .distill.student_runs import assemble_finished, student_folder, train_students, trains_all
from .evaluate.monitor import Monitor
from .evaluate.report import Report
from .evaluate.run import evaluate_fid
from .evaluate.run_page import write_run_page
from .models.teachers import TEACHERS
from .training.launch import launch, stored_settings
from .training.recipes import RunConfig
from .training.rundir import check_output

_PART = 100
_VALIDATION_SAMPLES, _VALIDATION_LATENTS = 500, 200  # the latter where a decoder costs more than a student


def distill_model(
    teacher: str,
    output: str | Path,
    *,
    method: str | None = None,
    data: str | None = None,
    prompts: str | None = None,
    recipe: str | None = None,
    settings: Sequence[str] = (),
    resume: bool = False,
    progress: bool = True,
) -> Path:
    """Distil a teacher into a student of one or a few steps, like `diffaccel distill`.

    Args:
        teacher: name in `diffaccel list teachers`, or a model folder.
        output: run folder, new or empty.
        method: name in `diffaccel list methods`, or a Python file that registers one; default: the teacher's recommended one.
        data: real samples: "digits", a folder, "teacher:N" for the teacher's own.
        prompts: text file with what a text-to-image student is trained to draw.
        recipe: name in `diffaccel list recipes`; default by teacher and method.
        settings: assignments as for ``--set``, such as "trainer.steps=100" or "lora=64".
        resume: continue the run in ``output``; settings must be those it was started with.
        progress: show a bar on a terminal.

    Returns:
        The folder final/ of the run, for `diffusers.DiffusionPipeline.from_pretrained`.

    Raises:
        UsageError, DataError, MissingWeightsError, NumericalError, InterruptedRun: one sentence each.
    """
    wanted = {"teacher": teacher, "data": data, "prompts": prompts, "method": {"name": method} if method else None}
    wanted = {key: value for key, value in wanted.items() if value is not None}
    if resume:
        wanted = stored_settings(Path(output), method) | wanted
    config = resolve_distillation(wanted, None, list(settings), recipe)
    return run_distillation(config, Path(output), resume, progress=progress)


def run_distillation(
    config: RunConfig,
    folder: Path,
    resume: bool = False,
    say: Callable[[str], None] | None = None,
    progress: bool | None = None,
) -> Path:
    """Train a resolved run in ``folder`` and return its final/ folder.

    Several students are trained one after the other in folders of their own, student-0 and so on, and assembled in final/. A
    run of one of them assembles all once it is the last to finish.

    Args:
        say: takes one line about what starts; None for silence.
        progress: show a bar on a terminal; default: if ``say`` is given.
    """
    bar = bool(say) if progress is None else progress
    if trains_all(config):

        def train(one: RunConfig, own: Path, again: bool) -> Path:
            return run_distillation(one, own, again, say, bar)

        return train_students(config, folder, train, resume, say, card_facts(config))
    if config.method.get("student") is not None:
        folder = student_folder(folder, config.method["student"])
    main = is_main_process()
    if main:
        check_output(folder, resume)
    method = build_method(config, say if main else None)
    if main and say:
        name, steps = config.method["name"], config.trainer.steps
        say(f"Distilling {config.teacher!r} with {name} for {steps} steps in {folder}")
    if sum(parameter.numel() for parameter in method.teacher.parameters()) > SMALL:
        plan = plan_run(method, config)
        if main and say:
            say("\n".join(plan.lines()))
        plan.require_fit()
    source = reference(config)
    evaluator = _validator(method, source) if source else None
    final = launch(method, config, folder, resume, evaluator, progress=main and bar)
    if (
        config.method.get("student") is not None
        and assemble_finished(folder.parent, card_facts(config))
        and main
        and say
    ):
        say(f"All students are finished: {folder.parent / 'final'}")
    return final


def report_student(config: RunConfig, folder: Path) -> Report | None:
    """Write report.html of a finished run, and measure final/ where there are real images: report.json, and its card."""
    source, report = reference(config), None
    if source:
        report = evaluate_fid(folder / "final", source, num=1000, seed=1)
        report.save(folder / "report.json")
        features = ", ".join(entry["name"] for entry in report.features)
        add_metrics(folder / "final", {f"Fréchet distance in {features}, N = 1000, against {source}": report.value})
    write_run_page(folder)
    return report


def reference(config: RunConfig) -> str | None:
    """Real images to measure against: the teacher's own data set, or what the run was given; None for no real ones."""
    info = TEACHERS.get(config.teacher)
    given = None if config.data and drawn_count(config.data) else config.data
    return (info.data if info else "") or given


def _validator(method, source: str) -> Callable:
    """A function from the averaged student to its Fréchet distance on a fixed set of noise and conditions."""
    monitor = Monitor(source)
    pixels = method.task.pipeline is None or not hasattr(method.task.pipeline, "vae")
    count = _VALIDATION_SAMPLES if pixels else _VALIDATION_LATENTS

    def evaluate(model) -> dict[str, float]:
        device = next(model.parameters()).device
        index = method.conditions.in_turn(0, count, device)
        images = [
            method.task.decode(method.generate_keyed(model, KeyedRandom(0), "validation", start, part))
            for start, part in zip(range(0, count, _PART), index.split(_PART), strict=True)
        ]
        return monitor(to_uint8(torch.cat(images).cpu()))

    return evaluate
