"""A comparison of distillation methods for people: table, curves, samples, and what failed.

The content is JSON-able: "settings", "metric" (label of the distance), "num", "reference", "image_seed", "rows",
"failures", "warnings", "versions". A row has a "label" and "runs": `MANY` and `ONE` are the teacher, all others methods.
A run has "name" (of its folder and its sheet), what `distill_judge.Judge` measured and, of a student, "seed", "steps",
"cpu_seconds", "wall_seconds", "data" and "gain". A failure has "label", "seed", "text" and "exit_code".
"""

import html
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..core.files import write_atomic
from ..core.images import decode_image
from .charts import line_chart
from .html import document, figure, record, table
from .run_page import curve, read_metrics

MANY, ONE = "teacher, 50 steps", "teacher, 1 step"
SHEETS = "sheets"
_NONE = "–"
_STYLE = "td { white-space: nowrap; } th, td { padding: .2rem .45rem; font-size: 14px; }"


def gained(rows: Sequence[Mapping], fd: float) -> float | None:
    """(FD teacher@1 − FD) / (FD teacher@1 − FD teacher@50); None where the teacher gains nothing from steps."""
    one, many = (next(row for row in rows if row["label"] == label)["runs"][0]["fd"] for label in (ONE, MANY))
    return (one - fd) / (one - many) if one > many else None


def header(content: Mapping) -> list[str]:
    """Names of the cells of `lines`."""
    spread = "by seed" if _several(content) else "without bias, 95 %"
    return ["method", "seeds", content["metric"], spread, "gain", "precision", "recall", "accuracy", "NFE", "steps", "CPU s",
            "wall s", "data"]  # fmt: skip


def lines(content: Mapping) -> list[list[str]]:
    """A row each, means over seeds ± their standard deviation; dashes where every run failed or a number is unknown."""
    return [_line(row, _several(content)) for row in content["rows"]]


def run_lines(content: Mapping) -> list[list[str]]:
    """The same of every run by itself, under `header` of one seed with "seed" in place of "seeds"."""
    return [
        _line({"label": row["label"], "runs": [run]}, False, str(run.get("seed", _NONE)))
        for row in content["rows"]
        for run in row["runs"]
    ]


def notes(content: Mapping) -> list[str]:
    """Sentences below the table."""
    spread = "± is the standard deviation over seeds. " if _several(content) else ""
    found = [
        f"{content['metric']} to {content['reference']}, {content['num']} images each from the same noise; {spread}it is biased "
        "upwards by about 1/N, so compare it at this number of images only.",
        "Gain: (FD teacher at 1 step − FD) / (FD teacher at 1 step − FD teacher at 50). NFE: network evaluations per image, a "
        "guidance pair counted as two. Seconds are those of the whole training, pictures and validation included.",
    ]
    found += [
        f"{failure['label']}, seed {failure['seed']}, failed: {failure['text']}" for failure in content["failures"]
    ]
    return [*found, *(f"Warning: {text}" for text in content["warnings"])]


def write_comparison(content: Mapping, folder: Path) -> None:
    """Write report.json and report.html into the folder of a comparison, with its sheets/ and run folders.

    Raises:
        UsageError: the folder is missing or read-only.
    """
    write_atomic(folder / "report.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_atomic(folder / "report.html", page(content, folder))


def page(content: Mapping, folder: Path) -> str:
    """A self-contained HTML page; only its links to the pages of runs lead out of it."""
    title = f"{content['settings']['teacher']}: distillation methods compared"
    students = [row for row in content["rows"] if row["label"] not in (MANY, ONE)]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        table(header(content), lines(content)),
        *(f"<p class='small'>{html.escape(note)}</p>" for note in notes(content)),
        *_charts(students, folder),
        "<h2>The same noise everywhere</h2>",
        *(_sheet(row, folder) for row in content["rows"] if row["runs"]),
        "<h2>Each run</h2>",
        table(["method", "seed", content["metric"], "without bias, 95 %", *header(content)[4:]], run_lines(content)),
        _links(students, folder),
        "<h2>Provenance</h2>",
        record({key: content[key] for key in ("settings", "reference", "num", "image_seed", "versions")}),
    ]
    return document(title, parts, _STYLE)


