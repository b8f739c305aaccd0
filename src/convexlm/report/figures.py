"""Which figures a run has: its numbers put into the charts' terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convexlm.report.charts import (
    Interval,
    Line,
    curves,
    difference_range,
    differences,
    quality_and_cost,
    strip,
    strip_axis,
)
from convexlm.report.findings import seed_deltas
from convexlm.report.text import delta_text, interval_text, is_number, is_share, metric_title
from convexlm.significance import is_sure

if TYPE_CHECKING:
    from markupsafe import Markup

    from convexlm.report.data import RunData

# Of metrics.jsonl: key, title, note, where the axis starts.
TRAINING = (
    ("nll", "Negative log-likelihood", "nats a target token, in training", None),
    ("eval_nll", "Validation negative log-likelihood", "nats a target token", None),
    ("weight_mean", "Mean weight of a sequence", "1 for every sequence under maximum likelihood", 0.0),
    ("effective_sample_size", "Effective sample size", "share of the batch that the gradient listens to", 0.0),
)


@dataclass(frozen=True)
class Figure:
    """A drawing with its title and a note."""

    title: str
    note: str
    svg: Markup


def strips(run: RunData) -> dict[str, Any]:
    """The main table's intervals: `axis`, and a drawing by (search, arm)."""
    metric = run.comparison["metrics"][0]
    factor = 100.0 if is_share(metric) else 1.0
    found: dict[tuple[str, str], tuple[Interval, str]] = {}
    for row in run.comparison["table"]:
        if row["metric"] != metric or not is_number(row.get("delta")):
            continue
        seeds = seed_deltas(run, row["search"], row["arm"], metric)
        title = f"{row['arm']}, {row['search']}: {delta_text(row['delta'], metric)}, {interval_text(row, metric)}"
        found[row["search"], row["arm"]] = (_interval(run, row, row["arm"], seeds), title)
    if not found:
        return {"axis": None, "cells": {}}
    limits = difference_range([one for one, _ in found.values()])
    cells = {key: strip(one, limits, title) for key, (one, title) in found.items()}
    return {"axis": strip_axis(limits, factor), "cells": cells}


def training_figures(run: RunData) -> list[Figure]:
    """Curves over training steps, a line an arm and seed; only what the runs logged."""
    found = []
    for key, title, note, low in TRAINING:
        lines = []
        for one in run.runs:
            points = [
                (float(row["step"]), float(row[key]) if is_number(row[key]) else None)
                for row in run.metrics.get(one.name, [])
                if key in row and is_number(row.get("step"))
            ]
            lines.append(Line(one.arm, run.style(one.arm), points))
        svg = curves(f"{title} over steps", lines, low=low)
        if svg is not None:
            found.append(Figure(title, note, svg))
    return found


def checkpoint_figures(run: RunData) -> list[Figure]:
    """Score over checkpoints with 95 % intervals, a panel a search and role, where several were decoded."""
    metric = run.comparison["metrics"][0]
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in run.comparison["checkpoints_scores"]:
        if row["metric"] == metric and is_number(row.get("score")):
            panels.setdefault((row["role"], row["search"]), []).append(row)
    found = []
    for (role, search), rows in panels.items():
        lines = []
        where = "" if role == "test" else f", {role} sets"
        for one in run.runs:
            mine = [row for row in rows if row["arm"] == one.arm and row["seed"] == one.seed]
            mine.sort(key=lambda row: _step(row["checkpoint"]))
            points: list[tuple[float, float | None]] = [(float(_step(r["checkpoint"])), r["score"]) for r in mine]
            ends = [(r["low"], r["high"]) if is_number(r["low"]) and is_number(r["high"]) else None for r in mine]
            lines.append(Line(one.arm, run.style(one.arm), points, ends))
        svg = curves(f"{metric_title(metric)} over checkpoints, {search} search{where}", lines)
        if svg is not None:
            note = f"{role} sets, mean over the directions; uprights: 95 % over sentences"
            found.append(Figure(f"{metric_title(metric)} by checkpoint, {search}", note, svg))
    return found


