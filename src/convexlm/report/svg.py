"""Small SVG: elements with escaped attributes, linear scales, round ticks, labels that keep apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from convexlm.report.text import visible

if TYPE_CHECKING:
    from collections.abc import Sequence


def element(tag: str, *children: Any, **attributes: Any) -> Markup:
    """An element; `class_` is `class`, `_` in names is `-`; children that are no `Markup` are escaped."""
    words = []
    for key, value in attributes.items():
        if value is None:
            continue
        name = key.rstrip("_").replace("_", "-") if key != "viewBox" else key
        text = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else visible(str(value))
        words.append(f' {name}="{escape(text)}"')
    inside = "".join(child if isinstance(child, Markup) else escape(visible(str(child))) for child in children)
    return Markup(f"<{tag}{''.join(words)}>{inside}</{tag}>")


def drawing(width: float, height: float, title: str, *children: Markup, class_: str = "chart") -> Markup:
    """An `<svg>` that a screen reader calls `title`."""
    return element(
        "svg",
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        width=f"{width:g}",
        height=f"{height:g}",
        role="img",
        aria_label=title,
        class_=class_,
    )


@dataclass(frozen=True)
class Scale:
    """A linear map of data from [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from low to high (1, 2 or 5 times a power of ten apart)."""
    if not low < high:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / max(1, count)))
    choices = [_multiples(power * factor, low, high) for factor in (10, 5, 2, 1)]
    return min(choices, key=lambda marks: abs(len(marks) - count))


def _multiples(step: float, low: float, high: float) -> list[float]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_text(value: float, step: float) -> str:
    """A tick's label, with as many decimals as the step needs and a true minus sign."""
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    if abs(value) >= 10000:
        return f"{value / 1000:g}k".replace("-", "−")
    return f"{value:.{min(digits, 6)}f}".replace("-", "−")


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """The range of values with a margin; never empty."""
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    return low - share * (high - low), high + share * (high - low)


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions moved as little as need be so that neighbours are `gap` apart, within [low, high] if they fit."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed = [0.0] * len(positions)
    at = low - gap
    for index in order:
        at = placed[index] = max(positions[index], at + gap)
    limit = high + gap
    for index in reversed(order):
        limit = placed[index] = min(placed[index], limit - gap)
    return placed