def _line(row: Mapping, several: bool, seeds: str | None = None) -> list[str]:
    runs = row["runs"]
    values = [run["fd"] for run in runs]
    limits = runs[0]["ci95"] if len(runs) == 1 else None
    spread = " / ".join(f"{fd:.3f}" for fd in values) if several else limits and "{:.2f} … {:.2f}".format(*limits)
    return [
        row["label"],
        seeds or (str(len(runs)) if runs and "seed" in runs[0] else _NONE),
        _mean(values, "{:.3f}".format),
        spread or _NONE,
        *(_mean([run.get(name) for run in runs], "{:.3f}".format) for name in ("gain", "precision", "recall")),
        _mean([run["accuracy"] for run in runs], lambda share: f"{100 * share:.1f} %", deviation=False),
        *(_mean([run.get(name) for run in runs], "{:.0f}".format, False)
          for name in ("nfe", "steps", "cpu_seconds", "wall_seconds")),
        (runs[0]["data"] or "none") if runs and "data" in runs[0] else _NONE,
    ]  # fmt: skip


def _mean(values: Sequence[float | None], shown: Callable[[float], str], deviation: bool = True) -> str:
    if not values or None in values:
        return _NONE
    spread = f" ± {shown(statistics.stdev(values))}" if deviation and len(values) > 1 else ""
    return shown(statistics.fmean(values)) + spread


def _several(content: Mapping) -> bool:
    return any(len(row["runs"]) > 1 for row in content["rows"])


def _charts(students: Sequence[Mapping], folder: Path) -> list[str]:
    """The distance over training, by steps and by time, means over seeds."""
    by_step, by_time, name = {}, {}, ""
    for row in students:
        curves = []
        for run in row["runs"]:
            metrics = read_metrics(folder / run["name"])
            names = [key for line in metrics for key in line if key.startswith("validation/FD-")]
            if names:
                name = names[0].removeprefix("validation/")
                curves.append([(x, y) for x, y in curve(metrics, names[0]) if y > 0.0])
        steps = sorted(set.intersection(*(set(dict(one)) for one in curves))) if curves else []
        if steps:
            # Time is proportional to steps within one run; where it was interrupted its clock began anew.
            share = statistics.fmean(run["cpu_seconds"] / run["steps"] for run in row["runs"])
            means = [(step, statistics.fmean(dict(one)[step] for one in curves)) for step in steps]
            by_step[row["label"]] = [(step, y, 0.0) for step, y in means]
            by_time[row["label"]] = [(round(step * share, 1), y, 0.0) for step, y in means]
    if not by_step:
        return []
    return [
        "<h2>Over the training</h2>",
        line_chart(f"{name} over training steps", by_step, x_label="training step", logarithmic=True),
        line_chart(f"{name} over processor time", by_time, x_label="CPU seconds", logarithmic=True),
        "<p class='small'>The moving average, on fewer images than in the table, so its level is another one.</p>",
    ]


def _sheet(row: Mapping, folder: Path) -> str:
    run = row["runs"][0]
    caption = f"{row['label']}: {run['fd']:.3f}"
    return figure(caption, decode_image((folder / SHEETS / f"{run['name']}.png").read_bytes()).tensor)


def _links(students: Sequence[Mapping], folder: Path) -> str:
    names = [run["name"] for row in students for run in row["runs"]]
    found = [f"<a href='{html.escape(name)}/report.html'>{html.escape(name)}</a>" for name in names]
    return f"<p>Pictures over time and health signals of each: {', '.join(found)}.</p>" if found else ""
