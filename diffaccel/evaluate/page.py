"""A report as one HTML file: no scripts, no outside assets, readable in any browser and in print."""

import html
import json
import math
from pathlib import Path

from ..core.files import write_atomic
from ..core.images import sheet
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
    """Distance of the averaged student over training steps, as an inline SVG on a logarithmic axis."""
    points = []
    for line in metrics.read_text().splitlines():
        record = json.loads(line)
        points += [(record["step"], value) for key, value in record.items() if key.startswith("validation/FD-")]
    if len(points) < 2:
        return ""
    width, height, left, bottom = 640, 240, 50, 30
    last = points[-1][0]
    low, high = (f(math.log10(value) for _, value in points) for f in (min, max))
    span = max(high - low, 1e-9)

    def place(step, value):
        x = left + (width - left - 10) * step / last
        y = 10 + (height - bottom - 20) * (high - math.log10(value)) / span
        return x, y

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    labels = "".join(
        f"<text x='{left - 6}' y='{place(0, value)[1] + 4:.1f}' text-anchor='end'>{value:.2g}</text>"
        for value in (10**low, 10**high)
    )
    labels += f"<text x='{left}' y='{height - 8}'>0</text>"
    labels += f"<text x='{width - 10}' y='{height - 8}' text-anchor='end'>{last} steps</text>"
    dots = "".join(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3'/>" for x, y in (place(*point) for point in points))
    return (
        f"<figure><figcaption>Distance of the student (moving average, 500 samples) over training steps</figcaption>"
        f"<svg width='{width}' height='{height}' font-size='12' fill='#1b5fa7' role='img'>"
        f"<polyline points='{line}' fill='none' stroke='#1b5fa7' stroke-width='2'/>{dots}{labels}</svg></figure>"
    )
