"""Scores and comparisons of a run folder whose hypotheses the test wrote itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from convexlm.errors import UserError
from convexlm.evaluation import read_scores
from convexlm.runs import TrainedRun
from convexlm.significance import holm, paired_test
from convexlm.sweep import decoded_checkpoints
from evaluation_helpers import SIZE, Run, bleu, chrf, sentences
from pipeline_helpers import snapshot

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = Run(tmp_path_factory.mktemp("evaluation"), ("en-de", "en-zh"), compare={"n_samples": 200})
    made.write({("mle", "greedy"): 0.7, ("mle", "beam2"): 0.4, ("good", "greedy"): 0.2, ("good", "beam2"): 0.2})
    made.comparison = made.evaluate()  # type: ignore[attr-defined]
    return made


def test_every_score_is_sacrebleus_on_the_same_lines(run: Run) -> None:
    rows = read_scores(run.folder)
    assert len(rows) == 2 * 2 * 2 * 2 * 2 * 2  # arms, seeds, checkpoints, pairs, searches, metrics
    references = {test_set.pair: test_set.references[0] for test_set in run.test_sets}
    for row in rows:
        trained = next(r for r in run.runs if (r.arm, r.seed) == (row["arm"], row["seed"]))
        lines = run.hypotheses(trained, row["checkpoint"], row["pair"], row["search"])
        if row["metric"] == "bleu":
            assert row["score"] == bleu(lines, references[row["pair"]], row["pair"])
            assert ("tok:zh" in row["signature"]) == (row["pair"] == "en-zh")
        else:
            assert row["score"] == chrf(lines, references[row["pair"]])
        assert row["num_sentences"] == SIZE and row["test_set"] == "t"
        assert row["decoding"] == {"cut": 1, "seconds": 2.0, "checkpoint_sha256": "c", "sources_sha256": "s"}


def test_the_table_holds_means_over_seeds_and_directions_at_the_last_checkpoint(run: Run) -> None:
    comparison = run.comparison  # type: ignore[attr-defined]
    assert set(comparison["checkpoints"].values()) == {"checkpoint-12"}  # not "checkpoint-3", the greater text
    rows = [row for row in read_scores(run.folder) if row["checkpoint"] == "checkpoint-12"]
    assert len(comparison["table"]) == 2 * 2 * 2
    for entry in comparison["table"]:
        keys = ("arm", "search", "metric")
        mine = [row for row in rows if all(row[key] == entry[key] for key in keys)]
        assert len(mine) == 4
        assert entry["score"] == pytest.approx(sum(row["score"] for row in mine) / 4)
        for seed in (1, 2):
            of_seed = [row["score"] for row in mine if row["seed"] == seed]
            assert entry["by_seed"][str(seed)] == pytest.approx(sum(of_seed) / 2)


def test_the_baseline_comes_first_and_the_others_are_held_against_it(run: Run) -> None:
    comparison = run.comparison  # type: ignore[attr-defined]
    assert comparison["arms"] == ["mle", "good"]  # though the recipe names `good` first
    cells = {(row["search"], row["metric"], row["arm"]): row for row in comparison["table"]}
    assert [row["arm"] for row in comparison["table"][:2]] == ["mle", "good"]
    for search in ("greedy", "beam2"):
        for metric in ("bleu", "chrf"):
            mle, good = cells[search, metric, "mle"], cells[search, metric, "good"]
            assert mle["delta"] is None and mle["p_two_sided"] is None
            assert good["delta"] == pytest.approx(good["score"] - mle["score"])
            assert good["delta_low"] <= good["delta"] <= good["delta_high"]
            assert 0 < good["p_two_sided"] <= 1
    assert cells["greedy", "bleu", "good"]["p_two_sided"] < 0.05 < cells["greedy", "bleu", "good"]["delta"]


def test_gaps_say_what_beam_search_gains(run: Run) -> None:
    comparison = run.comparison  # type: ignore[attr-defined]
    cells = {(row["search"], row["metric"], row["arm"]): row["score"] for row in comparison["table"]}
    gaps = {(gap["arm"], gap["metric"]): gap for gap in comparison["gaps"]}
    assert set(gaps) == {(arm, metric) for arm in ("mle", "good") for metric in ("bleu", "chrf")}
    for (arm, metric), gap in gaps.items():
        assert gap["search"] == "beam2"
        assert gap["delta"] == pytest.approx(cells["beam2", metric, arm] - cells["greedy", metric, arm])
    assert gaps["mle", "bleu"]["delta"] > 5 and gaps["mle", "bleu"]["p_two_sided"] < 0.05
    assert gaps["good", "bleu"]["delta"] == 0 and gaps["good", "bleu"]["p_two_sided"] > 0.05
    for metric in ("bleu", "chrf"):
        family = [gaps[arm, metric] for arm in ("mle", "good")]
        assert [gap["p_holm"] for gap in family] == holm([gap["p_two_sided"] for gap in family])


def test_paired_is_sacrebleus_own_test_in_every_direction_and_seed(run: Run) -> None:
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    comparison = run.comparison  # type: ignore[attr-defined]
    settings = comparison["resampling"]
    assert settings == {"n_samples": 200, "seed": 12345}
    keys = {(row["search"], row["pair"], row["seed"], row["metric"]) for row in comparison["paired"]}
    assert len(keys) == 2 * 2 * 2 * 2
    references = run.test_sets[0].references
    systems = [
        (arm, run.hypotheses(TrainedRun(arm, 1, f"{arm}.seed1"), "checkpoint-12", "en-de", "greedy"))
        for arm in ("mle", "good")
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SACREBLEU_SEED", "12345")
        theirs = PairedTest(
            systems, {"BLEU": BLEU(trg_lang="de", references=references)}, None, test_type="bs", n_samples=200
        )()
    expected = theirs[1]["BLEU"][1]
    (mine,) = [
        row
        for row in comparison["paired"]
        if (row["search"], row["pair"], row["seed"], row["metric"]) == ("greedy", "en-de", 1, "bleu") and good_row(row)
    ]
    assert mine["score"] == pytest.approx(expected.score)
    assert mine["p_value"] == pytest.approx(expected.p_value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SACREBLEU_SEED", "12345")
        metric = BLEU(trg_lang="de", references=references)
        theirs = PairedTest(systems, {"BLEU": metric}, None, test_type="ar", n_samples=200)()
    (_, row) = paired_test(dict(systems), references, "de", ["bleu"], method="ar", n_samples=200)
    assert row["p_value"] == pytest.approx(theirs[1]["BLEU"][1].p_value)
    assert mine["p_ar"] == row["p_two_sided"] >= row["p_value"]  # those just as far apart count, too
    assert all(row["p_ar"] is None for row in comparison["paired"] if row["system"] == "mle")


def good_row(row: dict[str, Any]) -> bool:
    return (row.get("arm") or row.get("system")) == "good"


def test_nothing_is_written_when_nothing_changed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write()
    first = run.evaluate()
    before = snapshot(run.folder.path)
    assert run.evaluate() == first == json.loads(run.folder.comparison.read_text())
    assert snapshot(run.folder.path) == before


@pytest.mark.parametrize("what", ["hypothesis", "reference", "metrics", "lost scores", "lost comparison"])
def test_what_changed_is_evaluated_again(tmp_path: Path, what: str) -> None:
    run = Run(tmp_path)
    run.write()
    first = run.evaluate()
    rows = read_scores(run.folder)
    if what == "hypothesis":
        path = run.folder.decode(run.runs[0], "checkpoint-12", "t", "en-de", "greedy")
        run.write_file(path, run.test_sets[0].references[0])
    elif what == "reference":
        run.test_sets[0].references[0][:] = sentences(7, "en-de")
    elif what == "metrics":
        other = Run(tmp_path / "other", score={"metrics": ["chrf++"]})
        other.folder = run.folder
        run = other
    elif what == "lost scores":
        run.folder.scores.unlink()
    else:
        run.folder.comparison.unlink()
    second = run.evaluate()
    if what.startswith("lost"):
        assert second == first and read_scores(run.folder) == rows
    else:
        assert second["inputs"] != first["inputs"] and second["table"] != first["table"]
        assert read_scores(run.folder) != rows
    assert run.evaluate() == second == json.loads(run.folder.comparison.read_text())


@pytest.mark.parametrize("damage", ["{broken", "[]", ""])
def test_a_damaged_comparison_is_made_anew(tmp_path: Path, damage: str) -> None:
    run = Run(tmp_path)
    run.write()
    first = run.evaluate()
    run.folder.comparison.write_text(damage)
    assert run.evaluate() == first == json.loads(run.folder.comparison.read_text())


def test_scores_of_other_inputs_do_not_stay_beside_a_comparison(tmp_path: Path, monkeypatch: Any) -> None:
    """Killed after the scores and before the comparison, then called with what there was at first."""
    run = Run(tmp_path)
    run.write()
    first, rows = run.evaluate(), read_scores(run.folder)
    references = list(run.test_sets[0].references[0])
    run.test_sets[0].references[0][:] = sentences(7, "en-de")
    with monkeypatch.context() as killed:
        killed.setattr("convexlm.evaluation._compare", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.evaluate()
    assert read_scores(run.folder) != rows
    run.test_sets[0].references[0][:] = references
    assert run.evaluate() == first
    assert read_scores(run.folder) == rows


def test_equal_outputs_have_a_p_of_one_in_every_test(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write({(arm, search): 0.5 for arm in ("mle", "good") for search in ("greedy", "beam2")})
    rows = [row for row in run.evaluate()["paired"] if row["system"] == "good"]
    assert rows and all((row["delta"], row["p_two_sided"], row["p_ar"]) == (0.0, 1.0, 1.0) for row in rows)


def test_one_arm_is_scored_without_a_comparison(tmp_path: Path) -> None:
    run = Run(tmp_path, ("en-de", "en-zh"), arms={"only": {"objective": "mle"}})
    run.write({("only", "greedy"): 0.6, ("only", "beam2"): 0.1})
    comparison = run.evaluate()
    assert comparison["arms"] == ["only"] and comparison["baseline"] == "only" and comparison["paired"] == []
    rows = [row for row in read_scores(run.folder) if row["checkpoint"] == "checkpoint-12"]
    for entry in comparison["table"]:
        mine = [r["score"] for r in rows if (r["search"], r["metric"]) == (entry["search"], entry["metric"])]
        assert entry["score"] == pytest.approx(sum(mine) / len(mine)) and entry["delta"] is None
        assert set(entry["by_seed"]) == {"1", "2"}
    assert len(comparison["gaps"]) == 2

    from rich.console import Console

    from convexlm.tables import conclusions, show_comparison

    assert conclusions(comparison) == []
    console = Console(width=120, record=True)
    show_comparison(comparison, console)
    assert "only" in console.export_text()


def test_without_greedy_search_there_is_no_gap(tmp_path: Path) -> None:
    run = Run(tmp_path, decode__searches=[{"num_beams": 2}, {"num_beams": 4}])
    run.write()
    assert run.evaluate()["gaps"] == []


def test_arms_that_are_not_decoded_are_not_scored(tmp_path: Path) -> None:
    arms = {
        "base": {"objective": "mle", "decode": False},
        "mle": {"objective": "mle", "init_from": "base"},
        "dft": {"objective": "dft", "init_from": "base"},
    }
    run = Run(tmp_path, arms=arms, seeds=[4])
    run.write()
    comparison = run.evaluate()
    assert comparison["arms"] == ["mle", "dft"] and comparison["seeds"] == [4]
    assert {row["arm"] for row in read_scores(run.folder)} == {"mle", "dft"}
    assert {row["seed"] for row in read_scores(run.folder)} == {4}


def test_the_baseline_is_the_recipes_choice(tmp_path: Path) -> None:
    run = Run(tmp_path, compare={"n_samples": 20, "baseline": "good"})
    run.write()
    comparison = run.evaluate()
    assert comparison["arms"] == ["good", "mle"] and comparison["baseline"] == "good"


def test_chosen_checkpoints_are_decoded_in_any_order(tmp_path: Path) -> None:
    run = Run(tmp_path, decode__checkpoints=[12, 3])
    run.write()
    assert set(run.evaluate()["checkpoints"].values()) == {"checkpoint-12"}
    assert [row["checkpoint"] for row in read_scores(run.folder)][0] == "checkpoint-12"
    wrong = Run(tmp_path / "wrong", decode__checkpoints=[5])
    with pytest.raises(UserError, match=r"mle\.seed1 has no checkpoint-5; it has: checkpoint-3, checkpoint-12"):
        decoded_checkpoints(wrong.recipe, wrong.folder, wrong.runs[1])


def test_a_decode_file_that_is_missing_or_short_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write()
    path = run.folder.decode(run.runs[0], "checkpoint-12", "t", "en-de", "greedy")
    run.write_file(path, run.test_sets[0].references[0][:-1])
    with pytest.raises(UserError, match="23"):
        run.evaluate()
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        run.evaluate()
    assert not run.folder.comparison.exists() and not run.folder.scores.exists()


def test_every_checkpoint_has_an_interval(run: Run) -> None:
    rows = run.comparison["checkpoints_scores"]  # type: ignore[attr-defined]
    assert len(rows) == 2 * 2 * 2 * 2 * 2  # arms, seeds, searches, metrics, checkpoints
    scores = read_scores(run.folder)
    for row in rows:
        keys = ("arm", "seed", "search", "metric", "checkpoint")
        mine = [score["score"] for score in scores if all(score[key] == row[key] for key in keys)]
        assert row["score"] == pytest.approx(sum(mine) / 2)
        assert row["low"] <= row["score"] <= row["high"] and row["low"] < row["high"]
