"""The figures of a report: intervals in a table cell, curves over steps, differences a direction, quality and cost.

No figure is wider than a phone; several stand in a grid. Colours come from the page's style sheet by the arm's class,
and every line and dot has its name beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from convexlm.report.svg import Scale, drawing, element, padded, spread, tick_text, ticks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from markupsafe import Markup

WIDTH, HEIGHT = 340.0, 210.0
STRIP_WIDTH, STRIP_HEIGHT = 150.0, 26.0
MAX_POINTS = 240
LABEL_GAP = 13.0


@dataclass(frozen=True)
class Line:
    """One curve: `points` are (x, y), y None where a value is missing or no number."""

    label: str
    style: str
    points: list[tuple[float, float | None]]
    intervals: list[tuple[float, float] | None] = field(default_factory=list)


@dataclass(frozen=True)
class Interval:
    """A difference from the baseline with its interval, and what it is under every training seed."""

    label: str
    style: str
    delta: float
    low: float | None
    high: float | None
    seeds: list[float] = field(default_factory=list)
    sure: bool = False


def difference_range(intervals: Sequence[Interval]) -> tuple[float, float]:
    """A range for differences that holds all of them and zero."""
    values = [0.0]
    for one in intervals:
        values += [one.delta, *one.seeds, *(end for end in (one.low, one.high) if end is not None)]
    return padded(values, 0.08)


def strip(one: Interval, limits: tuple[float, float], title: str) -> Markup:
    """One interval for a table cell, on a scale that the column's cells share; small ticks are training seeds."""
    scale = Scale(*limits, 4.0, STRIP_WIDTH - 4.0)
    middle = STRIP_HEIGHT / 2
    zero = element("line", x1=scale(0), x2=scale(0), y1=0.0, y2=STRIP_HEIGHT, class_="zero")
    return drawing(
        STRIP_WIDTH, STRIP_HEIGHT, title, zero, _interval_marks(one, scale, middle), class_=f"strip {one.style}"
    )


def strip_axis(limits: tuple[float, float], factor: float = 1.0) -> Markup:
    """The scale over a column of strips; `factor` turns shares into percent."""
    scale = Scale(*limits, 4.0, STRIP_WIDTH - 4.0)
    marks = ticks(limits[0] * factor, limits[1] * factor, 3)
    step = marks[1] - marks[0] if len(marks) > 1 else 1.0
    texts = [
        element("text", tick_text(mark, step), x=scale(mark / factor), y=11.0, text_anchor="middle") for mark in marks
    ]
    return drawing(STRIP_WIDTH, 14.0, "scale of the differences", *texts, class_="strip axis")


def differences(title: str, intervals: Sequence[Interval], limits: tuple[float, float], factor: float = 1.0) -> Markup:
    """A panel of intervals, one a row, named at the left."""
    left, top, row = 104.0, 6.0, 24.0
    height = top + row * len(intervals) + 22.0
    scale = Scale(*limits, left, WIDTH - 8.0)
    bottom = height - 20.0
    marks = [*_x_axis(scale, bottom, top, factor)]
    marks.append(element("line", x1=scale(0), x2=scale(0), y1=top, y2=bottom, class_="zero"))
    for index, one in enumerate(intervals):
        y = top + row * (index + 0.5)
        name = element("text", _short(one.label, 16), x=left - 8.0, y=y + 4, text_anchor="end", class_="name")
        marks.append(element("g", name, _interval_marks(one, scale, y), class_=one.style))
    return drawing(WIDTH, height, title, *marks)


def curves(title: str, lines: Sequence[Line], *, x_title: str = "step", low: float | None = None) -> Markup | None:
    """Lines over a common axis, each named at its end; None if there is no point to draw.

    Args:
        title: for screen readers.
        lines: the curves; those with one label share it.
        x_title: what x counts.
        low: where the y axis starts, if not at the least value.
    """
    lines = [_thinned(line) for line in lines]
    drawn = [(x, y) for line in lines for x, y in line.points if y is not None]
    if not drawn:
        return None
    ends = [end for line in lines for pair in line.intervals if pair for end in pair]
    y_low, y_high = padded([y for _, y in drawn] + ends)
    y_low = min(y_low, low) if low is not None else y_low
    left, right, top, bottom = 42.0, WIDTH - 84.0, 8.0, HEIGHT - 32.0
    x_scale = Scale(*_x_limits([x for x, _ in drawn]), left, right)
    y_scale = Scale(y_low, y_high, bottom, top)
    marks = [*_y_axis(y_scale, left, right), *_x_axis(x_scale, bottom, None)]
    marks.append(element("text", x_title, x=right, y=HEIGHT - 4.0, text_anchor="end"))
    labels: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        marks.append(_curve(line, x_scale, y_scale))
        last = next((y for _, y in reversed(line.points) if y is not None), None)
        if last is not None:
            labels.setdefault((line.label, line.style), []).append(y_scale(last))
    heights = [sum(values) / len(values) for values in labels.values()]
    for (label, style), y in zip(labels, spread(heights, LABEL_GAP, top + 4, bottom), strict=True):
        text = element("text", _short(label, 13), x=right + 7, y=y + 4, class_="name")
        marks.append(element("g", text, class_=style))
    return drawing(WIDTH, HEIGHT, title, *marks)


