"""The evidence's tools: noise that does what it says, choosing on validation, rows that carry their settings."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "evidence"))

import adopt as adopt_module  # noqa: E402
import figure  # noqa: E402
import figure_kinds  # noqa: E402
import filter_data  # noqa: E402
import intervals  # noqa: E402
import judge_ambiguity  # noqa: E402
import make_ambiguity  # noqa: E402
import make_data  # noqa: E402
import noise  # noqa: E402
import rows as rows_module  # noqa: E402
import run as run_module  # noqa: E402

PAIRS = [(f"a source {number}", f"ein Ziel {number} mit mehr Wörtern") for number in range(200)]


@pytest.mark.parametrize("kind", sorted(noise.KINDS))
def test_noise_spoils_the_share_and_marks_it(kind: str) -> None:
    spoilt = noise.spoil(PAIRS, kind, 0.3, seed=1)
    assert [source for source, _, _ in spoilt] == [source for source, _ in PAIRS]
    for (_, target), (_, new, clean) in zip(PAIRS, spoilt, strict=True):
        assert clean == (new == target)
    dirty = sum(not clean for _, _, clean in spoilt)
    assert dirty == 60 if kind != "shuffled" else 55 <= dirty <= 60  # a shuffle may give the old order
    assert noise.spoil(PAIRS, kind, 0.3, seed=1) == spoilt
    assert noise.spoil(PAIRS, kind, 0.3, seed=2) != spoilt


def test_no_noise_changes_nothing() -> None:
    assert noise.spoil(PAIRS, "exchanged", 0.0, seed=1) == [(*pair, True) for pair in PAIRS]


def test_exchanged_targets_are_passed_around() -> None:
    spoilt = noise.spoil(PAIRS, "exchanged", 0.5, seed=3)
    assert Counter(target for _, target, _ in spoilt) == Counter(target for _, target in PAIRS)


def test_a_target_that_comes_back_equal_counts_as_clean() -> None:
    spoilt = noise.spoil([("one", "gleich"), ("two", "gleich")], "exchanged", 1.0, seed=1)
    assert [clean for _, _, clean in spoilt] == [True, True]


def test_what_each_kind_makes() -> None:
    pairs, random = [("the source", "eins zwei drei vier"), ("other", "fünf sechs")], Random(0)
    assert noise.copied(pairs, random) == ["the source", "other"]
    assert noise.wrong_language(pairs, random) == ["other", "the source"]
    for (_, target), cut in zip(pairs, noise.truncated(pairs, random), strict=True):
        assert target.startswith(cut) and 0 < len(cut) < len(target)
    for (_, target), mixed in zip(pairs, noise.shuffled(pairs, random), strict=True):
        assert sorted(mixed.split(" ")) == sorted(target.split(" "))


def test_off_topic_takes_sentences_of_another_text() -> None:
    other = ["Die Börse schloss im Plus.", "Es regnet.", " ".join(["lang"] * 26), "", "Es regnet."]
    spoilt = noise.spoil(PAIRS, "off_topic", 0.05, seed=1, other=other)
    drawn = Counter(target for _, target, clean in spoilt if not clean)
    assert drawn == {"Die Börse schloss im Plus.": 5, "Es regnet.": 5}  # evenly, and none that is too long
    assert noise.spoil(PAIRS, "off_topic", 0.05, seed=1, other=other) == spoilt
    with pytest.raises(ValueError, match="needs sentences of another text"):
        noise.spoil(PAIRS, "off_topic", 0.05, seed=1)


def test_filtered_files_and_how_much_they_drop() -> None:
    arms = {
        "mle": {"objective": "mle"},
        "oracle-mle": {"dataset": "${data_dir}/train.clean.jsonl"},
        "filter-mle": {"dataset": "${data_dir}/train.filter.jsonl"},
        "filter-65-mle": {"dataset": "${data_dir}/train.filter-65.jsonl"},
        "filter-65-convex": {"dataset": "${data_dir}/train.filter-65.jsonl"},
    }
    assert run_module.filtered_files(arms, 0.3) == {"train.filter.jsonl": 0.3, "train.filter-65.jsonl": 0.65}


def test_noise_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="unknown noise"):
        noise.spoil(PAIRS, "typos", 0.1, seed=1)
    with pytest.raises(ValueError, match="from 0 to 1"):
        noise.spoil(PAIRS, "copied", 30, seed=1)


def test_filter_drops_the_least_likely() -> None:
    rows = [{"n": number, "clean": number >= 3} for number in range(10)]
    kept, about = filter_data.keep_likely(rows, np.array([0.0, 1, 9, 2, 3, 4, 5, 6, 7, 8]), 0.3)
    assert [row["n"] for row in kept] == [2, 4, 5, 6, 7, 8, 9]
    assert about["precision"] == pytest.approx(2 / 3) and about["recall"] == pytest.approx(2 / 3)
    # Of 7 x 3 couples (clean, spoilt), those with the clean one above: all but 7 with the likely spoilt one.
    assert about["auc"] == pytest.approx(14 / 21)


def test_auc_counts_ties_half() -> None:
    assert filter_data.auc(np.array([1.0, 2.0]), np.array([1.0])) == 0.75


def test_the_chosen_is_the_best_on_validation_and_of_equals_the_first() -> None:
    def row(arm: str, checkpoint: str, score: float, metric: str = "bleu") -> dict:
        return {"arm": arm, "checkpoint": checkpoint, "score": score, "metric": metric}

    chosen = run_module.choose(
        [
            row("mle.lr0.001", "checkpoint-1", 10.0),
            row("mle.lr0.001", "checkpoint-1", 90.0, "chrf"),
            row("mle.lr0.0003", "checkpoint-1", 12.0),
            row("mle.lr0.0003", "checkpoint-2", 12.0),
            row("convex-k1.lr1e-05", "checkpoint-2", 3.0),
        ]
    )
    assert chosen["mle"] == {"learning_rate": 3e-4, "checkpoint": "checkpoint-1", "score": 12.0}
    assert chosen["convex-k1"]["learning_rate"] == 1e-5


def test_the_made_recipes_are_recipes(tmp_path: Path) -> None:
    from convexlm.recipe import load_recipe

    recipe = run_module.RECIPES / "arms.yaml"
    arms = yaml.safe_load(recipe.read_text(encoding="utf-8"))["arms"]
    variables = {"data_dir": "DATA", "pair": "de-en", "base": "BASE"}
    run_module.write_yaml(tmp_path / "tune.yaml", run_module.tune_recipe(recipe, arms, [3e-4, 1e-3], variables))
    tune = load_recipe(tmp_path / "tune.yaml")
    assert len(tune.arms) == 2 * len(arms) and tune.arm("mle.lr0.001").train["learning_rate"] == 1e-3
    assert [one["name"] for one in tune.test_sets] == ["val500"] and tune.selection["on"] == "last"
    chosen = {arm: {"learning_rate": 0.5} for arm in arms}
    run_module.write_yaml(tmp_path / "final.yaml", run_module.final_recipe(recipe, arms, chosen, 7, variables))
    final = load_recipe(tmp_path / "final.yaml")
    assert final.seeds == (7,) and {arm.train["learning_rate"] for arm in final.arms} == {0.5}
    assert final.selection["on"] == "validation" and len(final.test_sets) == 3
    assert final.model["model_name_or_path"] == "BASE" and not final.model["config"]
    assert len({arm.train["max_steps"] for arm in final.arms}) == 1  # arms of equal steps


def test_what_was_tuned_counts_as_trained_in_the_final_run(tmp_path: Path) -> None:
    from convexlm.pipeline import train_options
    from convexlm.recipe import load_recipe
    from convexlm.runs import RunFolder, trained_runs
    from convexlm.training_identity import InputHashes, options_sha256

    recipe, arms = run_module.RECIPES / "arms.yaml", {"mle": {"objective": "mle"}}
    variables = {"data_dir": str(tmp_path / "DATA"), "pair": "de-en", "base": "BASE"}
    run_module.write_yaml(tmp_path / "tune.yaml", run_module.tune_recipe(recipe, arms, [3e-4, 1e-3], variables))
    for rate in ("0.0003", "0.001"):
        trained = tmp_path / "tune" / "train" / f"mle.lr{rate}"
        (trained / "checkpoint-110").mkdir(parents=True)
        (trained / "done.json").write_text(json.dumps({"identity": "theirs", "seconds": float(rate)}))
    chosen = {"mle": {"learning_rate": 1e-3}}
    final, run_dir = tmp_path / "final.yaml", tmp_path / "final"
    run_module.write_yaml(final, run_module.final_recipe(recipe, arms, chosen, 1, variables))
    assert adopt_module.adopt(final, run_dir, tmp_path / "tune", {"mle": 1e-3}) == ["mle"]
    assert (run_dir / "train" / "mle" / "checkpoint-110").is_dir()
    done = json.loads((run_dir / "train" / "mle" / "done.json").read_text())
    made, folder = load_recipe(final), RunFolder(run_dir)
    (run,) = trained_runs(made)
    assert done == {
        "seconds": 0.001,
        "identity": options_sha256(train_options(made, folder, run), folder, InputHashes()),
    }
    assert adopt_module.adopt(final, run_dir, tmp_path / "tune", {"mle": 1e-3}) == []
    other = {"mle": {"objective": "mle", "weight_decay": 0.5}}
    run_module.write_yaml(final, run_module.final_recipe(recipe, other, chosen, 1, variables))
    with pytest.raises(ValueError, match="tune/mle.lr0.001 was trained with another weight_decay"):
        adopt_module.adopt(final, tmp_path / "other", tmp_path / "tune", {"mle": 1e-3})


def test_rows_carry_their_settings(tmp_path: Path) -> None:
    run = tmp_path / "final-seed2"
    recipe = {"seeds": [2], "train": {"learning_rate": 1e-3}, "versions": {"torch": "2"}}
    recipe["arms"] = {"convex-k1": {"objective": "convex", "k": 1.0, "learning_rate": 3e-4}}
    score = {"arm": "convex-k1", "seed": 2, "test_set": "t", "pair": "en-de", "search": "greedy", "metric": "bleu"}
    score |= {"score": 12.5, "signature": "s", "num_sentences": 3, "role": "test", "checkpoint": "checkpoint-20"}
    (run / "train" / "convex-k1").mkdir(parents=True)
    (run / "train" / "convex-k1" / "done.json").write_text('{"seconds": 90}')
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run / "comparison.json").write_text('{"checkpoints": {"convex-k1": "checkpoint-20"}}')
    (run / "scores.jsonl").write_text(json.dumps(score) + "\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.json").write_text('{"noise": "exchanged", "share": 0.3}')
    (row,) = rows_module.collect(tmp_path, "x")
    assert row["learning_rate"] == 3e-4 and row["step"] == 20 and row["minutes"] == 1.5 and row["selected"]
    assert row["objective"] == "convex" and row["k"] == 1.0 and row["role"] == "test" and row["noise_share"] == 0.3
    for score in (11.0, 13.0):  # the second in place of the first
        rows_module.replace_experiment(tmp_path / "all.jsonl", "x", [row | {"score": score}])
    rows_module.replace_experiment(tmp_path / "all.jsonl", "y", [row | {"experiment": "y"}])
    kept = rows_module.read_jsonl(tmp_path / "all.jsonl")
    assert [(one["experiment"], one["score"]) for one in kept] == [("x", 13.0), ("y", 12.5)]
    assert "versions" not in kept[0] and kept[1].items() <= (row | {"experiment": "y"}).items()
    versions = json.loads((tmp_path / "all-versions.json").read_text(encoding="utf-8"))
    assert versions == {"x": [{"torch": "2"}], "y": [{"torch": "2"}]}
    found = figure.points([row, row | {"test_set": "u", "score": 13.5}], "x", "bleu")
    assert found == {("convex-k1", "greedy"): [13.0]}
    assert figure.draw(found, "a title", "BLEU").startswith("<svg xmlns=")


def test_student_interval_of_three() -> None:
    low, high = intervals.student_interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2.0)
    assert (high - low) / 2 == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert intervals.student_interval([1.0]) is None


def test_data_of_multi30k(shared_data: Path, tmp_path: Path) -> None:
    about = make_data.make(shared_data / "multi30k", tmp_path / "d", "de-en", "exchanged", 0.5, 1, 600)
    assert about["records"] == 29000 and 14500 <= about["clean"] < 14520
    first = json.loads((tmp_path / "d" / "train.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert set(first) == {"instruction", "input", "output", "clean"}
    assert first["instruction"] == "Translate the following sentences from German to English."
    assert len((tmp_path / "d" / "val500.de").read_text(encoding="utf-8").split("\n")) == 501


def test_joined_pairs_are_all_there_in_order_and_of_unequal_length() -> None:
    pairs = [(f"s{n}", f"t{n}") for n in range(100)]
    joined = make_data.join_up(pairs, 4, 1)
    assert [word for source, _ in joined for word in source.split()] == [source for source, _ in pairs]
    assert [word for _, target in joined for word in target.split()] == [target for _, target in pairs]
    assert {len(source.split()) for source, _ in joined} == {1, 2, 3, 4}
    assert all(source.replace("s", "t") == target for source, target in joined)
    assert make_data.join_up(pairs, 1, 1) == pairs


def test_ambiguity_has_one_best_translation_and_even_others() -> None:
    from convexlm.tinyworld.corpus import sample_corpus
    from convexlm.tinyworld.grammar import translations

    pairs, before = sample_corpus("en-de", 8, 5), [0] * 8
    for choices in range(5):
        for number, pair in enumerate(pairs):
            found = make_ambiguity.distribution(pair, choices)
            valid = translations(pair.source, "en-de")
            plain, *free = found
            assert set(found) <= set(valid)  # the grammar's own words and order
            assert sum(found.values()) == pytest.approx(1.0) and found[plain] == 0.4
            assert plain == next(iter(valid))
            assert [found[text] for text in free] == pytest.approx([0.6 / len(free)] * len(free))
            assert len(free) == 1 if choices == 0 else len(free) >= before[number]
            before[number] = len(free)
    assert max(before) >= 16


def test_judging_ambiguity() -> None:
    truths = [{"a": 0.4, "b": 0.6}, {"a": 0.4, "b": 0.3, "c": 0.3}, {"a": 1.0}, {"a": 1.0}]
    found = judge_ambiguity.measure(["b", "b", "", "a"], truths)
    assert found == {"mode_share": 50.0, "valid_share": 75.0, "mean_probability": pytest.approx(100 * 1.9 / 4)}
    with pytest.raises(ValueError):
        judge_ambiguity.measure(["b"], truths)


def test_parts_by_length_share_out_the_sentences() -> None:
    from convexlm.significance import Corpus

    references = [[" ".join("w" * n) for n in (3, 9, 5, 7, 5)]]
    corpus = Corpus("t, final-seed1", "de", {"a": list("abcde"), "b": list("vwxyz")}, references, group="t")
    parts = intervals.by_length([corpus])
    (short,), (long,) = parts["short"], parts["long"]
    assert short.systems == {"a": ["a", "c", "e"], "b": ["v", "x", "z"]} and long.systems["b"] == ["w", "y"]
    assert [len(text.split()) for text in short.references[0]] == [3, 5, 5]
    assert [len(text.split()) for text in long.references[0]] == [9, 7]
    assert short.group == long.group == "t" and short.name == corpus.name


def test_parts_by_confidence_are_thirds_by_a_model_s_own_log_probabilities(tmp_path: Path) -> None:
    from convexlm.significance import Corpus

    values = [-0.5, -3.0, -1.0, -0.1, -2.0, -0.7, -0.6]
    lines = [json.dumps({"id": str(n), "mean_log_prob": value}) for n, value in enumerate(values)]
    (tmp_path / "t.en-de.greedy.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    corpora = [
        Corpus(f"t en-de, final-seed{seed}", "de", {"a": list("abcdefg")}, [list("ABCDEFG")], group="t en-de")
        for seed in (1, 2)
    ]
    parts = intervals.by_confidence(corpora, tmp_path)
    assert [part[0].systems["a"] for part in parts.values()] == [["b", "c", "e"], ["f", "g"], ["a", "d"]]
    assert list(parts) == ["unsure", "between", "sure"] and parts["sure"][1].references == [["A", "D"]]


def test_arms_that_not_every_seed_has_are_read_of_those_that_have_them(tmp_path: Path) -> None:
    for seed, arms in ((1, ["mle", "convex", "oracle"]), (2, ["mle", "convex"])):
        run = tmp_path / f"final-seed{seed}"
        for arm in arms:
            made = run / "decode" / arm / "checkpoint-2"
            made.mkdir(parents=True)
            (made / "toy.en-de.greedy.jsonl").write_text(json.dumps({"id": "0", "hypothesis": f"{arm} {seed}"}) + "\n")
        comparison = {"arms": arms, "searches": ["greedy"], "checkpoints": dict.fromkeys(arms, "checkpoint-2")}
        (run / "comparison.json").write_text(json.dumps(comparison))
        (run / "recipe.yaml").write_text(json.dumps({"test_sets": [{"name": "toy", "pairs": ["en-de"]}]}))
        (run / "data").mkdir()
        line = {"test_set": "toy", "pair": "en-de", "references": [["eins"]]}
        (run / "data" / "references.jsonl").write_text(json.dumps(line) + "\n")
    both = intervals.read_corpora(tmp_path, ["mle", "convex"])
    assert [corpus.name for corpus in both] == ["toy en-de, final-seed1", "toy en-de, final-seed2"]
    assert both[0].systems == {"mle greedy": ["mle 1"], "convex greedy": ["convex 1"]}
    (alone,) = intervals.read_corpora(tmp_path, ["mle", "oracle"])
    assert alone.systems == {"mle greedy": ["mle 1"], "oracle greedy": ["oracle 1"]}
    assert intervals.read_corpora(tmp_path, ["dft"]) == []


def test_greedy_search_in_a_distribution() -> None:
    rows = [[1, 2, 9], [3, 4, 9], [3, 5, 9], [3, 9]]
    assert judge_ambiguity.greedy(rows, [0.4, 0.25, 0.2, 0.15]) == 1  # 3 begins 0.6 of the mass
    assert judge_ambiguity.greedy(rows, [0.5, 0.2, 0.2, 0.1]) in (0, 1)
    assert judge_ambiguity.greedy(rows, [0.6, 0.2, 0.1, 0.1]) == 0


def test_what_theory_predicts_of_greedy_search() -> None:
    class Words:
        eos_token_id = 0

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [sum(map(ord, word)) for word in text.split()]

    def share(free: int, objective: str, k: float | None) -> float:
        """One plain translation with 0.4 and so many free ones, all of ten tokens."""
        tail = "x x x x x x x"
        truth = {f"plain {tail} y": 0.4} | {f"free {tail} z{number}" + "": 0.6 / free for number in range(free)}
        return judge_ambiguity.predicted_mode_share([truth], Words(), objective, k)

    # In the optimum the n free ones have n (0.6 / n)^b against 0.4^b, b = 1 / (1 - k / 10).
    assert share(1, "convex", 3.0) == 100.0  # the free one is the mode
    b = 1 / (1 - 3 / 10)
    turn = 0.6 ** (b / (b - 1)) * 0.4 ** (-b / (b - 1))  # n from which the plain one begins with more
    assert 3 < turn < 5
    assert share(3, "convex", 3.0) == 0.0 and share(5, "convex", 3.0) == 100.0
    assert share(5, "mle", None) == 0.0


def test_arms_that_wait_for_another_are_not_trained_beside_it(tmp_path: Path) -> None:
    import side_by_side

    recipe = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text(encoding="utf-8"))
    assert any("init_from" in arm for arm in recipe["arms"].values())
    with pytest.raises(ValueError, match="starts from another arm"):
        side_by_side.train_side_by_side(
            [(ROOT / "recipes" / "demo.yaml", tmp_path / "run")], [], 2, tmp_path / "log.txt"
        )
    assert not (tmp_path / "run").exists()


def test_the_figure_of_kinds_shows_each_in_the_order_of_its_ranks() -> None:
    def row(kind: str, arm: str, search: str, delta: float) -> dict[str, Any]:
        ends = {"delta": delta, "delta_low": delta - 0.1, "delta_high": delta + 0.1}
        names = {"system": f"{arm} {search}", "baseline": f"mle {search}"}
        return {"experiment": f"multi30k-en-de-{kind}-50", "metric": "bleu", "part": "all", **names, **ends}

    rows = [
        row(kind, arm, search, delta)
        for kind in ("truncated", "exchanged")
        for arm, delta in (("convex-k1", 1.5), ("oracle-mle", 3.0))
        for search in ("greedy", "beam5")
    ]
    rows += [row("exchanged", "filter-65-mle", "greedy", 2.0)]
    rows[-1]["experiment"] = "multi30k-en-de-exchanged-50-filter"
    ranks = {"multi30k-en-de-truncated-50": 0.33, "multi30k-en-de-exchanged-50": 0.73}
    svg = figure_kinds.draw(rows, ranks, "en-de", 50)
    assert svg.startswith("<svg xmlns=") and svg.index("other source") < svg.index("truncated")
    assert "ranks right above wrong: 73 %" in svg and svg.count("+1.50") == 4 and svg.count("+2.00") == 1
    assert "copied source" not in svg  # not measured
