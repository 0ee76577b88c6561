"""Distillation methods side by side: each trained on one teacher under one budget, and all measured alike."""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .core.config import differences, read_yaml
from .core.errors import DiffaccelError, InterruptedRun, UsageError
from .core.files import write_atomic
from .core.images import save_png
from .core.processes import rank_and_world
from .core.versions import library_versions
from .distill.budget import measure_pace
from .distill.entries import Entry, parse_entries
from .distill.run import check_method
from .distillation import reference as reference_of
from .distillation import report_student, run_distillation
from .evaluate.distill_judge import SEED, Judge
from .evaluate.distill_page import MANY, ONE, SHEETS, gained, write_comparison
from .evaluate.run_page import write_run_page
from .models.prompts import load_prompts, own_prompts
from .solver_search import parse_budget
from .training.recipes import RunConfig
from .training.rundir import changed_settings, check_output

TEACHER_STEPS = {MANY: 50, ONE: 1}  # between which the gain of a student is counted
_STATE = "comparison.json"


def compare_methods(
    teacher: str,
    methods: str | Sequence[str],
    output: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    budget: str | None = None,
    num: int = 1000,
    reference: str | None = None,
    data: str | None = None,
    prompts: str | None = None,
    settings: Sequence[str] = (),
    device: str | None = None,
    threads: int | None = None,
    say: Callable[[str], None] | None = None,
) -> dict:
    """Train methods on one teacher, each with its own recipe, measure students and teacher, and write the comparison.

    In a folder of the same settings it goes on where it was stopped, and keeps what is trained; methods, seeds and how
    is measured (``num``, ``reference``) may be others then. A run that fails does not stop the others.

    Args:
        teacher: name in `diffaccel list teachers`, or a model folder.
        methods: see `distill.entries.parse_entries`.
        output: folder, new, empty or of the same comparison; gets a run folder METHOD-seed-S for each, report.json and
            report.html, which are written anew after every run.
        seeds: each method is trained once with each.
        steps: training steps of each; default: those of its recipe.
        budget: in place of steps: processor time of the training of each, such as "90s"; on a GPU, time. How many steps
            that is, a few of them that are thrown away tell; pictures and validation are not counted.
        num: images of each model that are measured.
        reference: real images to measure against, or their statistics; default: the teacher's, or ``data``.
        data, prompts: of all methods, see `distillation.distill_model`.
        settings: assignments as for ``--set``, of all methods.
        device, threads: of training, see `training.config.TrainerConfig`.
        say: takes a line about what starts; None for silence and no progress bars.

    Returns:
        The content of report.json, see `evaluate.distill_page`.

    Raises:
        UsageError: unknown methods, recipes or settings, a folder of something else, no reference.
        DataError, MissingWeightsError, NumericalError: the teacher cannot be opened, drawn from or measured.
        InterruptedRun: Ctrl-C or SIGTERM; what was trained so far is kept.
    """
    if rank_and_world()[1] > 1:
        raise UsageError("A comparison runs in one process: start it without torchrun or accelerate launch.")
    if steps is not None and budget is not None:
        raise UsageError("Give either steps or a budget, not both.")
    seconds = None if budget is None else _seconds(budget)
    trainer = {key: value for key, value in {"device": device, "threads": threads}.items() if value is not None}
    flags = {key: value for key, value in {"data": data, "prompts": prompts}.items() if value is not None}
    flags |= {"teacher": teacher, "trainer": trainer}
    jobs: dict[Entry, dict[int, RunConfig]] = {}
    for entry in parse_entries(methods):  # what is wrong with any of them is said before anything is trained
        jobs[entry] = {seed: entry.resolve(flags, settings, seed, steps) for seed in seeds}
        for config in jobs[entry].values():
            with entry.named():
                check_method(config)
    configs = [config for runs in jobs.values() for config in runs.values()]
    if not configs:
        raise UsageError("Comparing methods needs at least one of seeds; got none.")
    judge = _judge(teacher, configs, reference, prompts, num, device)
    asked = {"teacher": teacher, "steps": steps, "budget": seconds, "data": data, "prompts": prompts}
    comparison = _Comparison(Path(output), asked | {"settings": list(settings)}, judge, say)
    comparison.measure_teacher(configs)
    for entry, runs in jobs.items():
        comparison.train(entry, runs, seconds)
    return comparison.write()


