"""Solver search from Python: the best schedule for one model and one budget of network evaluations, as a file."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .core.errors import NumericalError, UsageError, unknown
from .core.files import check_target
from .core.images import to_uint8
from .core.processes import Processes
from .evaluate.features import features_for, get_features
from .evaluate.metrics.frechet import distance
from .evaluate.moments import Moments
from .evaluate.monitor import Monitor
from .models.denoiser import Denoiser
from .models.teachers import load_pipeline, resolve_teacher
from .search.journal import Journal
from .search.objectives import Objective, Paired, Samples, Trajectory
from .search.outcome import Outcome, Progress
from .search.run import SolverSearch
from .search.settings import Settings
from .search.space import GENES
from .search.subjects import DenoiserSubject, PipelineSubject, Subject, fingerprint

OBJECTIVES = {
    "trajectory": "root mean square distance to the model's own fine trajectory from the same noise; needs no data",
    "fd-teacher": "Fréchet distance to the model's own fine samples from the same noise; needs no data",
    "fd": "Fréchet distance of features to reference images or statistics",
    "kd": "kernel distance (KID) of features to reference images",
}
STRATEGIES = {
    "s3": "evolution in which a trained predictor decides what is worth evaluating, then local search of real numbers",
    "evolution": "mutation and crossover of the best so far, then local search of real numbers",
    "times": "the same of the times alone; all else as in the hand-set schedules that it starts from",
}
DECISIONS = {
    "times": "when the network is called",
    "order": "Taylor order of a step, 1 to 4",
    "core": "what a step integrates: noise, data or velocity",
    "variable": "in which variable derivatives are taken: t, rho, log-rho, angle or step",
    "start": "from which node a step starts: the newest, or one before it",
    "points": "how many nodes estimate each derivative",
    "relaxation": "factor on the first derivative: those of UniPC and DPM-Solver, or any number",
    "carry": "momentum: share of the slope of the step before",
    "corrector": "whether a step is redone with the evaluation at its end, without or with another network call",
    "skip-first": "whether the network call at the first time is left out, and one more is made later",
    "end": "the noise level at which the run ends, where that is not 0",
}
_SAMPLES = {"trajectory": 128}
_MANY = 2000  # samples for distances of distributions
_LONG = 1000  # characters of conditions that files keep as they are
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def search_schedule(
    model,
    nfe: int,
    *,
    objective: str | Objective | Callable[[torch.Tensor], float] = "trajectory",
    reference=None,
    features: str = "auto",
    budget: int | str = 1000,
    strategy: str = "evolution",
    conditions: Sequence[Mapping] | None = None,
    call: Mapping | None = None,
    samples: int | None = None,
    validation: int | None = None,
    seed: int = 0,
    genes: Sequence[str] = GENES,
    skip_layers: float = 0.0,
    skip_scaling: bool = False,
    batch_size: int = 128,
    device: str | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Search the sampling schedule that suits one model and one budget, and compare it on fresh noise with what is known.

    Under torchrun or accelerate launch all processes share the evaluations and return the same.

    Args:
        model: teacher name or model folder; any diffusers pipeline for VP, EDM or flow models; or a `Denoiser`.
        nfe: network evaluations per sample, a guidance pair counted as two.
        objective: a name in `OBJECTIVES`, or a function of final states (N, …) float32, lower is better.
        reference: for "fd" and "kd": real images or statistics, see `evaluate.sources.resolve`; default: those that belong
            to a named teacher.
        features: for "fd" and "kd", see `evaluate.monitor.Monitor`.
        budget: candidates to evaluate, or a time such as "10m" for the whole search.
        strategy: "evolution", "s3" or "times", see `search.settings.Settings`.
        conditions: arguments of the pipeline by sample, such as [{"prompt": "a cat"}, {"prompt": "a dog"}], in turn;
            default: all classes of a class-conditional model. Of a denoiser: its condition for every sample.
        call: arguments of the pipeline that do not change, such as {"guidance_scale": 5.0}.
        samples: per candidate; default 128, and 2000 for distances of distributions.
        validation: samples of each fresh draw; default twice ``samples``.
        seed: of the search and of its noise.
        genes: what of a schedule may be searched, of `search.space.GENES`.
        skip_layers, skip_scaling: see `search.settings.Settings`.
        batch_size: samples per call of the pipeline.
        device: torch device; default CUDA where there is one, for opened models where they are.
        output: the plan's file; beside it FILE.log keeps every score, so that a search can be resumed.
        resume: continue the search that wrote ``output``'s log.
        tell: told the progress.

    Returns:
        The plan with the record of the search; written to ``output`` where that is given.

    Raises:
        UsageError: a budget below one evaluation, unknown names, prompts that are missing, a log of other settings.
        DataError, MissingWeightsError: the model or the reference cannot be opened.
        NumericalError: no schedule gives a finite score.
    """
    processes = Processes(device or "auto", together=True)
    subject = processes.agree(lambda: _subject(model, conditions, call, batch_size, device))
    calls = processes.agree(lambda: _calls(nfe, subject.evaluations))
    judge = processes.agree(lambda: _objective(objective, model, reference, features))
    if samples is None:
        samples = _SAMPLES.get(judge.name, _MANY)
    settings = processes.agree(
        lambda: Settings(
            calls, strategy, *parse_budget(budget), samples, validation, seed, tuple(genes), skip_layers, skip_scaling
        )
    )
    asked = _asked(conditions, call, reference, features)
    journal = processes.agree(lambda: _journal(output, settings, judge, subject, asked, resume, processes))
    known = processes.gather_json([journal.scores, journal.facts])[0]
    journal.scores, journal.facts = known
    try:
        told = tell if processes.rank == 0 else _silent
        outcome = SolverSearch(subject, judge, settings, journal, processes, told).run()
    except (UsageError, NumericalError) as error:
        vars(error).setdefault("told_elsewhere", processes.rank > 0)  # what all processes found, the first says
        if journal.path is not None and not resume:  # the same again would fail again
            journal.path.unlink(missing_ok=True)
        raise
    file = replace(outcome.file, record={**outcome.file.record, "asked": asked})
    outcome = replace(outcome, file=file, best=replace(outcome.best, file=file))
    if output is not None and processes.rank == 0:
        file.save(output)
    return outcome


