"""A report as one HTML file: no scripts, no outside assets, readable in any browser and in print."""

import html
import json
from pathlib import Path

from ..core.files import write_atomic
from ..core.images import sheet
from .charts import line_chart
from .contenders import HEADER, Row
from .html import document, figure, record, table


def write_page(
    path: Path, title: str, summary: str, rows: list[Row], run: Path, next_commands: list[str], facts: dict
) -> None:
    """Write the report of a distillation run.

    Args:
        path: HTML file to write.
        title, summary: heading, and one paragraph under it.
        rows: measured generators.
        run: the run folder: its metrics and sample sheets are shown.
        next_commands: what to type next.
        facts: provenance, shown as JSON at the end.
    """
    parts = [
        f"<h1>{html.escape(title)}</h1><p>{html.escape(summary)}</p>",
        table(HEADER, [row.cells() for row in rows]),
        "<p class='small'>NFE: network evaluations per image. FD-digits64: Fréchet distance to the real training digits "
        "in the features of the bundled classifier, lower is better; it is biased upwards by about 1/N, so compare equal "
        "N, or the jackknife-corrected column. Diversity: mean distance of two images of a class, in grey levels. "
        "Speed on this machine, in this run.</p>",
        "<h2>Samples</h2>",
        *[figure(row.label, sheet(row.samples, scale=3)) for row in rows],
        "<h2>Class by class</h2>",
        _class_table(rows),
        f"<p class='small'>{html.escape(rows[0].classes['note'])}</p>",
        "<h2>Training</h2>",
        _curve(run / "metrics.jsonl"),
        "<h2>What to try next</h2>",
        f"<pre>{html.escape(chr(10).join(next_commands))}</pre>",
        "<h2>Provenance</h2>",
        record(facts),
    ]
    write_atomic(path, document(title, parts))


def _class_table(rows: list[Row]) -> str:
    header = ["class", *(f"{row.label}: {what}" for row in rows for what in ("accuracy", "FD"))]
    lines = []
    for k in range(10):
        cells = [str(k)]
        for row in rows:
            entry = row.classes["classes"][k]
            cells += [f"{100 * entry['accuracy']:.0f} %", f"{entry['fd']:.2f}"]
        lines.append(cells)
    return table(header, lines)


def _curve(metrics: Path) -> str:
    """Distance of the averaged student over training steps."""
    points = []
    for line in metrics.read_text().splitlines():
        record = json.loads(line)
        points += [(record["step"], value, 0.0) for key, value in record.items() if key.startswith("validation/FD-")]
    if len(points) < 2:
        return ""
    title = "Distance of the student (moving average, 500 samples) over training steps"
    return line_chart(title, {"student": points}, x_label="step", logarithmic=True)
