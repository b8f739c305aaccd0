"""Scores of easy and hard sentences: by the sources' length, and by the references' NLL under the base model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from convexlm.report.charts import Line, curves
from convexlm.report.figures import Figure
from convexlm.report.text import is_number, metric_title

if TYPE_CHECKING:
    from convexlm.report.data import RunData


@dataclass(frozen=True)
class PartTable:
    """One way to part the sentences.

    Attributes:
        title: what they are parted by.
        note: how, in a sentence; or why there is nothing to show.
        metric: of the scores.
        heads: the range and the number of sentences of every part.
        groups: (search, rows), a row an (arm, style, score a part).
        figures: one a search.
    """

    title: str
    note: str
    metric: str | None = None
    heads: list[tuple[str, int]] = field(default_factory=list)
    groups: list[tuple[str, list[tuple[str, str, list[float | None]]]]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


def part_tables(run: RunData) -> list[PartTable]:
    """By length, then by reference NLL; a table without groups where nothing was measured."""
    base = run.comparison["reference_nll"]
    by_length = _table(
        run,
        run.comparison["by_length"],
        "By length of the source",
        "source tokens",
        "Sources parted at the quartiles of their length in every direction: words, or characters in Chinese, "
        "Japanese and Thai. No test is made of these.",
        lambda row: f"{row['shortest']} to {row['longest']}",
    )
    by_nll = _table(
        run,
        run.comparison["by_reference_nll"],
        "By how hard the reference is",
        "nats a token",
        "Sentences parted at the quartiles of their first reference’s mean negative log-likelihood under "
        f"{base['base']}, the model before this training: to the left what it expected, to the right what it did "
        "not. No test is made of these.",
        lambda row: f"{row['low']:.2f} to {row['high']:.2f}",
    )
    if not by_nll.groups and base["reason"]:
        by_nll = PartTable(by_nll.title, f"Not measured: {base['reason']}.")
    return [by_length, by_nll]


def _table(run: RunData, rows: list[dict[str, Any]], title: str, unit: str, note: str, span: Any) -> PartTable:
    if not rows:
        return PartTable(title, "The run was compared before these scores were made; run the recipe again for them.")
    buckets = sorted({row["bucket"] for row in rows})
    firsts = [next(row for row in rows if row["bucket"] == bucket) for bucket in buckets]
    cells = {(row["search"], row["arm"], row["bucket"]): row for row in rows}
    metric = rows[0]["metric"]
    groups, figures = [], []
    for search in run.comparison["searches"]:
        scores: list[tuple[str, str, list[float | None]]] = []
        lines = []
        for arm in run.arms:
            mine = [cells.get((search, arm, bucket), {}) for bucket in buckets]
            scores.append((arm, run.style(arm), [cell.get("score") for cell in mine]))
            points = [(cell["median"], cell["score"]) for cell in mine if is_number(cell.get("median"))]
            lines.append(Line(arm, run.style(arm), points))
        groups.append((search, scores))
        svg = curves(f"{title}, {search}", lines, x_title=unit) if len(buckets) > 1 else None
        if svg is not None:
            figures.append(Figure(f"{metric_title(metric)}, {search}", f"over {unit}, at each part’s median", svg))
    heads = [(span(row), row["num_sentences"]) for row in firsts]
    return PartTable(title, note, metric, heads, groups, figures)
