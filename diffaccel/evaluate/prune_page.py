"""A finished pruning run for people: figures, a page, pictures, and the card of the model."""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path

from ..core.files import write_atomic
from ..core.images import png_bytes
from ..models.teachers import TEACHERS
from ..prune.outcome import Outcome
from ..prune.plan import Point
from .charts import line_chart
from .html import document, figure, table
from .prune_picture import NOUNS, costs_lines, distance_lines, scores_picture, tradeoff_picture
from .report import number


def header(outcome: Outcome) -> list[str]:
    """Names of the cells of `lines`."""
    return ["model", "parameters", "MACs", *(["ms"] if _timed(outcome) else []), *filter(None, [outcome.distance])]


def lines(outcome: Outcome) -> list[list[str]]:
    """The whole model, the pruned one, and the recovered one where there is one."""
    models = {"whole": outcome.whole, "pruned": outcome.pruned, "recovered": outcome.recovered}
    return [[name, *_cells(outcome, one)] for name, one in models.items() if one is not None]


def notes(outcome: Outcome) -> list[str]:
    """Sentences below the table."""
    config, gone = outcome.config, outcome.plan["removed"]
    left = outcome.pruned.shares(outcome.whole)
    told = ", ".join(f"{share:.1%} of the {NOUNS[cost]}" for cost, share in left.items())
    found = [f"{len(gone)} of {len(outcome.survey.names)} layers removed by {config.method}; left are {told}."]
    if outcome.distance:
        found.append(
            f"Distances are plug-in values on {config.num} images of seed {config.seed}; compare equal numbers only."
        )
    elif config.num:
        found.append("No Fréchet distance: images of this kind of pipeline cannot be drawn here.")
    found.append("MACs and time are those of one network call for one sample, a guidance pair included.")
    return found


def write_pruning(outcome: Outcome, folder: Path) -> None:
    """Write scores.png, tradeoff.png, tradeoff.json, report.json, report.html, and README.md of final/.

    Raises:
        UsageError: the folder is missing or read-only.
    """
    gone = outcome.pruned.names
    title = f"{outcome.config.model}: {outcome.config.method}"
    scores = scores_picture(outcome.survey, outcome.scores, gone, title)
    curve = tradeoff_picture(outcome.points, outcome.recovered, outcome.distance)
    write_atomic(folder / "scores.png", png_bytes(scores))
    write_atomic(folder / "tradeoff.png", png_bytes(curve))
    write_atomic(folder / "tradeoff.json", _json(figures(outcome)["tradeoff"]))
    write_atomic(folder / "report.json", _json(figures(outcome)))
    write_atomic(folder / "report.html", _page(outcome, scores))
    write_atomic(outcome.final / "README.md", card(outcome))


def figures(outcome: Outcome) -> dict:
    """Everything that was counted and measured, JSON-able."""
    return {
        "settings": outcome.config.stored(),
        "distance": outcome.distance or None,
        "whole": outcome.whole.to_dict(),
        "pruned": outcome.pruned.to_dict(),
        "recovered": outcome.recovered and outcome.recovered.to_dict(),
        "tradeoff": [point.to_dict() | {"left": point.shares(outcome.whole)} for point in outcome.points],
    }


def card(outcome: Outcome) -> str:
    """The model card, Markdown."""
    config, info = outcome.config, TEACHERS.get(outcome.config.model)
    rows = [header(outcome), ["---"] * len(header(outcome)), *lines(outcome)]
    removed = [f"- `{one['name']}` ({one['kind']})" for one in outcome.plan["removed"]]
    count = f"{len(removed)} layer{'' if len(removed) == 1 else 's'}"
    licence = (
        f"The licence is that of {config.model}: {info.licence}." if info else "The licence is that of the whole model."
    )
    recovered = (
        "It was then trained to predict what the whole model predicts (`diffaccel prune --recover`)."
        if outcome.recovered
        else "It was not trained after that."
    )
    return "\n".join(
        [
            "---",
            "library_name: diffusers",
            "tags: [diffaccel, pruned]",
            "---",
            f"# {Path(config.model).name}, pruned",
            "",
            f"{config.model} without {count}, chosen by the scores of {config.method} to save {config.ratio:.0%} of "
            f"the {config.cost}. {recovered} {licence}",
            "",
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
            *notes(outcome),
            "",
            "It opens with diffusers where the package `diffaccel` is installed:",
            "",
            "```python",
            "import diffaccel  # lets diffusers find the classes of pruned networks",
            "from diffusers import DiffusionPipeline",
            "",
            'pipe = DiffusionPipeline.from_pretrained("this folder")',
            "```",
            "",
            "## Removed",
            "",
            *(removed or ["Nothing."]),
            "",
        ]
    )


def _page(outcome: Outcome, scores) -> str:
    costs = {name: [(x, y, 0.0) for x, y in line] for name, line in costs_lines(outcome.points).items()}
    found = distance_lines(outcome.points, outcome.recovered)
    charts = [line_chart("What is left, %", costs, x_label="ratio asked for")]
    if found:
        fd = outcome.whole.fd
        levels = {"whole model": fd} if fd is not None and math.isfinite(fd) else {}
        drawn = {name: [(x, y, 0.0) for x, y in line] for name, line in found.items()}
        charts.append(line_chart(outcome.distance, drawn, levels, x_label="ratio asked for"))
    removed = [[one["name"], one["kind"], one["replacement"], *_worth(one)] for one in outcome.plan["removed"]]
    parts = [
        f"<h1>{html.escape(outcome.config.model)}, pruned by {html.escape(outcome.config.method)}</h1>",
        table(header(outcome), lines(outcome)),
        *(f"<p class='small'>{html.escape(note)}</p>" for note in notes(outcome)),
        *charts,
        table(["ratio", *header(outcome)[1:]], [[f"{one.ratio:g}", *_cells(outcome, one)] for one in outcome.points]),
        "<h2>Scores</h2>",
        figure("What removing each layer alone costs", scores, smooth=True),
        "<h2>Removed</h2>",
        table(["layer", "kind", "in its place", "score", "parameters", "MACs"], removed)
        if removed
        else "<p>Nothing.</p>",
    ]
    return document(f"{outcome.config.model}, pruned", parts)


def _worth(one: dict) -> list[str]:
    score = "–" if one["score"] is None else f"{one['score']:.3g}"
    return [score, f"{one['parameters']:,}", f"{one['macs']:,}"]


def _cells(outcome: Outcome, point: Point) -> list[str]:
    cells = [f"{point.parameters:,}", f"{point.macs:,}"]
    if _timed(outcome):
        cells.append("–" if point.seconds is None else f"{1000.0 * point.seconds:.2f}")
    if outcome.distance:
        cells.append("–" if point.fd is None else number(point.fd) if math.isfinite(point.fd) else "not finite")
    return cells


def _timed(outcome: Outcome) -> bool:
    return outcome.whole.seconds is not None


def _json(content: dict | Sequence) -> str:
    return json.dumps(content, indent=2) + "\n"
