from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING

import pytest

from convexlm.report.data import read_run
from convexlm.report.findings import headline, main_table
from convexlm.report.svg import spread, ticks
from convexlm.report.text import delta_text, script_json, visible
from convexlm.scoring import METRICS
from convexlm.tables import TITLES, signed
from report_helpers import make_run

if TYPE_CHECKING:
    from pathlib import Path


def test_script_json_and_visible() -> None:
    value = {"a": "</script>&\u2028\ud800\x00", "b": [math.nan, 1.5, None]}
    text = script_json(value)
    assert not re.search("[<>&\u2028\ud800\x00]", text)
    assert json.loads(text) == value | {"b": [None, 1.5, None]}
    assert visible("a\u202eb\x00c\ud800") == "a⟨U+202E⟩b⟨U+0000⟩c⟨U+D800⟩"
    assert visible("plain 中文\n\ttext 🙂") == "plain 中文\n\ttext 🙂"


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == [0.0, 0.5, 1.0]
    assert ticks(-0.3, 0.3) == pytest.approx([-0.2, 0.0, 0.2])
    for low, high in ((3.1, 97.2), (-1e-4, 2e-4), (1e6, 3e6)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 6
        assert all(low <= mark <= high * (1 + 1e-9) for mark in found)
    assert ticks(2, 2) == [2]


def test_labels_keep_apart() -> None:
    placed = spread([10, 10, 11, 90], 12, 0, 100)
    ordered = sorted(placed)
    assert all(b - a >= 12 for a, b in zip(ordered, ordered[1:], strict=False))
    assert all(0 <= value <= 100 for value in spread([100, 100, 100], 12, 0, 100))


def test_a_difference_that_rounds_to_nothing_has_no_sign() -> None:
    assert delta_text(-0.001, "bleu") == delta_text(0.0, "bleu") == "0.00"
    assert delta_text(-0.01, "bleu") == "−0.01"
    assert delta_text(0.633, "mode_share") == "+63.3"
    assert delta_text(None, "bleu") == delta_text(math.nan, "bleu") == "–"
    assert signed(-0.004) == signed(0.0) == "0.00" and signed(-0.004, 4) == "-0.0040"
    assert [signed(x) for x in (-0.005001, 0.3, -math.inf)] == ["-0.01", "+0.30", "-inf"]


def test_every_metric_has_one_title_in_the_terminal_and_in_the_report() -> None:
    ours = ("bleu", "chrf", "chrf++", "ter", "rouge1", "rouge2", "rougeLsum")
    assert [TITLES[name] for name in ours] == [METRICS[name].title for name in ours]


def test_the_gap_of_the_baseline_may_be_the_least(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", size=6, seeds=(1,), n_samples=5))
    for gap in run.comparison["gaps"]:
        gap["delta"] = {"mle": 0.5, "convex-k1": 3.0, "convex-k3": -2.0}[gap["arm"]]
    said = headline(run)[1]
    assert "beam5 adds +0.50 BLEU to greedy search for mle, of the others least for convex-k3: −2.00." in said


def test_of_equal_scores_none_is_the_best(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", size=6, seeds=(1,), n_samples=5))
    for row in run.comparison["table"]:
        row["score"] = {"mle": 20.0, "convex-k1": 30.0, "convex-k3": 30.0}[row["arm"]]
        if row["search"] == "beam5" and row["arm"] == "mle":
            row["score"] = 40.0
    best = {row["search"]: row["arm"] for group in main_table(run) for row in group["rows"] if row["best"]}
    assert best == {"beam5": "mle"}
