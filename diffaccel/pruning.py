"""Pruning from Python: one call from a model to a smaller one that opens like any other, recovered and measured."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from .core.errors import UsageError
from .core.files import atomic_directory, write_atomic
from .core.processes import rank_and_world, usable_device
from .evaluate.prune_judge import Judge, judge_for
from .models.networks import network_of
from .models.saving import save_pipeline
from .models.teachers import load_pipeline
from .prune.calibration import Calibration, calibrate
from .prune.classes import prune
from .prune.joint import search_selection, select_iteratively
from .prune.outcome import Outcome
from .prune.pipelines import PipelineRecovery, call_of, prompts_for
from .prune.plan import Point, measure_alternately, plan_of, point_of
from .prune.scores import Remembered, get_criterion, score
from .prune.selection import SOLVERS, Selection, reachable, select
from .prune.settings import COSTS, PruningConfig, resolve_pruning
from .prune.surgery import removed
from .prune.survey import Survey, survey_network
from .search.journal import Journal
from .training.launch import stored_settings
from .training.recipes import RunConfig, complete
from .training.rundir import RunDirectory, check_output


def prune_model(
    model: str,
    output: str | Path,
    *,
    recover: int | None = None,
    recovery: Sequence[str] = (),
    resume: bool = False,
    progress: bool = True,
    **settings,
) -> Outcome:
    """Prune a model, like `diffaccel prune`.

    Args:
        model: name in `diffaccel list teachers`, or a model folder.
        output: run folder, new or empty.
        recover: training steps of a recovery; None or 0 for none.
        recovery: its settings as for ``--set``, such as "method.features=plain".
        resume: continue the run in ``output``; settings must be those it was started with.
        progress: show bars on a terminal.
        **settings: of `prune.settings.PruningConfig`, such as ratio=0.35, method="ld-pruner", curve=().

    Returns:
        What was found; ``final`` is the folder for `diffusers.DiffusionPipeline.from_pretrained`.

    Raises:
        UsageError, DataError, MissingWeightsError, NumericalError, InterruptedRun: one sentence each.
    """
    stored = stored_pruning(Path(output)) if resume else None
    config, run = resolve_pruning({"model": str(model), **settings}, recover, None, recovery, stored)
    return run_pruning(config, run, Path(output), resume, progress=progress)


def run_pruning(
    config: PruningConfig,
    recovery: RunConfig | None,
    folder: Path,
    resume: bool = False,
    say: Callable[[str], object] = lambda text: None,
    progress: bool = True,
) -> Outcome:
    """Run what `prune.settings.resolve_pruning` made, in ``folder``; ``say`` takes a line about what starts."""
    if rank_and_world()[1] > 1:
        raise UsageError("Pruning runs in one process: start it without torchrun or accelerate launch.")
    check_output(folder, resume)
    device, bars = usable_device(config.device), _Bars(progress)
    pipe = load_pipeline(config.model).to(device)
    method = PipelineRecovery(config, recovery, pipe) if recovery else None
    settings = {"pruning": config.stored()} | (complete(recovery, ["student"]) if recovery else {})
    calibration = _calibration(config, pipe)
    survey = survey_network(calibration.network, calibration.one_call(), config.single, config.repeats)
    # What cannot be reached or measured fails here, before anything is scored or written.
    select(survey, dict.fromkeys(survey.names, 0.0), config.ratio, COSTS[config.cost], "ascending")
    judge = judge_for(config, pipe)
    with RunDirectory(folder, settings, resume) as run:
        say(f"Scoring {len(survey.names)} layers of {config.model!r} by {config.method} in {folder}")
        losses = Remembered(get_criterion(config.method).load()(calibration, **_seed(config)), folder / "scores.jsonl")
        survey = _settled(survey, losses.journal)
        with bars("scoring", len(survey.names), "layer") as bar:
            scores = score(losses, survey.names, progress=lambda *_: bar.update())
        selections = {
            ratio: _selected(config, survey, scores, losses, ratio, bars) for ratio in _ratios(config, survey, scores)
        }
        points = [point_of(survey, selection, ratio) for ratio, selection in selections.items()]
        points = _measured(config, calibration, points, judge, folder, bars)
        point = next(one for one in points if one.ratio == config.ratio)
        teacher = copy.deepcopy(calibration.network) if method else None
        prune(pipe, point.names)
        plan = _plan(config, survey, scores, pipe, (points[0], point), selections[config.ratio])
        write_atomic(folder / "plan.json", json.dumps(plan, indent=2) + "\n")
        final = folder / "final"
        if method and not final.exists():
            say(f"Recovering for {recovery.trainer.steps} steps")
            method.fit(pipe, teacher, run, resume, progress)
        elif not final.exists():
            with atomic_directory(final) as temporary:
                save_pipeline(pipe, temporary)
        recovered = None
        if method:
            del teacher, pipe, calibration
            recovered = replace(point, fd=judge(load_pipeline(str(final)).to(device)) if judge else None)
    return Outcome(final, config, survey, scores, plan, points, recovered, judge.name if judge else "")


def stored_pruning(output: Path | None) -> dict:
    """Settings of the run to be resumed, see `training.launch.stored_settings`.

    Raises:
        UsageError: no folder, no run in it, or one of another kind.
    """
    stored = stored_settings(output)
    if "pruning" not in stored:
        raise UsageError(f"{output} holds another kind of run, which diffaccel prune cannot continue.")
    return stored


class _Bars:
    """Progress bars on stderr, on a terminal."""

    def __init__(self, shown: bool):
        self.shown = shown

    def __call__(self, what: str, total: int, unit: str) -> tqdm:
        return tqdm(desc=what, total=total, unit=unit, disable=None if self.shown else True, leave=False)


def _seed(config: PruningConfig) -> dict:
    return {"seed": config.seed} if config.method == "random" else {}


def _calibration(config: PruningConfig, pipe) -> Calibration:
    prompts = prompts_for(config)
    conditions = prompts and [{"prompt": one} for one in prompts]
    more = {"count": config.samples, "steps": config.steps, "seed": config.seed}
    return calibrate(pipe, conditions, call_of(config), config.batch_size, **more)


def _settled(survey: Survey, journal: Journal) -> Survey:
    """The survey with the times that were measured when the run began, since they decide what is removed."""
    if survey.seconds is None:
        return survey
    names = ["", *survey.names]
    values = [survey.seconds, *(one.seconds for one in survey.candidates)]
    seconds = journal.settle("seconds", dict(zip(names, values, strict=True)))
    candidates = tuple(replace(one, seconds=seconds[one.name]) for one in survey.candidates)
    return replace(survey, candidates=candidates, seconds=seconds[""])


def _ratios(config: PruningConfig, survey: Survey, scores: dict[str, float]) -> list[float]:
    """Of the trade-off curve: none, that of the plan, and those of the others that can be reached."""
    usable = [name for name, value in scores.items() if math.isfinite(value)]
    most = reachable(survey, usable, COSTS[config.cost])
    return sorted({0.0, config.ratio, *(one for one in config.curve if one <= most)})


def _selected(
    config: PruningConfig, survey: Survey, scores: dict, losses: Remembered, ratio: float, bars: _Bars
) -> Selection:
    asked = (survey, scores, losses, ratio, COSTS[config.cost])
    if config.select in SOLVERS:
        return select(survey, scores, ratio, COSTS[config.cost], config.select)
    searched = config.select == "searched"
    with bars(f"selecting {ratio:g}", config.evaluations if searched else None, "set") as bar:

        def tell(done: int, *_) -> None:
            bar.update(done - bar.n)

        if searched:
            return search_selection(*asked, config.evaluations, config.seed, tell)
        return select_iteratively(*asked, progress=tell)


def _plan(config: PruningConfig, survey: Survey, scores: dict, pipe, points: tuple[Point, Point], chosen: Selection):
    layers = network_of(pipe).config.pruned_layers
    records = [dict(one) for one in layers if one["name"] in chosen.names]
    asked = {name: getattr(config, name) for name in ("model", "method", "select", "cost", "ratio")}
    return asked | plan_of(survey, scores, records, *points, chosen.score)


def _measured(
    config: PruningConfig,
    calibration: Calibration,
    points: list[Point],
    judge: Judge | None,
    folder: Path,
    bars: _Bars,
) -> list[Point]:
    """Time and distance of all points, in the network from which operators are removed meanwhile."""
    network = calibration.network
    if config.repeats:
        cases = [point.names for point in points]
        seconds = measure_alternately(network, calibration.one_call(), cases, config.repeats)
        points = [replace(point, seconds=one) for point, one in zip(points, seconds, strict=True)]
    if judge is None:
        return points
    file = folder / "distances.jsonl"
    journal = Journal(file, {"distance": judge.name, **config.stored()}, file.exists(), "measurement")
    found = []
    with bars("measuring", len(points), "model") as bar:
        for point in points:
            key = "+".join(point.names)
            if key not in journal.scores:
                with removed(network, point.names):
                    journal.add(key, judge(calibration.subject.pipe))
            found.append(replace(point, fd=journal.scores[key]))
            bar.update()
    return found
