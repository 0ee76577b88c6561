"""Solver schedules drawn over noise levels, and their decisions in words."""

from collections.abc import Sequence

import torch

from ..samplers.multistep import QUANTITIES
from ..samplers.searched import PlanFile
from ..samplers.usf import Decision, levels_at
from ..search.space import Axis
from ..search.subjects import Subject

_COLUMN, _LINE, _MARGIN = 110, 17, 14  # pixels: a step, a line of text, around


def drawing(schedules: Sequence[tuple[str, PlanFile]], subject: Subject) -> torch.Tensor:
    """Where schedules call the network, from noise on the left to the image on the right, and what every step does.

    Args:
        schedules: titles and plans.
        subject: the model.

    Returns:
        uint8 (3, height, width).
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    font, axis = ImageFont.load_default(size=13), Axis(subject.schedule)
    texts = [[_brief(step, subject) for step in steps_of(file)] for _, file in schedules]
    titles = [title + _ending(file) for title, file in schedules]
    longest = max(int(font.getlength(title)) for title in titles)
    width = 2 * _MARGIN + max(_COLUMN * max(map(len, texts)), longest, 640)
    heights = [_LINE * (3 + max(map(len, columns))) + 46 for columns in texts]
    image = Image.new("RGB", (width, sum(heights) + _MARGIN), "white")
    pen, top = ImageDraw.Draw(image), 0
    for title, (_, file), columns, height in zip(titles, schedules, texts, heights, strict=True):
        line, left, right = top + 2 * _LINE + 8, _MARGIN + 46, width - _MARGIN - 52
        pen.text((_MARGIN, top + 4), title, fill="black", font=font)
        pen.text((_MARGIN, line - 9), "noise", fill="#666", font=font)
        pen.text((right + 12, line - 9), "image", fill="#666", font=font)
        pen.line((left, line, right, line), fill="#999", width=2)
        each = (width - 2 * _MARGIN) / len(columns)
        places = axis.of([time for time, _, _ in steps_of(file)]) / axis.top
        for index, (place, words, (_, _, called)) in enumerate(zip(places, columns, steps_of(file), strict=True)):
            x, column = left + (1.0 - float(place)) * (right - left), _MARGIN + index * each
            pen.line((x, line + 9, column + 6, line + 34), fill="#bbb")
            pen.ellipse(
                (x - 5, line - 5, x + 5, line + 5), fill="#1b78c8" if called else "white", outline="#1b78c8", width=2
            )
            for row, text in enumerate(words):
                pen.text((column, line + 36 + _LINE * row), text, fill="black" if row else "#1b5fa7", font=font)
        top += height
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def steps_of(file: PlanFile) -> list[tuple[float, Decision | str, bool]]:
    """(time, decision, whether the network is called) of every node; of rules without decisions, what a row integrates."""
    if file.decisions is None:
        cores = {quantity: core for core, quantity in QUANTITIES.items()}
        return [(row.t, cores.get(row.quantity, row.quantity), True) for row in file.plan.rows]
    pairs = zip(file.decisions.times, file.decisions.steps, strict=True)
    return [(time, step, bool(index or not file.decisions.skip_first)) for index, (time, step) in enumerate(pairs)]


def described(step: Decision) -> dict[str, str]:
    """A decision in words; empty where it is usual or makes no difference."""
    plain = step.order == 1 and step.corrector == "none" and not step.carry
    strength = {"scale": f"×{step.strength:.3g}", "linear": f"1 + {step.strength:.3g}·h", "none": ""}
    return {
        "order": str(step.order),
        "integrates": "" if plain else step.core,
        "in": "" if plain else step.variable,
        "relaxation": strength.get(step.relaxation, step.relaxation),
        "momentum": f"{step.carry:.3g}" if step.carry else "",
        "start": f"{step.start} nodes back" if step.start > 1 else "",
        "points": ", ".join(map(str, step.points)),
        "corrector": "" if step.corrector == "none" else step.corrector,
    }


def level_at(time: float, subject: Subject) -> tuple[str, str, str]:
    """σ, α and σ/α at a time, as text."""
    alpha, sigma = (float(level[0]) for level in levels_at([time], subject.schedule))
    return f"{sigma:.4g}", f"{alpha:.4g}", f"{sigma / alpha:.3g}" if alpha else "inf"


def _brief(step: tuple[float, Decision | str, bool], subject: Subject) -> list[str]:
    """What the drawing says of a step, line by line."""
    time, decision, called = step
    level = f"rho {level_at(time, subject)[2]}"
    if isinstance(decision, str):
        return [level, decision]
    told = described(decision)
    relaxation = told["relaxation"].replace("×", "x ").replace("·", " ")  # Pillow's font has neither, and no Greek
    words = [
        "" if called else "no call",
        f"order {told['order']}",
        told["integrates"],
        told["in"] and f"in {told['in']}",
        relaxation and f"relaxed {relaxation}",
        told["momentum"] and f"momentum {told['momentum']}",
        told["corrector"] and f"{told['corrector']} corrector",
    ]
    return [level, *filter(None, words)]


def _ending(file: PlanFile) -> str:
    return f", ends at rho {file.decisions.end:.2g}" if file.decisions and file.decisions.end else ""
