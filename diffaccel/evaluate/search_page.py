"""A finished search for people: table, decisions, progress, and samples of both schedules from the same noise."""

import html
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from ..core.files import write_atomic
from ..core.images import labelled, png_bytes, sheet, to_uint8
from ..samplers.searched import PlanFile
from ..search.outcome import Outcome, Scored
from ..search.subjects import Subject, fine_plan
from .charts import line_chart
from .html import document, figure, record, table, thumbnails
from .search_picture import described, drawing, level_at, steps_of

STAGES = {
    "search": "on the noise that was searched on",
    "selection": "on fresh noise, by which the winner is chosen",
    "validation": "on noise that is fresh again, where the winner meets the hand-set schedules",
}
_FINE = 100  # network calls of the trajectory that is shown
_SAMPLES, _EDGE = 10, 64  # samples a row, least pixels a sample
_AMPLIFIED = (16, 8, 4, 2, 1)  # how much differences may be enlarged to be seen
_POINTS = 24  # of the chart


def header(outcome: Outcome) -> list[str]:
    """Names of the cells of `lines`."""
    return ["schedule", *_stages(outcome)]


def lines(outcome: Outcome) -> list[list[str]]:
    """The best hand-set schedule and the best searched one, with their scores by stage."""
    return [[name, *_cells(one, _stages(outcome))] for name, one in _pair(outcome)]


def notes(outcome: Outcome, name: str, seconds: float) -> list[str]:
    """Sentences below the table: what was found, and what it took.

    Args:
        name: of the plan's file.
        seconds: that the search took.
    """
    told, cost = outcome.file.record, outcome.file.record["cost"]
    best, seed = (one.scores["validation"] for one in (outcome.best, outcome.seed))
    found = (
        f"The searched schedule beats the best hand-set one on held-out noise: {best:.4g} against {seed:.4g}"
        + (f", {best / seed:.2f}×." if best > 0.0 else ".")
        if outcome.improved
        else f"The hand-set schedule {outcome.best.label} was not beaten on held-out noise and is what {name} holds."
    )
    samples = ", ".join(f"{stage} on {count}" for stage, count in told["samples"].items())
    return [
        f"Scores: {told['unit']}, lower is better; {samples} samples.",
        found,
        f"Cost: {cost['candidates']:,} candidates, {cost['network_calls_times_samples']:,} network calls times samples, "
        f"{seconds:.0f} s.",
    ]


def searched(outcome: Outcome) -> Scored | None:
    """The candidate that the search put forward; None where only hand-set schedules came to the finals."""
    if outcome.improved:
        return outcome.best
    origins = {origin for origin, _ in outcome.history}
    known = outcome.seed.scores.get("selection", math.nan)  # a hand-set schedule is among the first candidates, too
    found = [
        one
        for one in outcome.finalists
        if one.label in origins and not math.isclose(one.scores["selection"], known, rel_tol=1e-6)
    ]
    return min(found, key=lambda one: (-len(one.scores), one.scores["selection"]), default=None)


def usage(outcome: Outcome, name: str) -> list[str]:
    """The lines of Python that use the plan in a pipeline."""
    setter = (
        f'diffaccel.apply_plan(pipe, "{name}")'
        if outcome.file.layers
        else f'pipe.scheduler = diffaccel.SearchedScheduler.from_file("{name}", pipe.scheduler.config)'
    )
    return [setter, f"images = pipe(…, num_inference_steps={outcome.file.plan.nfe}).images"]


def write_search(outcome: Outcome, path: Path, seconds: float) -> None:
    """Write PLAN.png and PLAN.html beside the plan PLAN.json.

    Raises:
        UsageError: the folder is missing or read-only.
    """
    image = picture(outcome)
    write_atomic(path.with_suffix(".png"), png_bytes(image))
    write_atomic(path.with_suffix(".html"), page(outcome, image, path.name, seconds))


def page(outcome: Outcome, image: torch.Tensor, name: str, seconds: float) -> str:
    """A self-contained HTML page around the picture, uint8 (3, height, width)."""
    told, file, subject = outcome.file.record, outcome.file, outcome.subject
    scores, result, *cost = notes(outcome, name, seconds)
    parts = [
        f"<h1>A schedule of {_count(file, subject)}</h1>",
        f"<p><b>{html.escape(result)}</b></p>",
        table(header(outcome), lines(outcome)),
        *(f"<p class='small'>{html.escape(note)}</p>" for note in (scores, *cost)),
        "<h2>The same noise everywhere</h2>",
        figure("Samples, and where the network is called", image, smooth=True),
        f"<h2>Decisions of {html.escape(name)}</h2>",
        table(*_decisions(file, subject)),
        "<p class='small'>Order 1 is DDIM, whatever it integrates. Relaxation: factor on the first derivative. Momentum: "
        "share of the slope of the step before. Corrector: pseudo, the step is redone with the evaluation at its end; "
        "implicit, and the network is called there again.</p>",
        "<h2>Progress</h2>",
        _chart(outcome),
        "<h2>Finalists</h2>",
        table(
            ["found by", *_stages(outcome)], [[one.label, *_cells(one, _stages(outcome))] for one in _ranked(outcome)]
        ),
        f"<p class='small'>{'; '.join(f'{stage}: {text}' for stage, text in STAGES.items())}.</p>",
        "<h2>Use</h2>",
        f"<pre>{html.escape(chr(10).join(usage(outcome, name)))}</pre>",
        "<h2>Provenance</h2>",
        record({"scheduler": dict(file.scheduler), **told}),
    ]
    return document(f"{name}: a searched schedule", [part for part in parts if part], "td { white-space: nowrap; }")


