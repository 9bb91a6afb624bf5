"""Line charts as inline SVG, without scripts, fonts or other files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

#: Size of a chart and of its margins, in SVG units.
WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 30
#: Points drawn of one line. More cannot be told apart at this width.
MAX_POINTS = 600
_NUM_TICKS = 5


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    #: A class of the page's style sheet, which gives the line its colour.
    style: str
    #: (step, value) by rising step.
    points: Sequence[Point]


def line_chart(title: str, lines: Sequence[Line]) -> str:
    """Return a chart of these lines over the steps, as an SVG element; "" if there is nothing to draw.

    Values that are not finite are left out.
    """
    drawn = [Line(line.name, line.style, _visible(line.points)) for line in lines]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return ""
    points = [point for line in drawn for point in line.points]
    steps = _ticks(min(x for x, _ in points), max(x for x, _ in points), is_whole=True)
    values = _ticks(min(y for _, y in points), max(y for _, y in points))
    x_of = _Scale(steps[0], steps[-1], LEFT, WIDTH - RIGHT)
    y_of = _Scale(values[0], values[-1], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *(_grid_line(y_of(value), value) for value in values),
        *(_step_label(x_of(step), step) for step in steps),
    ]
    for line in drawn:
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if len(line.points) <= 40:
            parts += [
                f'<circle class="dot {line.style}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.5">'
                f"<title>{escape(line.name)}, step {x:g}: {y:.4g}</title></circle>"
                for x, y in line.points
            ]
    legend = "".join(
        f'<span class="key"><span class="mark {line.style}"></span>{escape(line.name)}</span>'
        for line in drawn
    )
    return f"<figure><figcaption>{escape(title)} {legend}</figcaption>{''.join(parts)}</svg></figure>"


def _visible(points: Sequence[Point]) -> list[Point]:
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    every = max(1, math.ceil(len(finite) / MAX_POINTS))
    return finite[::every]


def _ticks(low: float, high: float, *, is_whole: bool = False) -> list[float]:
    """Return round numbers that begin at or below `low` and end at or above `high`."""
    if high - low < 1e-9:
        high = low + 1.0
    raw = (high - low) / _NUM_TICKS
    size = 10.0 ** math.floor(math.log10(raw))
    interval = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw)
    if is_whole:
        interval = max(1.0, interval)
    first, last = math.floor(low / interval), math.ceil(high / interval)
    return [round(number * interval, 10) for number in range(first, last + 1)]


class _Scale:
    """A linear map from [low, high] to [start, end]."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._start = low, start
        self._factor = (end - start) / (high - low)

    def __call__(self, value: float) -> float:
        return self._start + (value - self._low) * self._factor


def _grid_line(y: float, value: float) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    )


def _step_label(x: float, step: float) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{step:g}</text>'
