"""Several students: a run for each in a folder of its own, one after the other or as jobs of their own, and all of them as one.

RUN/student-0, RUN/student-1, …   ordinary runs
RUN/final                         one pipeline, made when every student is finished
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.config import merge, to_dict
from ..core.errors import DataError, UsageError
from ..core.files import atomic_directory, write_atomic
from ..core.processes import Processes, is_main_process
from ..models.partition import FILE, read_partition
from ..training.recipes import RunConfig
from ..training.rundir import RunDirectory
from .run import check_method

Train = Callable[[RunConfig, Path, bool], Path]
"""Trains one student: settings, run folder, whether to continue it; returns its final/."""


def trains_all(config: RunConfig) -> bool:
    """Whether a run is for several students, one after the other."""
    method = config.method
    return method.get("students", 1) > 1 and method.get("student") is None


def student_folder(output: Path, student: int) -> Path:
    """The run folder of a student in that of all, or the folder itself if it is one."""
    name = f"student-{student}"
    return output if output.name == name else output / name


def train_students(
    config: RunConfig,
    output: Path,
    train: Train,
    resume: bool = False,
    say: Callable[[str], None] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Train all students one after the other; finished ones are kept when the run is continued.

    Args:
        config: of all, without ``method.student``.
        output: run folder, new or empty unless ``resume``.
        train: trains one.
        say: takes one line about what starts.
        facts: see `assemble`.

    Returns:
        The folder final/, see `assemble`.

    Raises:
        UsageError, DataError, NumericalError, InterruptedRun: see `RunDirectory` and `train`.
    """
    check_method(config)  # completes it
    settings = {key: value for key, value in to_dict(config).items() if value is not None}
    folders = [student_folder(output, index) for index in range(config.method["students"])]
    main = is_main_process()
    with RunDirectory(output, settings, resume, writes=main):
        # The first process decides: when others look, it may have begun already.
        state = [(folder / "final").is_dir() or 2 * (folder / "config.yaml").is_file() for folder in folders]
        state = Processes(config.trainer.device).gather_json([int(value) for value in state])[0]
        for index, (folder, found) in enumerate(zip(folders, state, strict=True)):
            if found == 1:
                continue
            if main and not found:
                shutil.rmtree(folder, ignore_errors=True)  # killed before it began
            if main and say:
                say(f"Student {index + 1} of {len(folders)}")
            train(replace(config, method={**config.method, "student": index}), folder, bool(found))
        if main and not (output / "final").is_dir():
            assemble(folders, output / "final", facts)
    return output / "final"


def assemble_finished(output: Path, facts: Mapping[str, Any] | None = None) -> Path | None:
    """Make final/ once the students that jobs of their own train are all finished.

    Args:
        output: the folder of all runs.

    Returns:
        final/, None as long as students are missing.
    """
    folders = sorted(path.parent for path in output.glob(f"student-*/{FILE}"))
    count = read_partition(folders[0]).students if folders else 0
    folders = [student_folder(output, index) for index in range(count)]
    if not folders or not all((folder / "final").is_dir() for folder in folders):
        return None
    if is_main_process() and not (output / "final").is_dir():
        assemble(folders, output / "final", facts)
    return output / "final"


def assemble(folders: Sequence[Path], final: Path, facts: Mapping[str, Any] | None = None) -> None:
    """One pipeline of all students: that of the first, whose network is a `MultiStudentModel`.

    Args:
        folders: finished runs of the students, in order.
        final: folder to be made.
        facts: for its card, see `card.model_card`.

    Raises:
        DataError: students of different partitions, networks or times.
        UsageError: the folder exists.
    """
    from ..models.multi_student import MultiStudentModel
    from ..models.networks import NETWORKS
    from ..models.saving import save_pipeline
    from ..models.teachers import load_pipeline, read_index
    from ..samplers.few_step import FewStepScheduler
    from .card import model_card

    partition = read_partition(folders[0])
    if len(folders) != partition.students:
        raise UsageError(f"The partition is among {partition.students} students; got {len(folders)} runs.")
    for folder in folders[1:]:
        if not read_partition(folder).agrees(partition):
            raise DataError(
                f"{folder} divides the conditions otherwise than {folders[0]}; train them with one partition."
            )
    pipeline = load_pipeline(folders[0] / "final")
    role = next(name for name in NETWORKS if getattr(pipeline, name, None) is not None)
    steps = pipeline.scheduler.steps
    for folder in folders:
        kind = read_index(folder / "final")["_class_name"]
        called = FewStepScheduler.from_pretrained(folder / "final", subfolder="scheduler").steps
        if kind != type(pipeline).__name__ or called != steps:
            raise DataError(
                f"{folder} has a {kind} called at {list(called.times)}, unlike {folders[0]}: {list(steps.times)}."
            )
    networks = [folder / "final" / role for folder in folders]
    pipeline.register_modules(**{role: MultiStudentModel(networks, partition)})
    call = "prompt='a photo of a cat'" if partition.textual else "class_labels=[0]"
    with atomic_directory(final) as temporary:
        save_pipeline(pipeline, temporary)
        shown = [
            file.read_text(encoding="utf-8") for folder in folders for file in (folder / "final").glob("prompts.txt")
        ]
        if shown:
            write_atomic(temporary / "prompts.txt", "".join(shown))
        known = {"teacher": "a model without name", "trained_for": f"all conditions, by {len(folders)} students"}
        known |= merge(facts, {"recipe": {"method": {"student": None}}}) if facts else {}
        card = model_card(times=steps.times, noise=steps.noise, call=call, text=partition.textual, **known)
        write_atomic(temporary / "README.md", card)
