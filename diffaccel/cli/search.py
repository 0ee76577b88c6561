"""`diffaccel search`: the best sampling schedule for one model and one budget of network evaluations."""

import json
import math
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..core.config import parse_overrides
from ..core.errors import InterruptedRun, UsageError, unknown
from .output import interrupted, make_folder, note, table

_BAR = "{desc}|{bar}| {n_fmt}/{total_fmt} schedules{postfix}"
_EVERY = 30.0  # seconds between lines where there is no terminal
_model = partial(typer.Option, rich_help_panel="Model and its calls")
_search = partial(typer.Option, rich_help_panel="Search")
_files = partial(typer.Option, rich_help_panel="Files and output")


def search(
    model: Annotated[str, _model(help="Teacher name, or a folder that diffusers opens.", show_default=False)],
    nfe: Annotated[
        int, _model(help="Network evaluations per image, a guidance pair counted as two.", show_default=False)
    ],
    output: Annotated[
        Path,
        _files("--output", "-o", help="The plan, a .json file; log, .png and .html go beside it.", show_default=False),
    ],
    guidance_scale: Annotated[float | None, _model(help="As in the pipeline's call; default: the pipeline's.")] = None,
    prompts: Annotated[
        Path | None,
        _model(help="Of text-to-image models: a text file, one prompt a line, or a teacher; default: the model's own."),
    ] = None,
    negative_prompt: Annotated[str | None, _model(help="Beside every prompt.")] = None,
    overrides: Annotated[
        list[str] | None,
        _model("--set", help="Other arguments of the pipeline's call, such as height=512; repeat it."),
    ] = None,
    batch_size: Annotated[
        int, _model(min=1, help="Samples per call of the pipeline; changes them by rounding at most.")
    ] = 128,
    device: Annotated[str | None, _model(help="Torch device; default CUDA where there is one.")] = None,
    objective: Annotated[str, _search(help="See `diffaccel list objectives`.")] = "trajectory",
    reference: Annotated[
        str | None, _search(help="For fd and kd: real images or their statistics; default: those of the teacher.")
    ] = None,
    features: Annotated[str, _search(help="For fd and kd; see `diffaccel list features`.")] = "auto",
    budget: Annotated[str, _search(help="Candidates, such as 500, or a time for everything: 90s, 10m, 2h.")] = "1000",
    strategy: Annotated[str, _search(help="See `diffaccel list strategies`.")] = "evolution",
    fix: Annotated[
        str | None, _search(help="What may not be searched, such as core,end; see `diffaccel list decisions`.")
    ] = None,
    skip_layers: Annotated[
        float, _search(help="Share of a network call that may be left out; what that saves is spent on more calls.")
    ] = 0.0,
    skip_scaling: Annotated[bool, _search("--skip-scaling", help="Also scale the skip features of a U-Net.")] = False,
    samples: Annotated[
        int | None, _search(min=1, help="Per candidate; default 128, and 2000 for distances of distributions.")
    ] = None,
    validation: Annotated[int | None, _search(min=1, help="Of each fresh draw; default twice --samples.")] = None,
    seed: Annotated[int, _search(help="Of the search and of its noise.")] = 0,
    resume: Annotated[bool, _files("--resume", help="Continue the search that wrote the log of --output.")] = False,
    as_json: Annotated[bool, _files("--json", help="Print one JSON object on stdout instead of text.")] = False,
    quiet: Annotated[bool, _files("--quiet", "-q", help="No progress, no hints.")] = False,
):
    """Search the sampling schedule that suits one model and one budget of network evaluations.

    When the network is called and what every step does is searched, from all samplers as set by hand on, and the winner
    has to beat the best of those on fresh noise. Where it does not, the plan is the hand-set one, and that is said.

    Examples:

    - `diffaccel search --model digits --nfe 5 --budget 10m -o plan.json`

    - `diffaccel search --model digits --nfe 5 --budget 10m -o plan.json --resume`

    - `diffaccel search --model digits --nfe 8 --objective fd --fix core,variable -o plan.json`

    - `diffaccel search --model path/to/pipeline --nfe 10 --guidance-scale 5 --prompts prompts.txt -o plan.json`

    - `torchrun --nproc_per_node 2 -m diffaccel search --model digits --nfe 5 -o plan.json`

    Then, for example: `diffaccel sample digits --plan plan.json --num 100 --grid digits.png`
    """
    from ..core.processes import Processes

    processes = Processes(device or "auto")
    alone = processes.rank == 0

    def checked() -> dict:
        from ..models.teachers import resolve_teacher
        from ..solver_search import parse_budget

        _check_files(output, resume)
        resolve_teacher(model)
        parse_budget(budget)
        return {
            "call": _call(overrides, guidance_scale),
            "conditions": _conditions(model, prompts, negative_prompt),
            "genes": _genes(fix, strategy),
        }

    arguments = processes.agree(checked)
    if not resume:
        make_folder(output.parent)
    from ..solver_search import search_schedule

    started = time.monotonic()
    try:
        with _Shown(alone and not quiet) as shown:
            outcome = search_schedule(
                model,
                nfe,
                objective=objective,
                reference=reference,
                features=features,
                budget=budget,
                strategy=strategy,
                samples=samples,
                validation=validation,
                seed=seed,
                skip_layers=skip_layers,
                skip_scaling=skip_scaling,
                batch_size=batch_size,
                device=device,
                output=output,
                resume=resume,
                tell=shown,
                **arguments,
            )
        if alone:
            if not quiet and nfe % (each := outcome.subject.evaluations):
                note(
                    f"A network call takes {each} evaluations here (guidance): {nfe // each} calls, {nfe % each} unspent."
                )
            _report(outcome, model, output, time.monotonic() - started, as_json, quiet)
    except (KeyboardInterrupt, SystemExit) as stop:
        raise _stopped(stop, output, alone) from None


