"""The figures of a diagnosis: the histogram of p̄ with the weight curves over it, shares by tenth, before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convexlm.report.charts import HEIGHT, WIDTH, Line, curves
from convexlm.report.svg import Scale, drawing, element, tick_text, ticks

if TYPE_CHECKING:
    from markupsafe import Markup

MOST_CURVES = 7
_COLOURS = 8


@dataclass(frozen=True)
class Figure:
    """A drawing with its caption."""

    title: str
    note: str
    svg: Markup


def style_of(number: int) -> str:
    """The style sheet's class of an objective by its place; maximum likelihood has the first colour."""
    return f"arm{1 + number % (_COLOURS - 1)}"


def data_figures(result: dict[str, Any]) -> list[Figure]:
    """The distribution of p̄, and each sequence-level objective's weight over p̄."""
    data = result["data"]
    found = [
        Figure(
            "How likely the answers are to the model",
            "records by p̄, the geometric mean of an answer's token probabilities",
            histogram("histogram of p̄", data["histogram"]["edges"], data["histogram"]["counts"]),
        )
    ]
    lines = []
    for number, entry in enumerate(result["objectives"][:MOST_CURVES]):
        points = [((row["from"] + row["to"]) / 2, row["weight"]) for row in entry["by_p_bar"]]
        lines.append(Line(entry["label"], style_of(number), [(x, y) for x, y in points]))
    _append(found, "The weight that they get", "mean weight of each tenth of the records, over its p̄", lines, "p̄")
    return found


def share_figures(result: dict[str, Any], key: str, share: str = "share") -> list[Figure]:
    """Shares of the gradient by tenth (`by_p_bar` or `by_length`), every objective and maximum likelihood."""
    entries = result["objectives"][:MOST_CURVES]
    rows = entries[0][key]
    if len(rows) < 2 or rows[0][share] is None:
        return []
    percent = lambda name, part: [(i + 1.0, 100 * row[name]) for i, row in enumerate(part)]  # noqa: E731
    lines = [Line("mle", "arm0", list(percent(f"mle_{share}", rows)))]
    lines += [Line(entry["label"], style_of(i), list(percent(share, entry[key]))) for i, entry in enumerate(entries)]
    by, ends = ("p̄", "least likely") if key == "by_p_bar" else ("length", "shortest")
    what = "Share of the gradient" if share == "share" else "Share at the logits"
    found: list[Figure] = []
    _append(found, f"{what} by {by}", f"percent, by tenth of the records, from the {ends} up", lines, "tenth")
    return found


def comparison_figures(result: dict[str, Any]) -> list[Figure]:
    """NLL and p̄ by tenth, before and after; none without a comparison."""
    if not result.get("comparison"):
        return []
    rows = result["comparison"]["by_p_bar"]
    found: list[Figure] = []
    for key, title, note in (
        ("nll", "Negative log-likelihood", "nats a token; less is more likely"),
        ("p_bar", "p̄", "mean over the records of a tenth"),
    ):
        lines = [
            Line(name, style, [(i + 1.0, row[f"{key}_{name}"]) for i, row in enumerate(rows)])
            for name, style in (("before", "arm0"), ("after", "arm1"))
        ]
        _append(found, title, f"{note}; tenths by p̄ before", lines, "tenth")
    return found


def histogram(title: str, edges: list[float], counts: list[int]) -> Markup:
    """Bars over equal bins from 0 to 1; each says its range and count to those who point at it."""
    left, right, top, bottom = 42.0, WIDTH - 16.0, 8.0, HEIGHT - 32.0
    x_scale = Scale(edges[0], edges[-1], left, right)
    y_scale = Scale(0.0, max(1, *counts) * 1.06, bottom, top)
    marks: list[Markup] = []
    heights = ticks(0.0, y_scale.high, 4)
    for mark in heights:
        y = y_scale(mark)
        marks.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        label = tick_text(mark, heights[1] - heights[0] if len(heights) > 1 else 1.0)
        marks.append(element("text", label, x=left - 6, y=y + 4, text_anchor="end"))
    for mark in ticks(edges[0], edges[-1], 5):
        marks.append(element("text", tick_text(mark, 0.1), x=x_scale(mark), y=bottom + 15, text_anchor="middle"))
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        x, y = x_scale(low) + 0.5, y_scale(count)
        about = element("title", f"{low:.2f} to {high:.2f}: {count}")
        marks.append(element("rect", about, x=x, y=y, width=x_scale(high) - x - 0.5, height=bottom - y, class_="bar"))
    marks.append(element("text", "p̄", x=right, y=HEIGHT - 4.0, text_anchor="end"))
    return drawing(WIDTH, HEIGHT, title, *marks)


def _append(found: list[Figure], title: str, note: str, lines: list[Line], x_title: str) -> None:
    svg = curves(title, lines, x_title=x_title, low=0.0)
    if svg is not None:
        found.append(Figure(title, note, svg))