def cost_figures(run: RunData) -> list[Figure]:
    """Score over decoding seconds a sentence at the compared checkpoints, a line an arm: one figure, or none."""
    metric = run.comparison["metrics"][0]
    if len(run.comparison["searches"]) < 2:
        return []
    lines = []
    for arm in run.arms:
        points: list[tuple[float, float | None]] = []
        names = []
        for search in run.comparison["searches"]:
            rows = [row for row in _final_rows(run, metric) if row["arm"] == arm and row["search"] == search]
            cost = _cost(rows)
            if cost is None:
                continue
            points.append((cost, sum(row["score"] for row in rows) / len(rows)))
            names.append(str(search))
        if points:
            lines.append(Line("|".join([arm.replace("|", " "), *names]), run.style(arm), points))
    svg = quality_and_cost("Quality and decoding cost", lines, metric_title(metric))
    note = "on the machine that decoded, batched; the gain of a wider search against its price"
    return [Figure(f"{metric_title(metric)} and what a sentence costs", note, svg)] if svg is not None else []


def direction_figures(run: RunData) -> list[Figure]:
    """Differences from the baseline, a panel a (test set, direction, search), a row an arm and seed."""
    metric = run.comparison["metrics"][0]
    rows = [row for row in run.comparison["paired"] if row["metric"] == metric and is_number(row.get("delta"))]
    if not rows:
        return []
    panels: dict[tuple[str, str, str], list[Interval]] = {}
    for row in rows:
        arm = row["system"]
        if arm not in run.arms:
            continue
        label = f"{arm} · {row['seed']}" if run.several_seeds else arm
        panels.setdefault((row["test_set"], row["pair"], row["search"]), []).append(_interval(run, row, label, []))
    order = {arm: index for index, arm in enumerate(run.arms)}
    for intervals in panels.values():
        intervals.sort(key=lambda one: order[one.label.split(" · ")[0]])
    limits = difference_range([one for intervals in panels.values() for one in intervals])
    note = f"{metric_title(metric)} against {run.comparison['baseline']}"
    if run.several_seeds:
        note += "; arm · training seed"
    return [
        Figure(f"{pair}, {search}", f"{test_set}: {note}", differences(f"{test_set} {pair} {search}", found, limits))
        for (test_set, pair, search), found in panels.items()
    ]


def _interval(run: RunData, row: dict[str, Any], label: str, seeds: list[float]) -> Interval:
    ends = [row[key] if is_number(row.get(key)) else None for key in ("delta_low", "delta_high")]
    style = run.style(str(row["arm"] if "arm" in row else row["system"]))
    return Interval(label, style, row["delta"], ends[0], ends[1], seeds, is_sure(row))


def _final_rows(run: RunData, metric: str) -> list[dict[str, Any]]:
    """Rows of scores.jsonl at the checkpoints that were compared."""
    final = {(one.arm, one.seed): run.checkpoint(one) for one in run.runs}
    return [
        row
        for row in run.scores
        if row.get("metric") == metric
        and row.get("role", "test") == "test"
        and is_number(row.get("score"))
        and row.get("checkpoint") == final.get((str(row.get("arm")), row.get("seed", 0)))
    ]


def _cost(rows: list[dict[str, Any]]) -> float | None:
    """Seconds a sentence over all of them, as the table of outputs counts; None where one does not say."""
    seconds, count = 0.0, 0.0
    for row in rows:
        value, number = (row.get("decoding") or {}).get("seconds"), row.get("num_sentences")
        if not (is_number(value) and is_number(number) and value > 0 and number > 0):
            return None
        seconds, count = seconds + value, count + number
    return seconds / count if rows else None


def _step(checkpoint: str) -> int:
    digits = checkpoint.rsplit("-", 1)[-1]
    return int(digits) if digits.isdecimal() else 0
