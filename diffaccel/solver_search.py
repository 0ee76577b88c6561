"""Solver search from Python: the best schedule for one model and one budget of network evaluations, as a file."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from .core.errors import UsageError
from .core.files import check_target
from .core.images import to_uint8
from .core.processes import Processes
from .evaluate.monitor import Monitor
from .models.denoiser import Denoiser
from .models.teachers import load_pipeline, resolve_teacher
from .search.journal import Journal
from .search.objectives import Objective, Samples, Trajectory
from .search.run import Outcome, Progress, Settings, SolverSearch
from .search.space import GENES
from .search.subjects import DenoiserSubject, PipelineSubject, Subject

OBJECTIVES = {
    "trajectory": "root mean square distance to the model's own fine trajectory from the same noise; needs no data",
    "fd": "Fréchet distance of features to reference images or statistics",
    "kd": "kernel distance (KID) of features to reference images",
}
_SAMPLES = {"trajectory": 128}
_MANY = 1000  # samples for distances of distributions
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def search_schedule(
    model,
    nfe: int,
    *,
    objective: str | Objective | Callable[[torch.Tensor], float] = "trajectory",
    reference=None,
    features: str = "auto",
    budget: int | str = 1000,
    strategy: str = "s3",
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
        strategy: "s3", "evolution" or "times", see `search.run.Settings`.
        conditions: arguments of the pipeline by sample, such as [{"prompt": "a cat"}, {"prompt": "a dog"}], in turn;
            default: all classes of a class-conditional model. Of a denoiser: its condition for every sample.
        call: arguments of the pipeline that do not change, such as {"guidance_scale": 5.0}.
        samples: per candidate; default 128, and 1000 for distances of distributions.
        validation: samples of each fresh draw; default four times ``samples``.
        seed: of the search and of its noise.
        genes: what of a schedule may be searched, of `search.space.GENES`.
        skip_layers, skip_scaling: see `search.run.Settings`.
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
    per_call = subject.evaluations
    if not isinstance(nfe, int) or isinstance(nfe, bool) or nfe < per_call:
        raise UsageError(
            f"nfe must be a whole number of at least {per_call}, the evaluations of one call of this model; got {nfe!r}."
        )
    judge = processes.agree(lambda: _objective(objective, model, reference, features))
    evaluations, seconds = parse_budget(budget)
    settings = Settings(
        nfe // per_call,
        strategy,
        evaluations,
        seconds,
        samples or _SAMPLES.get(judge.name, _MANY),
        validation,
        seed,
        tuple(genes),
        skip_layers,
        skip_scaling,
    )
    journal = processes.agree(lambda: _journal(output, settings, judge, subject, resume, processes))
    known = processes.gather_json([journal.scores, journal.facts])[0]
    journal.scores, journal.facts = known
    outcome = SolverSearch(subject, judge, settings, journal, processes, tell if processes.rank == 0 else _silent).run()
    if output is not None and processes.rank == 0:
        outcome.file.save(output)
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
        from .core.errors import unknown

        raise unknown("objective", str(objective), OBJECTIVES)
    monitor = Monitor(reference if reference is not None else _own_data(model), features, objective)
    return Samples(lambda images: monitor.distance(to_uint8(images)), objective, monitor.name, decoded=True)


def _own_data(model) -> str:
    info = resolve_teacher(model)[1] if isinstance(model, str) else None
    if info is None or not info.data:
        raise UsageError(
            "What real images of this model look like is not known: give a reference, such as their folder."
        )
    return info.data


def _journal(output, settings: Settings, judge: Objective, subject: Subject, resume: bool, processes) -> Journal:
    if output is None:
        if resume:
            raise UsageError("Only a search with an output can be resumed.")
        return Journal(None, {})
    output = Path(output)
    check_target(output)
    about = settings.identity() | {"objective": judge.name, "unit": judge.unit, "model": subject.fingerprint()}
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
