"""Pruning drawn: the score of every layer, block by block, and what is left at every ratio."""

import math
from collections.abc import Collection, Mapping, Sequence

import torch

from ..prune.plan import Point
from ..prune.survey import COSTS, Survey
from .charts import COLOURS, round_ticks

_LINE, _MARGIN, _BAR = 17, 14, 260  # pixels: a line of text, around, the longest bar
_GONE, _STAYS, _INK, _FAINT = "#d2662c", "#1b78c8", "black", "#666"
NOUNS = dict(zip(COSTS, ("parameters", "MACs", "latency"), strict=True))
"""What `survey.COSTS` are called."""


def scores_picture(survey: Survey, scores: Mapping[str, float], gone: Collection[str], title: str) -> torch.Tensor:
    """A bar for the score of each layer, on a logarithmic scale, under the name of its block.

    Args:
        survey: of the network.
        scores: by name; those that are not finite are said to be so.
        gone: names of what is removed, and everything inside it.
        title: plain text.

    Returns:
        uint8 (3, height, width).
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=13)
    rows = _rows(survey)
    left = _MARGIN + max(int(font.getlength(name)) for _, name in rows) + 30
    width = max(left + _BAR + 210, int(font.getlength(title)) + 2 * _MARGIN)
    image = Image.new("RGB", (width, _MARGIN * 2 + _LINE * (len(rows) + 3)), "white")
    pen, y = ImageDraw.Draw(image), _MARGIN
    pen.text((_MARGIN, y), title, fill=_INK, font=font)
    for x, colour, text in ((_MARGIN, _GONE, "removed"), (_MARGIN + 90, _STAYS, "stays")):
        pen.rectangle((x, y + _LINE + 4, x + 10, y + _LINE + 14), fill=colour)
        pen.text((x + 16, y + _LINE), text, fill=_INK, font=font)
    pen.text((_MARGIN + 160, y + _LINE), "score, logarithmic; share of the parameters", fill=_FAINT, font=font)
    y += 3 * _LINE
    length = _scale([value for value in scores.values() if math.isfinite(value) and value > 0.0])
    for name, label in rows:
        if name is None:
            pen.text((_MARGIN, y), label, fill=_FAINT, font=font)
        else:
            value = scores.get(name, math.nan)
            inside = any(f"{name}.".startswith(f"{one}.") for one in gone)
            pen.text((_MARGIN + 16, y), label, fill=_GONE if inside else _INK, font=font)
            end = left + (length(value) if math.isfinite(value) else 0)
            pen.rectangle((left, y + 3, end, y + 13), fill=_GONE if inside else _STAYS)
            share = survey[name].parameters / survey.parameters
            told = f"{value:.3g}" if math.isfinite(value) else "not finite"
            pen.text((end + 8, y), f"{told}   {share:.1%}", fill=_FAINT, font=font)
        y += _LINE
    return _tensor(image)


def tradeoff_picture(points: Sequence[Point], recovered: Point | None, distance: str) -> torch.Tensor:
    """What is left of parameters, MACs and latency at every ratio, and the Fréchet distance there.

    Args:
        points: by rising ratio, the whole model first.
        recovered: after recovery.
        distance: name of the distance, "" for none.

    Returns:
        uint8 (3, height, width).
    """
    from PIL import Image, ImageDraw

    panels = [("left, %", costs_lines(points), {})]
    lines = distance_lines(points, recovered)
    if lines:
        panels.append((distance, lines, {"whole model": points[0].fd} if points[0].fd is not None else {}))
    image = Image.new("RGB", (460 * len(panels), 330), "white")
    for index, (title, drawn, levels) in enumerate(panels):
        _panel(ImageDraw.Draw(image), 460 * index, title, drawn, levels)
    return _tensor(image)


def costs_lines(points: Sequence[Point]) -> dict[str, list[tuple[float, float]]]:
    """(ratio, percent left) of all that is counted or measured, by its name."""
    shares = [(point.ratio, point.shares(points[0])) for point in points]
    return {NOUNS[cost]: [(ratio, 100.0 * one[cost]) for ratio, one in shares] for cost in shares[0][1]}


def distance_lines(points: Sequence[Point], recovered: Point | None) -> dict[str, list[tuple[float, float]]]:
    """(ratio, distance) of all points with a finite one, and of the recovered model."""
    found = {"pruned": points, "recovered": [recovered] if recovered else []}
    lines = {
        name: [(one.ratio, one.fd) for one in some if one.fd is not None and math.isfinite(one.fd)]
        for name, some in found.items()
    }
    return {name: line for name, line in lines.items() if line}


def _rows(survey: Survey) -> list[tuple[str | None, str]]:
    """(name, rest of it) of every candidate, with (None, block) before the first of each block."""
    rows, block = [], None
    for name in survey.names:
        parts = name.split(".")
        here = ".".join(parts[: 2 if parts[1].isdigit() else 1]) if len(parts) > 1 else name
        if here != block:
            rows.append((None, here))
            block = here
        rows.append((name, name.removeprefix(here).lstrip(".") or "all of it"))
    return rows


def _scale(values: Sequence[float]):
    """Pixels of a score: a tenth of the longest bar for the lowest, all of it for the highest."""
    low, high = (math.log(end(values)) for end in (min, max)) if values else (0.0, 0.0)

    def length(value: float) -> int:
        if value <= 0.0:
            return 1
        place = (math.log(value) - low) / (high - low) if high > low else 1.0
        return round(_BAR * (0.1 + 0.9 * place))

    return length


def _panel(pen, offset: int, title: str, lines: Mapping, levels: Mapping[str, float]) -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(size=13)
    x0, x1, y0, y1 = offset + 58, offset + 446, 62, 280
    xs = sorted({x for line in lines.values() for x, _ in line} | {0.0})
    heights = [y for line in lines.values() for _, y in line] + [*levels.values(), 0.0]
    ticks = round_ticks(min(heights), max(heights))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[-1] - xs[0]) if len(xs) > 1 else 0.5
        return x0 + across * (x1 - x0), y1 - (y - ticks[0]) / (ticks[-1] - ticks[0]) * (y1 - y0)

    pen.text((offset + 14, 10), title, fill=_INK, font=font)
    for tick in ticks:
        y = at(xs[0], tick)[1]
        pen.line((x0, y, x1, y), fill="#ddd")
        pen.text((x0 - 8 - font.getlength(f"{tick:g}"), y - 8), f"{tick:g}", fill=_FAINT, font=font)
    for x in xs:
        pen.text((at(x, ticks[0])[0] - 10, y1 + 6), f"{x:g}", fill=_FAINT, font=font)
    pen.text(((x0 + x1) / 2 - 60, y1 + 24), "ratio asked for", fill=_FAINT, font=font)
    for name, level in levels.items():
        y = at(xs[0], level)[1]
        pen.line((x0, y, x1, y), fill="#999")
        pen.text((x1 - font.getlength(name), y - 17), name, fill=_FAINT, font=font)
    place = offset + 14
    for (name, line), colour in zip(lines.items(), COLOURS, strict=False):
        pen.text((place, 32), name, fill=colour, font=font)
        place += int(font.getlength(name)) + 16
        spots = [at(*point) for point in line]
        pen.line(spots, fill=colour, width=2)
        for x, y in spots:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)


def _tensor(image) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