def parse_budget(budget: int | str) -> tuple[int | None, float | None]:
    """(evaluations, None) or (None, seconds) of a number, or of a time such as "90s", "10m", "1.5h".

    Raises:
        UsageError: neither.
    """
    if isinstance(budget, int) and not isinstance(budget, bool):
        return budget, None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(budget).strip())
    if not found or (not found[2] and "." in found[1]):
        raise UsageError(
            f"A budget is a number of candidates, such as 500, or a time, such as 90s, 10m or 2h; got {budget!r}."
        )
    return (int(found[1]), None) if not found[2] else (None, float(found[1]) * _UNITS[found[2]])


def _calls(nfe: int, per_call: int) -> int:
    if not isinstance(nfe, int) or isinstance(nfe, bool) or nfe < per_call:
        raise UsageError(
            f"nfe must be a whole number of at least {per_call}, the evaluations of one call of this model; got {nfe!r}."
        )
    return nfe // per_call


def _subject(model, conditions, call, batch_size: int, device: str | None) -> Subject:
    if isinstance(model, Denoiser):
        given = (lambda start, count: None) if conditions is None else _tensors(conditions)
        if call:
            raise UsageError("A denoiser takes conditions only; arguments of a call belong to pipelines.")
        return DenoiserSubject(model, {}, given, batch_size)
    opened = not isinstance(model, (str, Path))
    pipe = model if opened else load_pipeline(model)
    if device or not opened:
        pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if conditions is None and getattr(pipe, "num_classes", None):
        conditions = [{"class_labels": label} for label in range(pipe.num_classes)]
    subject = PipelineSubject(pipe, conditions or [{}], call, batch_size)
    subject.check_conditions()
    return subject


def _objective(objective, model, reference, features: str) -> Objective:
    if isinstance(objective, Objective):
        return objective
    if callable(objective):
        return Samples(objective, getattr(objective, "__name__", "objective"), "a function of the final states")
    if objective == "trajectory":
        return Trajectory()
    if objective not in OBJECTIVES:
        raise unknown("objective", str(objective), OBJECTIVES)
    if objective == "fd-teacher":
        return Paired(_Frechet(model, features), objective, "FD to the fine trajectory's samples", decoded=True)
    monitor = Monitor(reference if reference is not None else _own_data(model), features, objective)
    return Samples(lambda images: monitor.distance(to_uint8(images)), objective, monitor.name, decoded=True)


class _Frechet:
    """Fréchet distance between two sets of samples: in features of images, or of a denoiser's states themselves."""

    def __init__(self, model, features: str):
        self._plain, self._features = isinstance(model, Denoiser), features
        self._extractor = None

    def __call__(self, samples: torch.Tensor, fine: torch.Tensor) -> float:
        return distance(*(self._gaussian(part) for part in (fine, samples)))

    def _gaussian(self, samples: torch.Tensor):
        vectors = samples.flatten(1)
        if not self._plain:
            if self._extractor is None:
                given = self._features
                self._extractor = get_features(features_for(samples.shape[1:]) if given == "auto" else given)
            with torch.no_grad():
                vectors = self._extractor(to_uint8(samples))
        return Moments(vectors.shape[1]).update(vectors).gaussian()


def _own_data(model) -> str:
    info = resolve_teacher(model)[1] if isinstance(model, str) else None
    if info is None or not info.data:
        raise UsageError(
            "What real images of this model look like is not known: give a reference, such as their folder."
        )
    return info.data


def _asked(conditions, call: Mapping | None, reference, features: str) -> dict:
    """What scores depend on besides settings and model, as JSON types; what is no such type, or long, as its hash."""

    def brief(value):
        if isinstance(value, torch.Tensor):
            return fingerprint(torch.nn.ParameterList([torch.nn.Parameter(value, requires_grad=False)]))
        if isinstance(value, Mapping):
            return {str(name): brief(one) for name, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [brief(one) for one in value]
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return value if isinstance(value, (str, int, float, type(None))) else type(value).__name__

    told = {"conditions": brief(conditions), "call": brief(call or {}), "reference": brief(reference)}
    told["features"] = features
    if len(text := json.dumps(told["conditions"])) > _LONG:
        told["conditions"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return told


def _journal(output, settings: Settings, judge: Objective, subject: Subject, asked, resume: bool, processes) -> Journal:
    if output is None:
        if resume:
            raise UsageError("Only a search with an output can be resumed.")
        return Journal(None, {})
    output = Path(output)
    check_target(output)
    about = settings.identity() | {"objective": judge.name, "unit": judge.unit, "model": subject.fingerprint()} | asked
    if processes.rank:
        return Journal(None, {})
    if output.exists() and not resume:
        raise UsageError(f"{output} exists already; choose another name or remove it first.")
    return Journal(output.with_name(output.name + ".log"), about, resume)


def _tensors(conditions: Sequence[Mapping]) -> Callable[[int, int], Mapping]:
    def given(start: int, count: int) -> Mapping:
        chosen = [conditions[(start + i) % len(conditions)] for i in range(count)]
        return {name: torch.stack([torch.as_tensor(one[name]) for one in chosen]) for name in chosen[0]}

    return given


def _silent(progress: Progress) -> None:
    pass