def quality_and_cost(title: str, lines: Sequence[Line], y_title: str) -> Markup | None:
    """Score over seconds a sentence: an arm's searches joined by a line, the best arm's dots named `greedy`, `beam5`.

    `Line.label` is `ARM` and every point's name comes with it as `ARM|search1|search2|...`.
    """
    drawn = [(x, y) for line in lines for x, y in line.points if y is not None]
    if not drawn:
        return None
    left, right, top, bottom = 42.0, WIDTH - 84.0, 14.0, HEIGHT - 32.0
    x_scale = Scale(0.0, max(x for x, _ in drawn) * 1.08 or 1.0, left, right)
    y_scale = Scale(*padded([y for _, y in drawn], 0.12), bottom, top)
    marks = [*_y_axis(y_scale, left, right), *_x_axis(x_scale, bottom, None)]
    marks.append(element("text", "seconds a sentence", x=right, y=HEIGHT - 4.0, text_anchor="end"))
    ends = []
    # The names stand once, over the highest line: the dots below it are of the same searches.
    top_line = max(lines, key=_mean_height)
    for line in lines:
        arm, *names = line.label.split("|")
        known = [(x, y, name) for (x, y), name in zip(line.points, names, strict=True) if y is not None]
        parts = [_path([(x_scale(x), y_scale(y)) for x, y, _ in known])]
        for x, y, name in known:
            parts.append(element("circle", cx=x_scale(x), cy=y_scale(y), r=4.0, class_="dot"))
            if line is top_line:
                parts.append(element("text", name, x=x_scale(x), y=y_scale(y) - 8, text_anchor="middle"))
        marks.append(element("g", *parts, class_=line.style))
        if known:
            ends.append((arm, line.style, max(known)))
    heights = spread([y_scale(end[1]) for _, _, end in ends], LABEL_GAP, top, bottom)
    for (arm, style, _), y in zip(ends, heights, strict=True):
        text = element("text", _short(arm, 13), x=right + 7, y=y + 4, class_="name")
        marks.append(element("g", text, class_=style))
    return drawing(WIDTH, HEIGHT, f"{title}, {y_title}", *marks)


def _mean_height(line: Line) -> float:
    known = [y for _, y in line.points if y is not None]
    return sum(known) / len(known) if known else -math.inf


def _interval_marks(one: Interval, scale: Scale, y: float) -> Markup:
    parts = []
    if one.low is not None and one.high is not None:
        parts.append(element("line", x1=scale(one.low), x2=scale(one.high), y1=y, y2=y, class_="interval"))
    for value in one.seeds:
        parts.append(element("line", x1=scale(value), x2=scale(value), y1=y - 8, y2=y - 4, class_="seed"))
    parts.append(element("circle", cx=scale(one.delta), cy=y, r=4.5, class_="dot" if one.sure else "dot open"))
    return element("g", *parts)


def _curve(line: Line, x_scale: Scale, y_scale: Scale) -> Markup:
    """A line, broken where values are missing; single points become dots, intervals thin uprights."""
    parts: list[Markup] = []
    stretch: list[tuple[float, float]] = []
    for x, y in [*line.points, (0.0, None)]:
        if y is not None:
            stretch.append((x_scale(x), y_scale(y)))
            continue
        if len(stretch) == 1 or line.intervals:
            parts += [element("circle", cx=px, cy=py, r=3.0, class_="dot") for px, py in stretch]
        if len(stretch) > 1:
            parts.append(_path(stretch))
        stretch = []
    for (x, _), pair in zip(line.points, line.intervals, strict=False):
        if pair:
            low, high = (y_scale(end) for end in pair)
            parts.append(element("line", x1=x_scale(x), x2=x_scale(x), y1=low, y2=high, class_="upright"))
    return element("g", *parts, class_=line.style)


def _path(points: Sequence[tuple[float, float]]) -> Markup:
    return element("path", d="M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points), class_="curve")


def _x_axis(scale: Scale, bottom: float, top: float | None, factor: float = 1.0) -> list[Markup]:
    """Tick labels below, and light upright lines where `top` is given."""
    marks = ticks(scale.low * factor, scale.high * factor, 4)
    step = marks[1] - marks[0] if len(marks) > 1 else 1.0
    out: list[Markup] = []
    for mark in marks:
        x = scale(mark / factor)
        end = bottom + 4 if top is None else top
        out.append(element("line", x1=x, x2=x, y1=bottom, y2=end, class_="grid" if top is not None else "tick"))
        out.append(element("text", tick_text(mark, step), x=x, y=bottom + 15, text_anchor="middle"))
    return out


def _y_axis(scale: Scale, left: float, right: float) -> list[Markup]:
    marks = ticks(scale.low, scale.high, 4)
    step = marks[1] - marks[0] if len(marks) > 1 else 1.0
    out: list[Markup] = []
    for mark in marks:
        y = scale(mark)
        out.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        out.append(element("text", tick_text(mark, step), x=left - 6, y=y + 4, text_anchor="end"))
    return out


def _x_limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        return low - 1, high + 1
    return (0.0 if 0 < low <= 0.5 * high else low), high


def _thinned(line: Line) -> Line:
    """At most `MAX_POINTS` points: the means of equal stretches of a longer line."""
    if len(line.points) <= MAX_POINTS:
        return line
    bounds = [round(index * len(line.points) / MAX_POINTS) for index in range(MAX_POINTS + 1)]
    points: list[tuple[float, float | None]] = []
    for start, end in pairwise(bounds):
        part = line.points[start:end]
        values = [y for _, y in part if y is not None]
        points.append((part[-1][0], sum(values) / len(values) if values else None))
    return Line(line.label, line.style, points)


def _short(text: Any, length: int) -> str:
    text = str(text)
    return text if len(text) <= length else text[: length - 1] + "…"