class _Shown:
    """Progress on stderr: a bar on a terminal, elsewhere a line per stage and now and then."""

    def __init__(self, wanted: bool):
        self.wanted, self._bar, self._stage, self._told = wanted, None, "", 0.0

    def __enter__(self):
        if self.wanted and sys.stderr.isatty():
            from tqdm import tqdm

            columns, rows = shutil.get_terminal_size()  # where a terminal says 0 by 0, tqdm would show nothing
            size = {"ncols": columns, "nrows": rows}
            self._bar = tqdm(bar_format="{desc}", total=0, leave=False, desc="opening the model", **size)
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()

    def __call__(self, progress) -> None:
        if not self.wanted:
            return
        facts = [f"best {progress.best:.4g}"] if math.isfinite(progress.best) else []
        tau = progress.facts.get("kendall_tau")
        facts += [] if tau is None else [f"predictor's rank correlation {tau:.2f}"]
        facts += [] if progress.left is None else [f"about {_clock(progress.left)} left"]
        if self._bar is not None:
            self._bar.total, self._bar.n = progress.planned, progress.done
            self._bar.bar_format = _BAR if progress.planned else "{desc}"
            self._bar.set_description_str(progress.stage, refresh=False)
            self._bar.set_postfix_str(", ".join(facts))
            return
        now = time.monotonic()
        if progress.stage != self._stage or now - self._told > _EVERY:
            self._stage, self._told = progress.stage, now
            done = [f"{progress.done} of {progress.planned} schedules"] if progress.planned else []
            note(f"{progress.stage}: {', '.join([*done, *facts])}" if done or facts else progress.stage)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _check_files(output: Path, resume: bool) -> None:
    """Refuse what would fail, or overwrite something, at the end of the search."""
    if output.suffix.lower() != ".json":
        raise UsageError(f"A plan is a JSON file: give --output a name such as plan.json; got {output.name!r}.")
    beside = [output, *(output.with_suffix(kind) for kind in (".png", ".html"))]
    for path in () if resume else beside:
        if path.exists():
            raise UsageError(
                f"{path} exists already: add --resume if it belongs to this search, or give another --output."
            )


def _call(overrides: list[str] | None, guidance_scale: float | None) -> dict:
    """Arguments of the pipeline's call that do not change."""
    call = parse_overrides(overrides or [])
    if guidance_scale is None:
        return call
    if "guidance_scale" in call:
        raise UsageError("Give the guidance scale once, with --guidance-scale.")
    return {**call, "guidance_scale": guidance_scale}


def _conditions(model: str, prompts: Path | None, negative: str | None) -> list[dict] | None:
    """Arguments of the pipeline's call by sample: every prompt with the negative one, of which pipelines want as many."""
    from ..models.prompts import load_prompts, own_prompts

    found = own_prompts(model) if prompts is None else load_prompts(prompts)
    if found is None:
        if negative is not None:
            raise UsageError("--negative-prompt stands beside prompts: give those with --prompts FILE.")
        return None
    return [{"prompt": one} | ({} if negative is None else {"negative_prompt": negative}) for one in found]


def _genes(fix: str | None, strategy: str) -> tuple[str, ...]:
    """What may be searched."""
    from ..search.space import GENES

    fixed = [name.strip() for name in (fix or "").split(",") if name.strip()]
    for name in fixed:
        if name not in GENES:
            raise unknown("decision", name, GENES)
    if fixed and strategy == "times":
        raise UsageError("The strategy 'times' searches times alone: leave --fix out, or choose another strategy.")
    genes = tuple(name for name in GENES if name not in fixed)
    if not genes:
        raise UsageError("--fix leaves nothing to search: name fewer decisions.")
    return genes


def _report(outcome, model: str, output: Path, seconds: float, as_json: bool, quiet: bool) -> None:
    """Write the picture and the page, and say what was found."""
    from ..evaluate.search_page import header, lines, notes, usage, write_search

    write_search(outcome, output, seconds)
    beside = {kind: str(output.with_suffix(suffix)) for kind, suffix in (("picture", ".png"), ("page", ".html"))}
    if as_json:
        told = outcome.file.record
        found = {
            key: told[key] for key in ("improved", "found_by", "scores", "seed_schedule", "objective", "unit", "cost")
        }
        calls = {"calls": outcome.file.plan.nfe, "evaluations_per_call": outcome.subject.evaluations}
        typer.echo(json.dumps({"plan": str(output), **beside, **calls, **found, "seconds": round(seconds, 2)}))
        return
    typer.echo("\n".join([table(header(outcome), lines(outcome)), "", *notes(outcome, output.name, seconds)]))
    typer.echo(f"Written: {', '.join([str(output), *beside.values()])}")
    if not quiet:
        note("Next, in Python:")
        for line in usage(outcome, str(output)):
            note(f"  {line}")
        if hasattr(outcome.subject.pipe, "num_classes"):
            note(f"Or: diffaccel sample {model} --plan {output} --num 100 --grid samples.png")


def _stopped(stop: BaseException, output: Path, alone: bool) -> InterruptedRun:
    """The error of an interrupted search, which says how to continue it."""
    log = output.with_name(output.name + ".log")
    known = f" Every score so far is in {log}: repeat the command with --resume to go on." if log.exists() else ""
    error = interrupted(stop, f"Interrupted.{known}")
    error.told_elsewhere = not alone
    return error
