"""A report as a page for people: numbers first, then what weakens them, then the images, then everything else."""

import html
import math
import shlex

from ..core.files import write_atomic
from .html import document, figure_of_samples, table
from .report import Measurement, Report, number

_UNIT = ("precision", "recall", "density", "coverage")  # shares, drawn on [0, 1]; density may exceed it
_DIRECTIONS = {
    "lower": "↓ lower is better",
    "higher": "↑ higher is better",
    "closer": "◎ the closer to real images, the better",
}
_SHOWN, _COLUMNS = 64, 8  # images per side
_LISTED = 20  # skipped files per side
_ROWS = {
    "kind": "kind",
    "name": "name",
    "count": "images",
    "shape": "channels × height × width",
    "sizes": "sizes",
    "formats": "file formats",
    "resized": "resized to",
    "duplicates": "copies among them",
    "skipped": "files left out",
    "digest": "digest",
}
_STYLE = """
.cards, .sides { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.sides { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; } .card p { margin: .15rem 0; }
.card h3 { margin: 0; font-size: 1rem; overflow-wrap: anywhere; }
.big { font-size: 2.2rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.warnings { border-left: 4px solid var(--alarm); background: var(--alarm-soft); color: var(--alarm); margin: 1rem 0;
  padding: .6rem 1rem; } .warnings h2 { margin: 0; font-size: 1.1rem; } .warnings ul { margin: .3rem 0; }
li { overflow-wrap: anywhere; }
table.text td, table.text th { text-align: left; overflow-wrap: anywhere; min-width: 5rem; vertical-align: top; }
table.text td:first-child { overflow-wrap: normal; }
.axis { stroke: var(--faint); } .zero { stroke: var(--ink); stroke-dasharray: 3 2; }
.interval { stroke: var(--accent); stroke-width: 3; } .value { stroke: var(--ink); stroke-width: 2; }
.axis-label { fill: var(--faint); font: 11px system-ui, sans-serif; }
"""


def write_report_page(report: Report, path) -> None:
    """Write `report_page` to a file, atomically.

    Raises:
        UsageError: the file cannot be written.
    """
    write_atomic(path, report_page(report))


def report_page(report: Report) -> str:
    """A report as one self-contained HTML page below 2 MB; equal reports with equal samples give equal text."""
    sides = {"fake": report.fake} | ({"real": report.real} if report.real is not None else {})
    title = "Evaluation of " + " against ".join(str(side.get("name")) for side in sides.values())
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<div class='cards'>{''.join(map(_card, report.results))}</div>",
        "<p class='small'>In the drawings: │ the value, comparable with publications; ● its estimate without the bias "
        "of finite samples; ━ the 95 % interval; ┆ zero. Every metric has its own axis.</p>",
        _warnings(report.warnings),
        "<h2>Samples</h2>",
        f"<div class='sides'>{''.join(_samples(report, key, side) for key, side in sides.items())}</div>",
        "<h2>Sides</h2>",
        _sides(sides),
        *(_skipped(key, side) for key, side in sides.items()),
        "<h2>Features</h2>",
        *(_facts(identity) for identity in report.features),
        "<h2>Settings</h2>",
        _facts(report.settings),
        "<h2>Environment</h2>",
        _facts(report.environment),
        "<h2>Provenance of this run</h2>",
        _facts(report.run),
    ]
    return document(title, parts, _STYLE)


def _card(result: Measurement) -> str:
    lines = []
    if result.bias_corrected is not None:
        lines.append(f"bias-corrected <b>{number(result.bias_corrected)}</b>")
    if result.ci95:
        low, high = map(number, result.ci95)
        lines.append(f"95 % interval <b>{low} to {high}</b>")
    elif result.deviation is not None:
        lines.append(f"± <b>{number(result.deviation)}</b>")
    else:
        lines.append("no interval")
    counts = [f"{n} {side}" for side, n in (("fake", result.n_fake), ("real", result.n_real)) if n is not None]
    footing = "; ".join(
        [*([f"images: {', '.join(counts)}"] if counts else []), *([result.method] if result.method else [])]
    )
    return (
        f"<div class='card'><h3>{html.escape(result.metric)}</h3><p class='big'>{number(result.value)}</p>"
        f"<p>{_DIRECTIONS[result.better]}</p><p>{'<br>'.join(lines)}</p>{_axis(result)}"
        f"<p class='small'>{html.escape(footing)}</p></div>"
    )


