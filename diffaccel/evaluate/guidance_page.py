"""A guidance sweep for people: table, charts over the scale, and one picture of rules × scales."""

import html
from pathlib import Path

import torch

from ..core.files import write_atomic
from ..core.images import labelled, png_bytes, sheet
from .charts import line_chart
from .guidance_sweep import UNGUIDED, Row, Sweep
from .html import document, figure, record, table, thumbnails

# Measure, its name, decimals, and what is good.
COLUMNS = (
    ("fd", "FD", 2, "lower is better"),
    ("precision", "precision", 3, "higher is better"),
    ("recall", "recall", 3, "higher is better"),
    ("overshoot", "overshoot", 4, "lower is better"),
    ("contrast", "contrast", 3, "as real images is best"),
    ("saturation", "saturation", 3, "as real images is best"),
    ("clipped", "clipped", 3, "as real images is best"),
    ("accuracy", "accuracy", 3, "higher is better"),
)
_CHARTS = ("fd", "recall", "overshoot", "contrast", "saturation")
_PIXELS = ("contrast", "saturation", "clipped")
_EDGE, _COLUMNS = 32, 5  # least pixels a sample, samples a line


def header(sweep: Sweep) -> list[str]:
    """Names of the cells of `lines`."""
    interval = [] if _several(sweep) else ["without bias, 95 %"]
    first, *others = (_name(sweep, measure) for measure, *_ in _shown(sweep))
    return ["rule", "scale", "NFE", first, *interval, *others]


def lines(sweep: Sweep) -> list[list[str]]:
    """The table: every row, means ± standard deviations over seeds or the interval of the distance, then real images if
    there are any."""
    cells = [
        [
            row.rule,
            f"{row.scale:g}",
            str(row.nfe),
            *(_cell(row, measure, digits) for measure, _, digits, _ in _shown(sweep)),
        ]
        for row in sweep.rows
    ]
    if not _several(sweep):
        for line, row in zip(cells, sweep.rows, strict=True):
            line.insert(4, _interval(row))
    return [*cells, _real_line(sweep)] if sweep.real else cells


def notes(sweep: Sweep) -> list[str]:
    """Sentences that explain the table."""
    seeds, num = sweep.settings["seeds"], sweep.settings["num"]
    spread = f"± is the standard deviation over seeds {', '.join(map(str, seeds))}. " if _several(sweep) else ""
    pixels = (
        "Grey images have no saturation: what strong guidance burns shows in overshoot and contrast, clipped values count "
        "backgrounds too."
        if _grey(sweep)
        else "Contrast, saturation and clipped values should be those of real images."
    )
    overshoot = (
        ""
        if sweep.rows[0].mean("overshoot") is None
        else "Overshoot: mean of max(|x| − 1, 0) before values are clipped to [−1, 1]. "
    )
    return [
        f"{num} images per rule, scale and seed, from the same noise and {sweep.conditioning}. {spread}NFE: network evaluations per "
        "image, a guidance pair counted as two.",
        f"{sweep.report['FD'].metric}: lower is better, biased upwards by about 1/N. {overshoot}{pixels}",
        *(f"Warning: {warning}" for warning in sweep.report.warnings),
    ]


def write_sweep(sweep: Sweep, folder: Path, json_text: str) -> None:
    """Write guidance.png, report.json and report.html into a folder.

    Raises:
        UsageError: the folder is missing or read-only.
    """
    image = picture(sweep)
    write_atomic(folder / "guidance.png", png_bytes(image))
    write_atomic(folder / "report.json", json_text + "\n")
    write_atomic(folder / "report.html", page(sweep, image))


def page(sweep: Sweep, image: torch.Tensor) -> str:
    """A self-contained HTML page around the picture, uint8 (C, H, W)."""
    title = f"Guidance of {sweep.settings['model']}: {', '.join(sweep.settings['rules'])}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p class='small'>{html.escape(note)}</p>" for note in notes(sweep)),
        table(header(sweep), lines(sweep)),
        "<h2>Over the guidance scale</h2>",
        *(_chart(sweep, *column) for column in _shown(sweep) if column[0] in _CHARTS),
        f"<h2>The same noise and {sweep.conditioning} everywhere</h2>",
        figure("Rows: rules. Columns: guidance scales.", image, smooth=True),
        "<h2>Provenance</h2>",
        record({"settings": sweep.settings, "features": sweep.report.features, **sweep.report.environment}),
    ]
    return document(title, parts, "td { white-space: nowrap; } th, td { padding: .2rem .4rem; font-size: 14px; }")


def picture(sweep: Sweep) -> torch.Tensor:
    """Sheets of the same samples, uint8 (C, height, width): a line per rule, a column per scale, the unguided model and what
    there is of real images last."""
    unguided, *rows = sweep.rows
    blocks = {(row.rule, row.scale): (f"{row.rule}, scale {row.scale:g}\n{_gist(row)}", row.samples) for row in rows}
    grid = [[blocks[rule, scale] for scale in sweep.settings["scales"]] for rule in sweep.settings["rules"]]
    real = sweep.real_samples[: len(unguided.samples)]
    last = [(f"{UNGUIDED} model\n{_gist(unguided)}", unguided.samples), ("real images", real)]
    grid.append([block for block in last if len(block[1])])
    edge = max(_EDGE, min(unguided.samples.shape[-1], 96))
    return labelled([[(label, sheet(thumbnails(images, edge), _COLUMNS)) for label, images in line] for line in grid])


def _real_line(sweep: Sweep) -> list[str]:
    known = {**sweep.real, "overshoot": 0.0}
    first, *others = (f"{known[name]:.{digits}f}" if name in known else "–" for name, _, digits, _ in _shown(sweep))
    return ["real images", "–", "–", first, *([] if _several(sweep) else ["–"]), *others]


def _gist(row: Row) -> str:
    recall = row.mean("recall")
    return f"FD {row.mean('fd'):.2f}" + ("" if recall is None else f", recall {recall:.2f}")


def _grey(sweep: Sweep) -> bool:
    return sweep.rows[0].samples.shape[1] == 1


def _shown(sweep: Sweep) -> list[tuple]:
    unknown = {"saturation"} if _grey(sweep) else set()
    return [c for c in COLUMNS if c[0] not in unknown and sweep.rows[0].mean(c[0]) is not None]


def _name(sweep: Sweep, measure: str) -> str:
    return sweep.report["FD"].metric if measure == "fd" else next(c[1] for c in COLUMNS if c[0] == measure)


def _several(sweep: Sweep) -> bool:
    return len(sweep.settings["seeds"]) > 1


def _cell(row: Row, measure: str, digits: int) -> str:
    deviation = row.deviation(measure)
    return f"{row.mean(measure):.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _interval(row: Row) -> str:
    (run,) = row.runs.values()
    limits = run["report"]["FD"].ci95
    return "–" if limits is None else "{:.2f} … {:.2f}".format(*limits)


def _chart(sweep: Sweep, measure: str, name: str, digits: int, good: str) -> str:
    points = {
        rule: [
            (row.scale, row.mean(measure), row.deviation(measure) or 0.0) for row in sweep.rows[1:] if row.rule == rule
        ]
        for rule in sweep.settings["rules"]
    }
    levels = {UNGUIDED: sweep.rows[0].mean(measure)}
    levels |= {"real images": sweep.real[measure]} if measure in sweep.real else {}
    return line_chart(f"{_name(sweep, measure)}: {good}", points, levels, "guidance scale", zero=measure not in _PIXELS)