def picture(outcome: Outcome) -> torch.Tensor:
    """Rows of samples from the noise of the validation, and both schedules drawn over noise levels; uint8 (3, H, W)."""
    subject, seed = outcome.subject, outcome.file.record["noise_seeds"]["validation"]
    schedules = [
        (f"{name}, {_count(one.file, subject)}: {_cells(one, _stages(outcome))[-1]}", one.file)
        for name, one in _pair(outcome)
    ]
    drawn = drawing(schedules, subject)
    fine = _images(subject, subject.file(fine_plan(subject.schedule, _FINE)), seed)
    if fine is None:
        return drawn
    rows = [(name, _images(subject, file, seed)) for name, file in schedules]
    gaps = [(images - fine).abs() for _, images in rows]
    times = next((factor for factor in _AMPLIFIED if factor * 4.0 * gaps[0].square().mean().sqrt() <= 2.0), 1)
    unlike = f"distance from the fine trajectory, times {times}"
    rows += [(f"{name.split(':')[0]}: {unlike}", times * gap - 1.0) for (name, _), gap in zip(rows, gaps, strict=True)]
    rows.insert(0, (f"fine trajectory, {_FINE} calls", fine))
    edge = max(_EDGE, min(fine.shape[-1], 96))
    samples = labelled([[(name, sheet(thumbnails(to_uint8(images), edge), _SAMPLES))] for name, images in rows])
    return _stacked([samples.expand(3, -1, -1), drawn])


def _pair(outcome: Outcome) -> list[tuple[str, Scored]]:
    """The best hand-set schedule and, if there is one, the searched one, with their names."""
    one = searched(outcome)
    return [
        (f"hand-set: {outcome.seed.label}", outcome.seed),
        *([(f"searched: found by {one.label}", one)] if one else []),
    ]


def _images(subject: Subject, file: PlanFile, seed: int) -> torch.Tensor | None:
    """(N, C, H, W) in [−1, 1], of videos the first frames; None where samples are no pictures."""
    images = subject.images(file, seed, _SAMPLES)[:_SAMPLES]
    return images.nan_to_num(0.0).clamp(-1.0, 1.0) if images.ndim == 4 and images.shape[1] in (1, 3) else None


def _stacked(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Images (3, h, w) one below the other, filled up with white on the right."""
    width = max(image.shape[2] for image in images)
    return torch.cat(
        [torch.nn.functional.pad(image, (0, width - image.shape[2], 0, 0), value=255) for image in images], dim=1
    )


def _decisions(file: PlanFile, subject: Subject) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of steps; columns that say nothing are left out."""
    rows = []
    for index, (time, decision, called) in enumerate(steps_of(file)):
        sigma, alpha, rho = level_at(time, subject)
        told = {"integrates": decision} if isinstance(decision, str) else described(decision)
        note = {"call": "" if called else "none", "layers left out": _skipped(file, index)}
        rows.append({"step": str(index + 1), "time": f"{time:.6g}", "σ": sigma, "α": alpha, "σ/α": rho, **told, **note})
    if file.decisions is not None and file.decisions.end:
        rows.append({"step": "end", "σ/α": f"{file.decisions.end:.3g}"})
    names = [name for name in rows[0] if any(row.get(name) for row in rows)]
    return names, [[row.get(name, "") for name in names] for row in rows]


def _skipped(file: PlanFile, index: int) -> str:
    """How much of the network a call leaves out, by number of layers."""
    entries = file.layers.get("skip", ())
    return str(len(entries[index])) if index < len(entries) and entries[index] else ""


def _chart(outcome: Outcome) -> str:
    """The best score so far over evaluations, coloured by what found candidates at the time."""
    best, found = math.inf, []
    for _, score in outcome.history:
        best = min(best, score)
        found.append(best)
    step = next(
        size * 10**power for power in range(9) for size in (1, 2, 5) if size * 10**power * _POINTS >= len(found)
    )
    chosen = [
        count for count in {*range(step, len(found) + 1, step), len(found)} if count and math.isfinite(found[count - 1])
    ]
    curves: dict[str, list] = {}
    for count in sorted(chosen):
        origin, point = outcome.history[count - 1][0], (float(count), found[count - 1], 0.0)
        # A curve begins where the one before it ended.
        curves.setdefault(origin, [line[-1] for line in [*curves.values()][-1:]]).append(point)
    levels = {"best hand-set": outcome.seed.scores["search"]} if math.isfinite(outcome.seed.scores["search"]) else {}
    if not curves:
        return ""
    heights = [*levels.values(), *(y for line in curves.values() for _, y, _ in line)]
    title = f"Best so far: {outcome.file.record['unit']}, on the noise that was searched on"
    return line_chart(title, curves, levels, "candidates evaluated", zero=False, logarithmic=min(heights) > 0.0)


def _ranked(outcome: Outcome) -> list[Scored]:
    """Finalists with those first that came furthest, best first."""
    stages = _stages(outcome)[::-1]
    return sorted(outcome.finalists, key=lambda one: [one.scores.get(stage, math.inf) for stage in stages])


def _stages(outcome: Outcome) -> list[str]:
    return [stage for stage in STAGES if stage in outcome.best.scores]


def _cells(one: Scored, stages: Sequence[str]) -> list[str]:
    return [f"{one.scores[stage]:.4g}" if stage in one.scores else "–" for stage in stages]


def _count(file: PlanFile, subject: Subject) -> str:
    each = "" if subject.evaluations == 1 else f" of {subject.evaluations} evaluations each"
    return f"{file.plan.nfe} network call{'' if file.plan.nfe == 1 else 's'}{each}"
