"""The waterfall picture: what every acceleration takes off time and memory."""

from pathlib import Path

import numpy as np
import torch

from ..core.images import save_png

_ROW, _LABEL, _PANEL, _GAP, _MARGIN = 34, 150, 330, 110, 16  # pixels
_BLUE, _GREEN, _RED, _GREY = "#1b78c8", "#2e9356", "#c0392b", "#c9ced3"


def save_waterfall(report, path: Path) -> None:
    """Draw an `OptimizeReport`: one row per trial, ms per image on the left and peak memory on the right.

    Full bars are measured levels; green parts were saved, red ones added, and outlines are what would have been
    saved or added by what is not used.
    """
    save_png(_drawing(report), path)


def _drawing(report) -> torch.Tensor:
    from PIL import Image, ImageDraw, ImageFont

    font, small = ImageFont.load_default(size=14), ImageFont.load_default(size=12)
    rows = _rows(report)
    width = 2 * _MARGIN + _LABEL + 2 * (_PANEL + _GAP)
    image = Image.new("RGB", (width, 2 * _MARGIN + _ROW * (len(rows) + 2)), "white")
    pen = ImageDraw.Draw(image)
    device = report.environment["device"]
    pen.text((_MARGIN, _MARGIN), f"{report.pipeline} on {device}", fill="black", font=font)
    for panel, title in enumerate(("ms per image", "MiB at the peak")):
        left = _MARGIN + _LABEL + panel * (_PANEL + _GAP)
        pen.text((left, _MARGIN + _ROW), title, fill="#555", font=small)
        values = [value for _, levels, *_ in rows if levels[panel] is not None for value in levels[panel]]
        longest = max(values, default=0.0)
        for index, (name, levels, used, why) in enumerate(rows):
            top = _MARGIN + _ROW * (index + 2)
            if not panel:
                pen.text((_MARGIN, top + 5), name, fill="black" if used else "#888", font=font)
            if levels[panel] is None or not longest:
                pen.text(
                    (left, top + 6),
                    "not measured" if levels[0] is not None else why,
                    fill="#999",
                    font=small,
                )
                continue
            _bar(pen, small, left, top, _PANEL / longest, levels[panel], used)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _bar(pen, font, left: float, top: float, scale: float, levels: tuple[float, float], used: bool) -> None:
    before, after = (left + scale * value for value in levels)
    low, high = sorted((before, after))
    pen.rectangle((left, top + 4, max(low, left + 1), top + 24), fill=_BLUE if before == after else _GREY)
    if high - low >= 1:
        colour = _GREEN if after < before else _RED
        pen.rectangle((low, top + 4, high, top + 24), fill=colour if used else None, outline=colour)
    pen.text((high + 6, top + 7), f"{levels[1]:.4g}", fill="black" if used else "#888", font=font)


def _rows(report) -> list[tuple[str, list, bool, str]]:
    """Name, (before, after) in ms and MiB or None, whether it is used, and why there is nothing to show, row by row.

    Each trial was measured against its own neighbour; its ratio is applied to the level that the rows above it end at.
    """
    level = [1000 * report.first.seconds, _mib(report.first.bytes)]
    rows = [("as it came", [value and (value, value) for value in level], True, "")]
    for trial in report.trials:
        if trial.used is None:
            rows.append((trial.name, [None, None], False, trial.outcome))
            continue
        kept, levels = trial.outcome == "kept", []
        ratios = [trial.used.seconds / trial.without.seconds, _quotient(trial.used.bytes, trial.without.bytes)]
        for panel, ratio in enumerate(ratios):
            after = level[panel] and ratio and level[panel] * ratio
            levels.append(after and (level[panel], after))
            level[panel] = (after or level[panel]) if kept else level[panel]
        rows.append((trial.name, levels, kept, ""))
    if report.last is not None:
        end = [1000 * report.last.seconds, _mib(report.last.bytes)]
        rows.append(("together", [value and (value, value) for value in end], True, ""))
    return rows


def _mib(size: int | None) -> float | None:
    return size and size / 2**20


def _quotient(after: int | None, before: int | None) -> float | None:
    return after and before and after / before