def _axis(result: Measurement) -> str:
    """Value, corrected value and interval on an axis: from 0 for distances, [0, 1] for shares, else around the data."""
    points = [result.value, *(() if result.bias_corrected is None else (result.bias_corrected,)), *(result.ci95 or ())]
    if not all(map(math.isfinite, points)):
        return "<p>Not a finite number: nothing to draw.</p>"
    share = result.kind.lower() in _UNIT or result.better == "closer"  # beside that of real images, on one axis
    shown = [0.0, 1.0] if share else [0.0] if result.better == "lower" else []
    low, high = min(points + shown), max(points + shown)
    if low == high:  # one number and no natural end: any scale would be arbitrary
        low, high = low - (abs(low) or 1.0) / 10, high + (abs(high) or 1.0) / 10
    width, left, line = 300, 30, 34

    def x(value: float) -> str:
        return f"{left + (width - 2 * left) * (value - low) / (high - low):.1f}"

    marks = [f"<path class='axis' d='M{left} {line}H{width - left}'/>"]
    for tick in _ticks(low, high):
        marks.append(f"<path class='axis' d='M{x(tick)} {line}v4'/>")
        marks.append(f"<text class='axis-label' x='{x(tick)}' y='{line + 16}' text-anchor='middle'>{tick:.4g}</text>")
    if low <= 0 <= high:
        marks.append(f"<path class='zero' d='M{x(0)} 4V{line}'/>")
    if result.ci95:
        start, end = map(x, result.ci95)
        marks.append(f"<path class='interval' d='M{start} 18H{end}'/>")
        marks.append(f"<path class='interval' d='M{start} 12v12M{end} 12v12'/>")
    if result.bias_corrected is not None:
        marks.append(f"<circle cx='{x(result.bias_corrected)}' cy='18' r='5'/>")
    marks.append(f"<path class='value' d='M{x(result.value)} 7v22'/>")
    words = html.escape(f"{result.metric} on an axis from {low:.4g} to {high:.4g}")
    size = f"viewBox='0 0 {width} 54' width='{width}' height='54'"
    return f"<svg {size} role='img' aria-label='{words}'>{''.join(marks)}</svg>"


def _ticks(low: float, high: float) -> list[float]:
    """Three to six multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _warnings(warnings: list[str]) -> str:
    if not warnings:
        return "<p>No warnings.</p>"
    items = "".join(f"<li>{html.escape(warning)}</li>" for warning in warnings)
    return f"<div class='warnings'><h2>Warnings</h2><ul>{items}</ul></div>"


def _samples(report: Report, key: str, side: dict) -> str:
    images = list(report.samples.get(key) or [])[:_SHOWN]
    if not images:
        reason = (
            "is a statistics file, which holds no images"
            if side.get("kind") == "statistics"
            else "gave no samples to this page (a report read from JSON has none)"
        )
        return f"<p>No images to show: the {key} side {reason}.</p>"
    total = "" if side.get("count") is None else f" of {side['count']}"
    caption = f"{key}: the first {len(images)}{total}"
    alt = f"A sheet of {len(images)} {key} images of {side.get('name')}, row by row"
    return f"<div>{figure_of_samples(caption, images, alt, columns=_COLUMNS)}</div>"


def _sides(sides: dict[str, dict]) -> str:
    keys = [*_ROWS, *(key for side in sides.values() for key in side if key not in _ROWS)]
    rows = []
    for key in dict.fromkeys(keys):
        if any(key in side for side in sides.values()):
            cells = [
                str(len(s[key])) if key == "skipped" and key in s else _text(key, s.get(key)) for s in sides.values()
            ]
            rows.append([_ROWS.get(key, key), *cells])
    return table(["", *sides], rows, "text")


def _skipped(key: str, side: dict) -> str:
    entries = side.get("skipped") or []
    if not entries:
        return ""
    lines = [f"{e.get('name')}: {e.get('reason')}" if isinstance(e, dict) else _text("", e) for e in entries[:_LISTED]]
    lines += [f"and {len(entries) - _LISTED} more, listed in the JSON report"] if len(entries) > _LISTED else []
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<h3>Files of the {key} side that were left out</h3><ul>{items}</ul>"


def _facts(facts: dict) -> str:
    return table([], [[str(key), _text(key, value)] for key, value in facts.items()], "text") if facts else "–"


def _text(key: str, value) -> str:
    """A JSON-able value in words: shapes with ×, lists with commas, dicts as "name value"."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(name, item)}" for name, item in value.items()) or "–"
    if key == "command" and isinstance(value, list):
        return shlex.join(map(str, value))
    if isinstance(value, list | tuple):
        return (" × " if key == "shape" else ", ").join(_text("", item) for item in value) or "–"
    return str(value)
