"""Which checkpoint is scored, chosen on what; and what the outputs are like."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from convexlm.descriptions import repeats
from convexlm.evaluation import evaluate, read_scores
from convexlm.sweep import select_checkpoints
from convexlm.testsets import TestSet
from evaluation_helpers import SIZE, Run, bleu, chrf, sentences, spoil
from pipeline_helpers import snapshot

if TYPE_CHECKING:
    from pathlib import Path


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
