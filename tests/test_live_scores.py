"""The scores that a run tells while it decodes are those it writes at its end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

from convexlm.evaluation import read_scores
from convexlm.live_scores import LiveScores
from test_evaluation import Run

if TYPE_CHECKING:
    from pathlib import Path


def test_live_scores_are_the_means_of_scores_jsonl(tmp_path: Path) -> None:
    run = Run(tmp_path, ("en-de", "en-zh"), seeds=[1])
    run.write({("good", "greedy"): 0.3})
    run.evaluate()
    trained = next(one for one in run.runs if one.arm == "good")
    results = [
        SimpleNamespace(
            test_set="t",
            pair=pair,
            search=search,
            output_file=run.folder.decode(trained, "checkpoint-12", "t", pair, search),
        )
        for pair in ("en-de", "en-zh")
        for search in ("greedy", "beam2")
    ]
    wanted = {}
    for search in ("greedy", "beam2"):
        scores = [
            row["score"]
            for row in read_scores(run.folder)
            if (row["arm"], row["checkpoint"], row["search"], row["metric"])
            == ("good", "checkpoint-12", search, "bleu")
        ]
        assert len(scores) == 2
        wanted[search] = sum(scores) / 2
    live = LiveScores(run.test_sets, "bleu")
    assert live.said(results) == f"bleu {wanted['greedy']:.2f} greedy, {wanted['beam2']:.2f} beam2"
    assert LiveScores([], "bleu").said(results) == ""
