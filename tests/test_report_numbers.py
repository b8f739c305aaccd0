"""The report's numbers are those of the run folder's files, the same at every place of the page."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from convexlm.errors import UserError
from convexlm.report import write_report
from convexlm.report.data import read_run
from convexlm.report.figures import cost_figures
from convexlm.report.text import score_text
from report_helpers import make_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numbers") / "run"
    return make_run(folder, size=6, seeds=(1,), arms=("mle", "convex-k1"), steps=(100,), n_samples=4)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def change(path: Path, how: Callable[[dict[str, Any]], None]) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        how(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_scores_that_were_not_compared_are_not_shown_beside_a_comparison(copy: Path) -> None:
    change(copy / "scores.jsonl", lambda row: row.update(score=row["score"] + 1))
    with pytest.raises(UserError, match=r"not the scores that comparison\.json compares"):
        write_report(copy)
    # Without a hash, as earlier versions wrote it, and with scores that were imported since, there is a report.
    comparison = json.loads((copy / "comparison.json").read_text(encoding="utf-8"))
    del comparison["scores_sha256"]
    (copy / "comparison.json").write_text(json.dumps(comparison))
    assert write_report(copy).is_file()


def test_a_row_that_lacks_something_is_named(copy: Path) -> None:
    kept = (copy / "comparison.json").read_text(encoding="utf-8")
    comparison = json.loads(kept)
    del comparison["table"][1]["score"]
    (copy / "comparison.json").write_text(json.dumps(comparison))
    with pytest.raises(UserError, match=r"comparison\.json: a row has no `score`"):
        write_report(copy)
    (copy / "comparison.json").write_text(kept)
    change(copy / "scores.jsonl", lambda row: row.pop("arm"))
    with pytest.raises(UserError, match=r"scores\.jsonl, record 1: has no `arm`"):
        write_report(copy)


def test_what_a_sentence_costs_is_the_same_in_the_figure_and_in_the_table(copy: Path) -> None:
    def uneven(row: dict[str, Any]) -> None:
        german = row["pair"] == "en-de"
        row["decoding"] = {"seconds": 1.0 if row["search"] == "greedy" else 4.0}
        row["num_sentences"] = 1 if german else 9

    change(copy / "scores.jsonl", uneven)
    comparison = json.loads((copy / "comparison.json").read_text(encoding="utf-8"))
    comparison.pop("scores_sha256")
    (copy / "comparison.json").write_text(json.dumps(comparison))
    (figure,) = cost_figures(read_run(copy))
    # Two seconds and eight for ten sentences; the widest x is 1.08 times the dearer one's.
    xs = {float(x) for x in re.findall(r'<circle cx="([\d.]+)"', figure.svg)}
    left, right = 42.0, 340.0 - 84.0
    assert xs == {round(left + cost / (0.8 * 1.08) * (right - left), 1) for cost in (0.2, 0.8)}


def test_comet_keeps_the_digits_that_tell_systems_apart() -> None:
    assert score_text(0.84123, "comet") == "0.8412" and score_text(27.5678, "bleu") == "27.57"


def test_a_page_of_a_random_part_does_not_say_that_it_holds_the_largest_differences(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convexlm.report.sentences.MAX_SCORED", 8)
    text = write_report(made, tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.search(r"of 12 sentences are on this page</b>: a random sample\. All are", text)
    assert "differs most" not in text