class _Comparison:
    """The folder of a comparison: comparison.json says what has been done, report.json what was found."""

    def __init__(self, folder: Path, settings: dict, judge: Judge, say: Callable[[str], None] | None):
        self.folder, self.settings, self.judge, self.say = folder, settings, judge, say
        self.state = {"settings": settings, "paces": {}, "runs": {}, "measured": {}}
        path = folder / _STATE
        if path.is_file():
            stored = read_yaml(path)  # JSON is YAML
            changed = differences(stored["settings"], settings)
            if changed:
                raise changed_settings(folder, changed)
            self.state = stored
        else:
            check_output(folder, resume=False)
        try:
            (folder / SHEETS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"Cannot write to {folder}: {error.strerror}.") from None
        self._save()
        self.rows: list[dict] = []
        self.failures: list[dict] = []
        self.warnings: list[str] = []

    def measure_teacher(self, configs: Sequence[RunConfig]) -> None:
        """With the guidance that is folded into most students."""
        scales = Counter(config.method.get("guidance_scale", 1.0) for config in configs)
        scale = scales.most_common(1)[0][0]
        if len(scales) > 1:
            found = ", ".join(f"{one:g}" for one in scales)
            self.warnings.append(
                f"students have the guidance scales {found} folded in, and the teacher is drawn at {scale:g}"
            )
        for label, steps in TEACHER_STEPS.items():
            name = f"teacher-{steps}-step{'' if steps == 1 else 's'}-guidance-{scale:g}"
            values = self._measured(name, configs[0].teacher, steps=steps, guidance_scale=scale)
            self.rows.append({"label": label, "runs": [{"name": name, **values}]})

    def train(self, entry: Entry, runs: dict[int, RunConfig], budget: float | None) -> None:
        """Train and measure one method with every seed; what fails is kept as a failure."""
        row = {"label": entry.label, "runs": []}
        self.rows.append(row)
        for seed, config in runs.items():
            name = entry.folder(seed)
            try:
                if budget is not None:
                    config.trainer.steps = self._steps_within(budget, entry, config)
                self._trained(name, config)
                values = self._measured(name, str(self.folder / name / "final"))
            except InterruptedRun as stop:
                raise InterruptedRun(
                    f"Stopped, {name} was in the making; the same command goes on in {self.folder}.",
                    stop.exit_code - 128,
                ) from None
            except DiffaccelError as error:
                failure = {"label": entry.label, "seed": seed, "text": str(error), "exit_code": error.exit_code}
                self.failures.append(failure)
                self._tell(f"{name} failed: {error}")
            else:
                spent = {key: self.state["runs"][name][key] for key in ("cpu_seconds", "wall_seconds")}
                facts = {"seed": seed, "steps": config.trainer.steps, "data": config.data, **spent}
                row["runs"].append({"name": name, **facts, **values, "gain": gained(self.rows, values["fd"])})
            self.write()

    def write(self) -> dict:
        """Write report.json and report.html with what there is so far; the content of the former."""
        measured = [run for row in self.rows for run in row["runs"]]
        warnings = [text for run in measured for text in run["warnings"]]
        content = {
            "settings": self.settings,
            "metric": measured[0]["metric"],
            "num": self.judge.num,
            "reference": self.judge.reference,
            "image_seed": SEED,
            "rows": self.rows,
            "failures": self.failures,
            "warnings": list(dict.fromkeys([*self.warnings, *warnings])),
            "versions": library_versions(),
        }
        write_comparison(content, self.folder)
        return content

    def _steps_within(self, budget: float, entry: Entry, config: RunConfig) -> int:
        """Training steps of a method, found once and then kept: learning rates depend on them."""
        paces = self.state["paces"]
        if entry.label not in paces:
            self._tell(f"Timing a few steps of {entry.label}")
            pace = measure_pace(config)
            steps = pace.steps_within(budget)
            self._tell(f"{pace.step:.3g} s a step, so {steps} steps")
            paces[entry.label] = {"steps": steps, **pace.to_dict()}
            self._save()
        return paces[entry.label]["steps"]

    def _trained(self, name: str, config: RunConfig) -> None:
        folder, runs = self.folder / name, self.state["runs"]
        spent = runs.setdefault(name, {"done": False, "cpu_seconds": 0.0, "wall_seconds": 0.0})
        if spent["done"] and (folder / "final").is_dir():
            return
        started = time.process_time(), time.monotonic()
        try:
            run_distillation(config, folder, resume=(folder / "config.yaml").is_file(), say=self.say)
            spent["done"] = True
        except torch.OutOfMemoryError:
            raise DiffaccelError(
                "The device ran out of memory; set a smaller trainer.batch_size for all methods."
            ) from None
        finally:
            spent["cpu_seconds"] += time.process_time() - started[0]
            spent["wall_seconds"] += time.monotonic() - started[1]
            self._save()
            if not spent["done"] and (folder / "metrics.jsonl").is_file():
                write_run_page(folder)
        report_student(config, folder)

    def _measured(self, name: str, model: str, **drawing) -> dict:
        """What the judge says, now or before of the same images."""
        sheet, known = self.folder / SHEETS / f"{name}.png", self.state["measured"]
        asked = {"num": self.judge.num, "reference": self.judge.reference}
        if known.get(name, {}).get("asked") != asked or not sheet.is_file():
            self._tell(f"Measuring {self.judge.num} images of {name}")
            values, picture = self.judge(model, **drawing)
            save_png(picture, sheet)
            known[name] = {"asked": asked, "values": values}
            self._save()
        return known[name]["values"]

    def _save(self) -> None:
        write_atomic(self.folder / _STATE, json.dumps(self.state, indent=2) + "\n")

    def _tell(self, text: str) -> None:
        if self.say:
            self.say(text)


def _judge(teacher: str, configs: Sequence[RunConfig], reference, prompts, num: int, device: str | None) -> Judge:
    if not reference:
        reference = next(filter(None, map(reference_of, configs)), None)
    if not reference:
        raise UsageError(
            f"What real images of {teacher} look like is not known: give a reference, such as a folder of them."
        )
    texts = load_prompts(prompts) if prompts else own_prompts(teacher)
    return Judge(reference, num, texts, device=None if device == "auto" else device)


def _seconds(budget: str) -> float:
    seconds = parse_budget(budget)[1]
    if not seconds:
        raise UsageError(f"A budget is a time, such as 90s, 10m or 2h; got {budget!r}.")
    return seconds
