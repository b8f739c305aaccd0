"""Scores and comparisons of a run folder whose hypotheses the test wrote itself."""

from __future__ import annotations

import json
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import sacrebleu

from convexlm.descriptions import repeats
from convexlm.errors import UserError
from convexlm.evaluation import evaluate, read_scores
from convexlm.recipe import load_recipe
from convexlm.runs import RunFolder, TrainedRun, trained_runs
from convexlm.sweep import decoded_checkpoints, select_checkpoints
from convexlm.testsets import TestSet
from pipeline_helpers import recipe_with, snapshot, write_recipe

if TYPE_CHECKING:
    from pathlib import Path

WORDS = ["der", "kleine", "Hund", "sieht", "das", "rote", "Haus", "meine", "alte", "Katze", "am", "grünen", "Baum"]
CHINESE = "一只小狗看见了红色的房子和我的老猫"
SIZE = 24


def sentences(seed: int, pair: str) -> list[str]:
    chance = Random(seed)
    if pair.endswith("zh"):
        return ["".join(chance.choices(CHINESE, k=chance.randint(5, 12))) for _ in range(SIZE)]
    return [" ".join(chance.choices(WORDS, k=chance.randint(5, 12))) for _ in range(SIZE)]


def spoil(lines: list[str], share: float, seed: int) -> list[str]:
    """The lines with a share of them shortened by half."""
    chance = Random(seed)
    return [line[: len(line) // 2] if chance.random() < share else line for line in lines]


class Run:
    """A run folder in which everything up to decoding is done. Quality: `share` of spoiled lines."""

    def __init__(self, home: Path, pairs: tuple[str, ...] = ("en-de",), **changes: Any) -> None:
        home.mkdir(parents=True, exist_ok=True)
        changes.setdefault("test_sets", [{"name": "t", "pairs": list(pairs), "sources": "unused"}])
        changes.setdefault("arms", {"good": {"objective": "convex", "k": 1.0}, "mle": {"objective": "mle"}})
        self.recipe = load_recipe(write_recipe(home, recipe_with(**changes)))
        self.folder = RunFolder(home / "run")
        self.runs = trained_runs(self.recipe)
        self.test_sets = [
            TestSet("t", pair, ["source"] * SIZE, [sentences(0, pair)], [str(n) for n in range(SIZE)])
            for pair in pairs
        ]
        for run in self.runs:
            self.folder.train(run).mkdir(parents=True)
            done = {"identity": "x", "checkpoints": ["checkpoint-3", "checkpoint-12"]}
            (self.folder.train(run) / "done.json").write_text(json.dumps(done))

    def write(self, shares: dict[tuple[str, str], float] | None = None) -> None:
        """Hypotheses for everything; shares by (arm, search), at the last checkpoint."""
        from convexlm.decoding import Search

        for run in self.runs:
            if not self.recipe.arm(run.arm).decode:
                continue
            for checkpoint in decoded_checkpoints(self.recipe, self.folder, run):
                for test_set in self.test_sets:
                    for options in self.recipe.decode["searches"]:
                        search = Search.from_mapping(options).name
                        share = (
                            0.9 if checkpoint.name == "checkpoint-3" else (shares or {}).get((run.arm, search), 0.5)
                        )
                        # Common random numbers: a smaller share spoils a part of what a larger one does.
                        lines = spoil(test_set.references[0], share, run.seed)
                        path = self.folder.decode(run, checkpoint.name, "t", test_set.pair, search)
                        self.write_file(path, lines)

    def write_file(self, path: Path, lines: list[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"id": str(number), "source": "source", "hypothesis": line} for number, line in enumerate(lines)]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        meta = {"cut": 1, "seconds": 2.0, "checkpoint_sha256": "c", "sources_sha256": "s"}
        path.with_suffix(".meta.json").write_text(json.dumps(meta))

    def hypotheses(self, run: TrainedRun, checkpoint: str, pair: str, search: str) -> list[str]:
        text = self.folder.decode(run, checkpoint, "t", pair, search).read_text(encoding="utf-8")
        return [json.loads(line)["hypothesis"] for line in text.split("\n")[:-1]]

    def evaluate(self) -> dict[str, Any]:
        return evaluate(self.recipe, self.folder, self.runs, self.test_sets)


def bleu(lines: list[str], references: list[str], pair: str) -> float:
    tokenize = "zh" if pair.endswith("zh") else "13a"
    return sacrebleu.corpus_bleu(lines, [references], tokenize=tokenize).score


def chrf(lines: list[str], references: list[str]) -> float:
    return sacrebleu.corpus_chrf(lines, [references]).score


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
    assert mine["p_ar"] == pytest.approx(theirs[1]["BLEU"][1].p_value)
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


# -- selection


def validated(home: Path, way: Any = "validation", **changes: Any) -> Run:
    """Three candidates; on validation, `good` is best at 6 and `mle` as good at 3 as at 6."""
    sets = [{"name": "v", "pairs": ["en-de"], "sources": "unused"}] if way != "test" else None
    made = Run(home, selection=way, validation_sets=sets, seeds=[1], **changes)
    made.validation_sets = [  # type: ignore[attr-defined]
        TestSet("v", "en-de", ["other"] * SIZE, [sentences(9, "en-de")], [str(n) for n in range(SIZE)], {})
    ]
    for trained in made.runs:
        done = {"identity": "x", "checkpoints": ["checkpoint-3", "checkpoint-6", "checkpoint-12"]}
        (made.folder.train(trained) / "done.json").write_text(json.dumps(done))
        shares = {"good": (0.9, 0.1, 0.5), "mle": (0.3, 0.3, 0.7)}[trained.arm]
        for step, share in zip((3, 6, 12), shares, strict=True):
            lines = spoil(sentences(9, "en-de"), share, 4)
            path = made.folder.decode(trained, f"checkpoint-{step}", "v", "en-de", "greedy")
            made.write_file(path, lines)
    return made


def write_chosen(run: Run, chosen: dict[str, int]) -> None:
    for name, step in chosen.items():
        for search in ("greedy", "beam2"):
            path = run.folder.path / "decode" / name / f"checkpoint-{step}" / f"t.en-de.{search}.jsonl"
            run.write_file(path, spoil(run.test_sets[0].references[0], 0.4, 2))


def test_validation_chooses_and_the_test_set_is_scored_once(tmp_path: Path) -> None:
    run = validated(tmp_path)
    write_chosen(run, {"good": 6, "mle": 3})  # nothing else is there to be read
    comparison = evaluate(run.recipe, run.folder, run.runs, run.test_sets, run.validation_sets)  # type: ignore[attr-defined]
    chosen = {"good": "checkpoint-6", "mle": "checkpoint-3"}
    assert comparison["selection"] == {"on": "validation", "metric": "bleu", "search": "greedy", "chosen": chosen}
    assert comparison["checkpoints"] == chosen
    kept = json.loads(run.folder.selection.read_text())
    assert kept["chosen"] == chosen
    lines = spoil(sentences(9, "en-de"), 0.1, 4)
    assert kept["scores"]["good"]["checkpoint-6"] == bleu(lines, sentences(9, "en-de"), "en-de")
    rows = read_scores(run.folder)
    assert {(row["arm"], row["checkpoint"]) for row in rows if row["role"] == "test"} == set(chosen.items())
    assert len([row for row in rows if row["role"] == "validation"]) == 2 * 3 * 2
    assert {corpus["test_set"] for corpus in comparison["corpora"]} == {"t"}
    assert {row["role"] for row in comparison["checkpoints_scores"]} == {"validation"}
    before = snapshot(run.folder.path)
    assert evaluate(run.recipe, run.folder, run.runs, run.test_sets, run.validation_sets) == comparison  # type: ignore[attr-defined]
    assert snapshot(run.folder.path) == before


def test_selection_goes_by_the_metric_that_is_less_is_better_too(tmp_path: Path) -> None:
    run = validated(tmp_path, {"on": "validation", "metric": "ter"}, score={"metrics": ["bleu", "ter"]})
    assert select_checkpoints(run.recipe, run.folder, run.runs, run.validation_sets) == {  # type: ignore[attr-defined]
        "good": "checkpoint-6",
        "mle": "checkpoint-3",
    }


def test_selection_on_the_test_set_is_said_aloud(tmp_path: Path) -> None:
    from rich.console import Console

    from convexlm.tables import show_comparison

    run = validated(tmp_path, "test")
    for name in ("good", "mle"):
        for step, share in ((3, 0.5), (6, 0.9), (12, 0.2)):
            for search in ("greedy", "beam2"):
                path = run.folder.path / "decode" / name / f"checkpoint-{step}" / f"t.en-de.{search}.jsonl"
                run.write_file(path, spoil(run.test_sets[0].references[0], share, 2))
    comparison = run.evaluate()
    assert comparison["selection"]["chosen"] == {"good": "checkpoint-12", "mle": "checkpoint-12"}
    console = Console(width=100, record=True, force_terminal=True, color_system="standard")
    show_comparison(comparison, console)
    assert "\x1b[1;31mCheckpoints were selected on the test set itself" in console.export_text(styles=True)


# -- what the outputs are like


def test_outputs_are_described_as_counted_by_hand(tmp_path: Path) -> None:
    run = Run(tmp_path, seeds=[1])
    run.write()
    loop = "das ist ein Haus das ist ein Haus und mehr"
    lines = [loop, "eins zwei drei vier fünf eins zwei drei vier", *["nein " * 8] * 2, *["nein " * 7] * (SIZE - 4)]
    for trained in run.runs:
        run.write_file(run.folder.decode(trained, "checkpoint-12", "t", "en-de", "greedy"), lines)
    comparison = run.evaluate()
    row = next(row for row in comparison["outputs"] if (row["search"], row["arm"]) == ("greedy", "mle"))
    ours, theirs = (sum(len(line.split()) for line in stream) for stream in (lines, run.test_sets[0].references[0]))
    assert row["length_ratio"] == pytest.approx(ours / theirs)
    assert row["repetition_rate"] == 3 / SIZE
    assert row["cut_rate"] == 1 / SIZE and row["seconds_per_sentence"] == 2.0 / SIZE
    assert len(comparison["outputs"]) == 4


def test_characters_repeat_where_there_are_no_blanks() -> None:
    assert repeats("我看见他我看见他。", "zh") and not repeats("我看见他我看见她。", "zh")
    assert not repeats("我看见他我看见他。", "de") and not repeats("", "de")


def test_scores_by_length_are_those_of_the_parts(tmp_path: Path) -> None:
    run = Run(tmp_path, seeds=[1])
    lengths = [1 + index % 8 for index in range(SIZE)]
    run.test_sets[0].sources[:] = [" ".join(["wort"] * length) for length in lengths]
    run.write()
    comparison = run.evaluate()
    rows = [row for row in comparison["by_length"] if (row["search"], row["arm"]) == ("greedy", "mle")]
    assert [(row["shortest"], row["longest"]) for row in rows] == [(1, 2), (3, 4), (5, 6), (7, 8)]
    lines = run.hypotheses(run.runs[1], "checkpoint-12", "en-de", "greedy")
    for row in rows:
        inside = [at for at, length in enumerate(lengths) if row["shortest"] <= length <= row["longest"]]
        references = [run.test_sets[0].references[0][at] for at in inside]
        assert row["score"] == pytest.approx(chrf([lines[at] for at in inside], references))
        assert row["num_sentences"] == len(inside) == SIZE // 4


def test_every_checkpoint_has_an_interval(run: Run) -> None:
    rows = run.comparison["checkpoints_scores"]  # type: ignore[attr-defined]
    assert len(rows) == 2 * 2 * 2 * 2 * 2  # arms, seeds, searches, metrics, checkpoints
    scores = read_scores(run.folder)
    for row in rows:
        keys = ("arm", "seed", "search", "metric", "checkpoint")
        mine = [score["score"] for score in scores if all(score[key] == row[key] for key in keys)]
        assert row["score"] == pytest.approx(sum(mine) / 2)
        assert row["low"] <= row["score"] <= row["high"] and row["low"] < row["high"]


def test_sentences_are_counted_once_for_all_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sacrebleu.metrics import CHRF

    run = Run(tmp_path)
    run.write()
    counted: list[str] = []
    count = CHRF._compute_segment_statistics

    def counting(self: Any, hypothesis: str, reference: Any) -> Any:
        counted.append(hypothesis)
        return count(self, hypothesis, reference)

    monkeypatch.setattr(CHRF, "_compute_segment_statistics", counting)
    run.evaluate()
    texts = {path.read_text() for path in run.folder.path.glob("decode/*/*/*.jsonl")}
    assert len(counted) <= SIZE * len(texts)
