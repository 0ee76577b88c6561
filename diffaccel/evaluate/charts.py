"""Line charts as inline SVG for the HTML pages: no scripts, colours that read on light and dark."""

import html
import math
from collections.abc import Callable, Mapping, Sequence

COLOURS = (
    "#1b78c8", "#d2662c", "#2e9356", "#a35bc2", "#b8912a", "#7b8794", "#c8466f", "#1f9ba6", "#8a6a4f", "#6d74d6",
)  # fmt: skip
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 260, 52, 14, 10, 40
_DIGIT = 7  # width of a character below the horizontal axis


def line_chart(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    levels: Mapping[str, float] | None = None,
    x_label: str = "",
    zero: bool = True,
    logarithmic: bool = False,
) -> str:
    """A figure with one line per name.

    Args:
        title, x_label: plain texts.
        lines: by name, points (x, y, half the length of its whisker), all finite, at least one in all.
        levels: by name, heights of dashed horizontal lines.
        zero: whether the vertical axis must show 0.
        logarithmic: a logarithmic vertical axis, for positive values; without whiskers.
    """
    levels = levels or {}
    points = [point for line in lines.values() for point in line]
    heights = [*levels.values(), *([0.0] if zero and not logarithmic else [])]
    heights += [y + side * (0.0 if logarithmic else spread) for _, y, spread in points for side in (1, -1)]
    ticks = (_powers if logarithmic else round_ticks)(min(heights), max(heights))
    axis = math.log10 if logarithmic else float
    xs = sorted({x for x, _, _ in points})
    low, high = (axis(end) for end in (min(ticks[0], *heights), max(ticks[-1], *heights)))

    def left(x: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((x - xs[0]) / (xs[-1] - xs[0]) if len(xs) > 1 else 0.5)

    def top(y: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - axis(y)) / (high - low)

    marks = [_text(_LEFT - 6, top(tick) + 4, f"{tick:g}", "end") for tick in ticks]
    marks += [_path(f"M{_LEFT} {top(tick):.1f}H{_WIDTH - _RIGHT}", "var(--line)") for tick in ticks]
    marks += [_text(left(x), _HEIGHT - _BOTTOM + 17, f"{x:g}", "middle") for x in _apart(xs, left)]
    marks.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT - 6, x_label, "middle"))
    for index, (name, y) in enumerate(levels.items()):
        marks.append(_path(f"M{_LEFT} {top(y):.1f}H{_WIDTH - _RIGHT}", "var(--faint)", "stroke-dasharray:5 4"))
        end = (_LEFT + 12, "start") if index % 2 else (_WIDTH - _RIGHT - 12, "end")  # neighbours must not overlap
        marks.append(_text(end[0], top(y) - 4, name, end[1]))
    names = []
    for index, (name, line) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        names.append(f"<b style='color:{colour}'>● {html.escape(name)}</b>")
        marks.append(_path("M" + "L".join(f"{left(x):.1f} {top(y):.1f}" for x, y, _ in line), colour, "stroke-width:2"))
        for x, y, spread in line:
            marks.append(f"<circle cx='{left(x):.1f}' cy='{top(y):.1f}' r='3.5' style='fill:{colour}'/>")
            if spread and not logarithmic:
                marks.append(_path(f"M{left(x):.1f} {top(y + spread):.1f}V{top(y - spread):.1f}", colour))
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption><p class='small'>{' '.join(names)}</p>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' width='{_WIDTH}' height='{_HEIGHT}' role='img' "
        f"aria-label='{html.escape(title, quote=True)}'>{''.join(marks)}</svg></figure>"
    )


def round_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, four to ten of them, around what is to be shown."""
    rough = (high - low) / 5 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, max(last, first + 1) + 1)]


def _apart(xs: Sequence[float], left: Callable[[float], float]) -> list[float]:
    """The first number, and in turn the next that leaves room for the one before."""
    chosen, room = list(xs[:1]), _DIGIT * (1 + max(len(f"{x:g}") for x in xs))
    for x in xs:
        if left(x) - left(chosen[-1]) >= room:
            chosen.append(x)
    return chosen


def _powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, the first at or below and the last at or above what is to be shown."""
    steps = [factor * 10.0**power for power in range(-12, 13) for factor in (1, 2, 5)]
    first = max(step for step in steps if step <= low)
    last = min(step for step in steps if step >= high and step > first)
    return [step for step in steps if first <= step <= last]


def _path(d: str, colour: str, style: str = "") -> str:
    return f"<path d='{d}' style='fill:none;stroke:{colour};{style}'/>"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    style = f"fill:var(--faint);font:12px system-ui,sans-serif;text-anchor:{anchor}"
    return f"<text x='{x:.1f}' y='{y:.1f}' style='{style}'>{html.escape(text)}</text>"
