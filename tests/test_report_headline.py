"""What a report says has won: no more than the tests of significance do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest

from convexlm.report.data import read_run
from convexlm.report.findings import headline, is_sure
from report_helpers import change

if TYPE_CHECKING:
    from pathlib import Path


def _row(delta: float, low: float, high: float, p: float, **more: Any) -> dict[str, Any]:
    ps = {"p_value": p, "p_two_sided": p, "p_holm": p}
    return {"delta": delta, "delta_low": low, "delta_high": high, **ps, **more}


def test_sure_needs_the_interval_and_every_p() -> None:
    assert is_sure(_row(2, 1, 3, 0.01))
    assert is_sure(_row(-2, -3, -1, 0.01))
    assert not is_sure(_row(2, -1, 3, 0.01))
    assert not is_sure(_row(2, 1, 3, 0.01) | {"p_holm": 0.06})
    assert not is_sure(_row(2, 1, 3, 0.01) | {"p_two_sided": 0.06})
    assert not is_sure(_row(2, math.nan, 3, 0.01))
    assert not is_sure({"delta": None})


@pytest.mark.parametrize(
    ("greedy", "beam", "said"),
    [
        (
            _row(2, 1, 3, 0.01),
            _row(2, 1, 3, 0.01),
            "convex-k1 beats mle with every search: +2.00 BLEU (greedy search)",
        ),
        (_row(2, -1, 3, 0.2), _row(1, -1, 3, 0.3), "No objective differs from mle in BLEU beyond chance"),
        (_row(-2, -3, -1, 0.01), _row(-2, -3, -1, 0.01), "mle is ahead of every other objective"),
        (
            _row(2, 1, 3, 0.01),
            _row(1, -1, 3, 0.3),
            "With greedy search convex-k1 is ahead of mle by +2.00 BLEU; "
            "with beam5 search no objective is surely ahead",
        ),
    ],
)
def test_the_headline_says_no_more_than_the_tests(report_copy: Path, greedy: dict, beam: dict, said: str) -> None:
    def edit(comparison: dict[str, Any]) -> None:
        comparison["arms"] = ["mle", "convex-k1"]
        rows = [row for row in comparison["table"] if row["arm"] != "convex-k3"]
        for row in rows:
            if row["arm"] == "convex-k1" and row["metric"] == "bleu":
                row.update(greedy if row["search"] == "greedy" else beam)
        comparison["table"] = rows

    change(report_copy, edit)
    assert headline(read_run(report_copy))[0] == said


@pytest.mark.parametrize(
    ("rows", "said", "sentence", "line"),
    [
        (  # the larger lead may be luck, the smaller one is none
            [_row(1.2, -0.1, 2.5, 0.07), _row(1, 0.6, 1.4, 0.002)],
            "convex-k3 beats mle with greedy search: +1.00 BLEU",
            "convex-k1 scores more, but that may be luck: +1.20",
            "convex-k3 is ahead of mle by 1.00 BLEU (p = 0.002); "
            "the lead of convex-k1, 1.20 BLEU (p = 0.070), may be luck",
        ),
        (
            [_row(0.05, -1, 1, 0.8), _row(-6, -7, -5, 0.001)],
            "No objective is surely ahead of mle in BLEU",
            "best of the others is convex-k1, +0.05",
            "no arm is surely ahead of mle, and surely behind is convex-k3",
        ),
        (
            [_row(0.05, -1, 1, 0.8), _row(-0.5, -1.5, 0.5, 0.3)],
            "No objective differs from mle in BLEU beyond chance",
            "best of the others is convex-k1",
            "no arm differs from mle in BLEU beyond chance; nearest the top is convex-k1, +0.05 (p = 0.800)",
        ),
    ],
)
def test_an_arm_that_is_surely_ahead_or_behind_is_not_hidden_by_a_better_one(
    report_copy: Path, rows: list[dict], said: str, sentence: str, line: str
) -> None:
    from convexlm.tables import conclusions

    def edit(comparison: dict[str, Any]) -> None:
        comparison["searches"] = ["greedy"]
        comparison["table"] = [row for row in comparison["table"] if row["search"] == "greedy"]
        for row in comparison["table"]:
            if row["metric"] == "bleu" and row["arm"] != "mle":
                row.update(rows[row["arm"] == "convex-k3"])

    change(report_copy, edit)
    run = read_run(report_copy)
    title, sentences = headline(run)
    assert title == said and sentence in sentences[0]
    assert conclusions(run.comparison) == [f"greedy: {line}"]


def test_lower_is_better_for_ter(report_copy: Path) -> None:
    def edit(comparison: dict[str, Any]) -> None:
        comparison["metrics"] = ["ter"]
        rows = [row for row in comparison["table"] if row["metric"] == "bleu"]
        for row in rows:
            row.update(metric="ter", higher_is_better=False)
            if row["arm"] != "mle":
                row.update(_row(-5 if row["arm"] == "convex-k1" else 5, 0, 0, 0.01))
                row.update(delta_low=row["delta"] - 1, delta_high=row["delta"] + 1)
        comparison["table"] = rows

    change(report_copy, edit)
    assert headline(read_run(report_copy))[0] == "convex-k1 beats mle with every search: −5.00 TER (greedy search)"


def test_two_metrics_that_disagree_are_named(report_copy: Path, tmp_path: Path) -> None:
    def edit(comparison: dict[str, Any]) -> None:
        for row in comparison["table"]:
            if row["arm"] == "convex-k3" and row["metric"] == "chrf" and row["search"] == "greedy":
                row.update(_row(-7, -8, -6, 0.001))

    change(report_copy, edit)
    said = headline(read_run(report_copy))[1]
    assert [text for text in said if "disagrees" in text] == [
        "chrF disagrees: by it convex-k3 with greedy search is behind mle, −7.00 (95 % interval −8.00 to −6.00)."
    ]


def test_what_only_another_metric_is_sure_of_is_said(report_copy: Path) -> None:
    def edit(comparison: dict[str, Any]) -> None:
        for row in comparison["table"]:
            if row["arm"] != "mle" and row["search"] == "greedy":
                sure = row["arm"] == "convex-k1" and row["metric"] == "chrf"
                row.update(_row(0.83, 0.53, 1.14, 0.01) if sure else _row(0.1, -1, 1, 0.8))
        comparison["searches"] = ["greedy"]
        comparison["table"] = [row for row in comparison["table"] if row["search"] == "greedy"]

    change(report_copy, edit)
    title, said = headline(read_run(report_copy))
    assert title == "No objective differs from mle in BLEU beyond chance"
    assert "By chrF, with greedy search: convex-k1 (+0.83) surely ahead of mle." in said
