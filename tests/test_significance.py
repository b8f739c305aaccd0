"""The paired tests give sacreBLEU's numbers where it has them, and known ones where it has not."""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from sacrebleu.significance import PairedTest

from convexlm import resampling
from convexlm.errors import UserError
from convexlm.significance import Corpus, holm, is_sure, joint_test, mean_difference_test, paired_test

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "house", "red", "blue", "big", "small", "was"]


def corpus_of(size=60, seed=1, damages=(0.30, 0.22, 0.28)):
    """A reference and systems that have a share of its words wrong."""
    rng = random.Random(seed)
    reference = [rng.choices(WORDS, k=rng.randint(5, 14)) for _ in range(size)]

    def spoil(share):
        return [
            " ".join(rng.choice(WORDS) if rng.random() < share else word for word in line) + "." for line in reference
        ]

    names = ("mle", "convex", "other")
    return [" ".join(line) + "." for line in reference], dict(zip(names, map(spoil, damages), strict=False))


REFERENCE, SYSTEMS = corpus_of()


def sacrebleu_s_own(monkeypatch, systems, reference, method, n_samples, seed, metrics):
    monkeypatch.setenv("SACREBLEU_SEED", str(seed))
    built = {"bleu": sacrebleu.BLEU, "chrf": sacrebleu.CHRF, "ter": sacrebleu.TER}
    metrics = {name: built[name](references=[reference]) for name in metrics}
    return PairedTest(
        list(systems.items()), metrics, None, test_type=method, n_samples=n_samples, n_ar_confidence=-1
    )()


@pytest.mark.parametrize("method", ["bs", "ar"])
@pytest.mark.parametrize("seed", [1, 12345])
def test_results_are_those_of_paired_test(monkeypatch, method, seed):
    names = ["bleu", "chrf", "ter"]
    rows = paired_test(SYSTEMS, [REFERENCE], "en", names, method=method, n_samples=300, seed=seed)
    signatures, results = sacrebleu_s_own(monkeypatch, SYSTEMS, REFERENCE, method, 300, seed, names)
    assert [(row["metric"], row["system"]) for row in rows] == [(name, key) for name in names for key in SYSTEMS]
    for name, title in zip(names, ["BLEU", "chrF2", "TER"], strict=True):
        for row, result in zip([row for row in rows if row["metric"] == name], results[title], strict=True):
            assert row["score"] == result.score
            assert row["p_value"] == result.p_value
            assert f"{method}:300|" in row["signature"]
            assert f"seed:{seed}|" in row["signature"]
            if method == "bs":
                assert (row["mean"], row["ci"]) == (result.mean, result.ci)
                assert row["signature"] == str(signatures[title])
            assert row["low"] < row["mean"] < row["high"]
            assert (row["delta"] is None) == (row["system"] == "mle")
            if row["delta"] is not None:
                assert row["delta"] == result.score - results[title][0].score
                assert row["delta_low"] < row["delta"] < row["delta_high"]


def test_results_are_those_of_the_sacrebleu_command(shared_data):
    folder = shared_data / "wmt22_systems"
    names = ["OpenNMT", "PROMT", "Online-W"]
    files = {name: folder / f"generaltest2022.en-de.hyp.{name}.de" for name in names}
    reference = folder / "generaltest2022.en-de.ref.A.de"
    command = [Path(sys.executable).with_name("sacrebleu"), reference, "-i", *files.values(), "-m", "bleu"]
    environment = {key: value for key, value in os.environ.items() if key != "SACREBLEU_SEED"}
    done = subprocess.run(
        [*map(str, command), "--paired-bs", "-w", "4", "-f", "json"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    printed = re.findall(r'"(score|p_value|mean|ci)": ([0-9.e-]+|null)', done.stdout)
    assert len(printed) >= 11
    systems = {name: path.read_text(encoding="utf-8").rstrip("\n").split("\n") for name, path in files.items()}
    rows = paired_test(systems, [reference.read_text(encoding="utf-8").rstrip("\n").split("\n")], "de", ["bleu"])
    ours = {key: [row[key] for row in rows] for key in ("score", "mean", "ci", "p_value")}
    for key, values in ours.items():
        theirs = [float(value) for name, value in printed if name == key and value != "null"]
        assert [value for value in values if value is not None] == pytest.approx(theirs, abs=1e-4), key


def test_the_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("SACREBLEU_SEED", "none")
    first = paired_test(SYSTEMS, [REFERENCE], "en", ["bleu"], n_samples=50, seed=4)
    assert os.environ["SACREBLEU_SEED"] == "none"
    monkeypatch.delenv("SACREBLEU_SEED")
    assert paired_test(SYSTEMS, [REFERENCE], "en", ["bleu"], n_samples=50, seed=4) == first
    assert "SACREBLEU_SEED" not in os.environ


def test_a_seed_of_zero_is_a_seed():
    runs = [paired_test(SYSTEMS, [REFERENCE], "en", ["bleu"], n_samples=200, seed=0) for _ in range(2)]
    assert runs[0] == runs[1]
    joint = joint_test([Corpus("one", "en", SYSTEMS, [REFERENCE])], ["bleu"], n_samples=200, seed=0)
    assert [row["p_value"] for row in joint] == [row["p_value"] for row in runs[0]]
    assert runs[0] != paired_test(SYSTEMS, [REFERENCE], "en", ["bleu"], n_samples=200, seed=1)


@pytest.mark.parametrize("method", ["bs", "ar"])
def test_identical_systems_do_not_differ(method):
    systems = {"a": SYSTEMS["mle"], "b": list(SYSTEMS["mle"])}
    rows = paired_test(systems, [REFERENCE], "en", method=method, n_samples=50)
    assert [(row["delta"], row["p_value"]) for row in rows] == [(None, None), (0.0, 1.0)] * 2
    assert [row["p_two_sided"] for row in rows] == [None, 1.0] * 2
    joint = joint_test([Corpus("x", "en", systems, [REFERENCE])], n_samples=50)
    assert [row["p_value"] for row in joint] == [None, 1.0] * 2


@pytest.mark.parametrize("method", ["bs", "ar"])
def test_one_better_sentence_proves_nothing(method):
    systems = {"a": SYSTEMS["mle"], "b": [*SYSTEMS["mle"][:-1], REFERENCE[-1]]}
    row = paired_test(systems, [REFERENCE], "en", ["chrf"], method=method, n_samples=200)[1]
    assert row["delta"] > 0
    assert row["p_two_sided"] > 0.3
    assert row["delta_low"] <= 0 and not is_sure(row)


@pytest.mark.parametrize("metric", ["bleu", "chrf", "ter"])
def test_randomization_is_that_of_all_exchanges(metric):
    """Of 2^n ways to exchange the n sentences that differ, it counts those at least as far apart."""
    better = [12, 3, 40, 17]
    for exchanged in (better, better[:2]):
        lines = [REFERENCE[i] if i in exchanged else line for i, line in enumerate(SYSTEMS["mle"])]
        systems = {"a": SYSTEMS["mle"], "b": lines}
        row = paired_test(systems, [REFERENCE], "en", [metric], method="ar", n_samples=4000, seed=3)[1]
        built = {"bleu": sacrebleu.BLEU, "chrf": sacrebleu.CHRF, "ter": sacrebleu.TER}[metric](references=[REFERENCE])
        ways = []
        for way in itertools.product((False, True), repeat=len(exchanged)):
            one, other = list(systems["a"]), list(systems["b"])
            for i in itertools.compress(exchanged, way):
                one[i], other[i] = other[i], one[i]
            ways.append(abs(built.corpus_score(one, None).score - built.corpus_score(other, None).score))
        exact = sum(one >= ways[0] - 1e-9 for one in ways) / len(ways)
        assert exact >= 2 / len(ways)
        assert row["p_two_sided"] == pytest.approx(exact, abs=0.03)
        assert row["p_value"] < 0.01 and not is_sure(row)


@pytest.mark.parametrize("metric", ["bleu", "chrf", "ter"])
def test_a_few_sentences_prove_no_more_than_they_can(metric):
    for count in (3, 5, 8):
        lines = [REFERENCE[i] if i < count else line for i, line in enumerate(SYSTEMS["mle"])]
        differ = sum(one != other for one, other in zip(lines, SYSTEMS["mle"], strict=True))
        systems = {"a": SYSTEMS["mle"], "b": lines}
        corpora = [Corpus(f"seed {seed}", "en", systems, [REFERENCE]) for seed in (1, 2)]  # the same sentences twice
        rows = [paired_test(systems, [REFERENCE], "en", [metric])[1], joint_test(corpora, [metric])[1]]
        hits = {
            name: [float(a == b) for a, b in zip(lines, REFERENCE, strict=True)] for name, lines in systems.items()
        }
        rows.append(mean_difference_test([hits])[1])
        for row in rows:
            assert row["p_two_sided"] >= min(1, 2 / 2**differ)
            assert not (is_sure(row) and differ < 6)
        assert rows[0]["p_two_sided"] < 0.05 or count < 8


def test_a_single_sentence_proves_nothing():
    """Every resample of it is the same, so the interval is a point."""
    systems, references = {"a": ["the cat sat"], "b": ["the cat sat on the mat"]}, [["the cat sat on the mat"]]
    found = joint_test([Corpus("x", "en", systems, references)] * 2, ["bleu", "ter"], n_samples=100)
    found += paired_test(systems, references, "en", ["chrf"], n_samples=100)
    found += mean_difference_test([{"a": [0.0], "b": [1.0]}], n_samples=100)
    rows = [row for row in found if row["system"] == "b"]
    assert len(rows) == 4 and all(row["delta"] for row in rows)
    assert all(row[key] == 1.0 for row in rows for key in ("p_value", "p_two_sided", "p_holm"))
    assert not any(is_sure(row) for row in rows)


def test_rouge_can_be_tested_too():
    rows = paired_test(SYSTEMS, [REFERENCE], "en", ["rouge1"], n_samples=200)
    assert rows[0]["signature"].startswith("nrefs:1|bs:200|seed:12345|")
    assert 0 < rows[1]["p_value"] <= 1
    assert rows[1]["delta"] > 0


# The joint test


@pytest.mark.parametrize("metric", ["bleu", "chrf", "ter"])
def test_over_one_corpus_the_joint_test_is_sacrebleu_s(metric):
    joint = joint_test([Corpus("one", "en", SYSTEMS, [REFERENCE])], [metric], n_samples=500, seed=3)
    single = paired_test(SYSTEMS, [REFERENCE], "en", [metric], n_samples=500, seed=3)
    for ours, theirs in zip(joint, single, strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], rel=1e-12)
        assert ours["p_value"] == theirs["p_value"]
        assert (ours["delta_low"], ours["delta_high"]) == pytest.approx((theirs["delta_low"], theirs["delta_high"]))


def test_the_joint_test_is_a_bootstrap_of_the_mean_score():
    """An independent, slow one: resample lines, call sacreBLEU on them."""
    corpora = []
    for number, size in enumerate((12, 20)):
        reference, systems = corpus_of(size, seed=number, damages=(0.3, 0.1))
        corpora.append(Corpus(f"c{number}", "en", systems, [reference]))
    rows = joint_test(corpora, ["chrf"], n_samples=40, seed=5)
    rng = np.random.default_rng(5)
    means = {"mle": np.zeros(40), "convex": np.zeros(40)}
    for corpus in corpora:
        size = len(corpus.references[0])
        for sample, indices in enumerate(rng.choice(size, size=(40, size), replace=True)):
            for name, hypotheses in corpus.systems.items():
                drawn = [hypotheses[index] for index in indices], [[corpus.references[0][index] for index in indices]]
                means[name][sample] += sacrebleu.corpus_chrf(*drawn).score / 2
    deltas = means["convex"] - means["mle"]
    full = {
        name: np.mean([sacrebleu.corpus_chrf(c.systems[name], c.references).score for c in corpora]) for name in means
    }
    assert [rows[0]["score"], rows[1]["score"]] == pytest.approx([full["mle"], full["convex"]])
    assert rows[1]["delta"] == pytest.approx(full["convex"] - full["mle"])
    interval = [rows[1]["delta_low"], rows[1]["delta_high"]]
    assert interval == pytest.approx(list(np.percentile(deltas, [2.5, 97.5])))
    centred = np.abs(deltas) - np.abs(deltas).mean()
    assert rows[1]["p_value"] == (np.sum(centred > abs(rows[1]["delta"])) + 1) / 41
    assert [part["name"] for part in rows[1]["corpora"]] == ["c0", "c1"]
    assert np.mean([part["delta"] for part in rows[1]["corpora"]]) == pytest.approx(rows[1]["delta"])


def test_more_corpora_make_it_surer():
    corpora = []
    for number in range(6):
        reference, systems = corpus_of(40, seed=10 + number, damages=(0.3, 0.25))
        corpora.append(Corpus(str(number), "en", systems, [reference]))
    widths = []
    for part in (corpora[:1], corpora):
        row = joint_test(part, ["chrf"], n_samples=300)[1]
        widths.append(row["delta_high"] - row["delta_low"])
    assert widths[1] < 0.6 * widths[0]


def test_the_same_sentences_twice_make_it_no_surer():
    corpora = [Corpus(f"seed {number}", "en", SYSTEMS, [REFERENCE]) for number in range(4)]
    once, four = (joint_test(part, ["bleu"], n_samples=300) for part in (corpora[:1], corpora))
    assert four[1]["delta_low"] == pytest.approx(once[1]["delta_low"])
    assert four[1]["p_value"] == once[1]["p_value"]
    apart = [Corpus(c.name, "en", c.systems, c.references, group=c.name) for c in corpora]
    row = joint_test(apart, ["bleu"], n_samples=300)[1]
    assert row["delta_high"] - row["delta_low"] < 0.7 * (once[1]["delta_high"] - once[1]["delta_low"])


def test_drawing_in_pieces_changes_nothing(monkeypatch):
    corpora = [Corpus("one", "en", SYSTEMS, [REFERENCE])]
    whole = joint_test(corpora, ["bleu"], n_samples=100)
    monkeypatch.setattr(resampling, "_CELLS", 7 * len(REFERENCE) + 3)
    assert joint_test(corpora, ["bleu"], n_samples=100) == whole


def test_every_corpus_is_scored_for_its_own_language():
    chinese = Corpus(
        "zh", "zh", {"mle": ["今天天气好。"] * 3, "convex": ["今天天气很好。"] * 3}, [["今天天气很好。"] * 3]
    )
    english = Corpus("en", "en", {"convex": SYSTEMS["convex"], "mle": SYSTEMS["mle"]}, [REFERENCE])
    rows = joint_test([chinese, english], ["bleu"], baseline="mle", n_samples=50)
    assert [row["system"] for row in rows] == ["mle", "convex"]
    assert [re.search(r"tok:(\w+)", part["signature"])[1] for part in rows[0]["corpora"]] == ["zh", "13a"]


def test_what_cannot_be_compared_is_refused():
    corpus = Corpus("x", "en", SYSTEMS, [REFERENCE])
    for part, message in (
        ([], "no corpus"),
        ([corpus, Corpus("y", "en", {"mle": REFERENCE, "other": REFERENCE}, [REFERENCE])], "corpus 2 has the systems"),
        ([Corpus("y", "en", {"mle": REFERENCE}, [REFERENCE])], "at least two systems"),
        ([Corpus("y", "en", {"mle": REFERENCE, "b": REFERENCE[:3]}, [REFERENCE])], "60 lines but y, b has 3"),
    ):
        with pytest.raises(UserError, match=message):
            joint_test(part)
    with pytest.raises(UserError, match="no system `x`"):
        joint_test([corpus], baseline="x")
    with pytest.raises(UserError, match="at least two"):
        paired_test({"mle": REFERENCE}, [REFERENCE], "en")
    with pytest.raises(UserError, match="reference 1 has 60 lines but b has 1"):
        paired_test({"a": REFERENCE, "b": ["x"]}, [REFERENCE], "en")
    with pytest.raises(UserError, match="unknown test"):
        paired_test(SYSTEMS, [REFERENCE], "en", method="t")
    for options in ({"n_samples": 0}, {"seed": -1}):
        with pytest.raises(UserError):
            paired_test(SYSTEMS, [REFERENCE], "en", **options)


# Measures that sentences have


def test_a_difference_of_means_has_the_normal_interval():
    rng = np.random.default_rng(2)
    base = (rng.random(4000) < 0.4).astype(float)
    better = np.where(rng.random(4000) < 0.1, 1.0, base)
    row = mean_difference_test([{"mle": base, "convex": better}], n_samples=4000)[1]
    differences = better - base
    error = differences.std() / np.sqrt(4000)
    assert row["delta"] == pytest.approx(differences.mean())
    assert (row["delta_high"] - row["delta_low"]) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert row["p_value"] < 0.001


def test_chance_is_not_taken_for_a_difference():
    """The two-sided p holds its level; sacreBLEU's convention is known to be lenient by about a factor of two."""
    rng = np.random.default_rng(3)
    rows = []
    for seed in range(400):
        pair = {"a": rng.random(300) < 0.5, "b": rng.random(300) < 0.5}
        rows.append(mean_difference_test([pair], n_samples=300, seed=seed)[1])
    rates = {key: np.mean([row[key] < 0.05 for row in rows]) for key in ("p_two_sided", "p_value")}
    # Three standard errors of a share of 0.05 and of 0.10 in 400 trials.
    assert rates["p_two_sided"] == pytest.approx(0.05, abs=0.033)
    assert rates["p_value"] == pytest.approx(0.10, abs=0.045)
    for row in rows:
        outside = row["delta_low"] > 0 or row["delta_high"] < 0
        assert outside == (row["p_two_sided"] < 0.05) or 0.02 < row["p_two_sided"] < 0.10


def test_means_over_corpora_and_groups():
    rng = np.random.default_rng(4)
    corpus = {"a": rng.random(50), "b": rng.random(50), "c": rng.random(50)}
    other = {"a": [0.0, 1.0], "b": [1.0, 1.0], "c": [1.0, 1.0]}
    rows = mean_difference_test([corpus, other], baseline="b", n_samples=100)
    assert [row["system"] for row in rows] == ["b", "a", "c"]
    assert rows[1]["score"] == pytest.approx((corpus["a"].mean() + 0.5) / 2)
    assert rows[0]["p_value"] is None
    assert rows[1]["p_holm"] >= rows[1]["p_two_sided"]
    alone = mean_difference_test([corpus], n_samples=100)
    twice = mean_difference_test([corpus, corpus], groups=["x", "x"], n_samples=100)
    assert twice[1]["delta_low"] == pytest.approx(alone[1]["delta_low"])
    same = mean_difference_test([{"a": [0, 1], "b": [0, 1]}], n_samples=20)
    assert same[1]["p_value"] == 1.0


def test_values_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="same number of values"):
        mean_difference_test([{"a": [1.0], "b": [1.0, 2.0]}])
    with pytest.raises(ValueError, match="finite"):
        mean_difference_test([{"a": [1.0], "b": [float("nan")]}])
    with pytest.raises(ValueError, match="groups"):
        mean_difference_test([{"a": [1.0], "b": [2.0]}], groups=[])
    with pytest.raises(UserError, match="differ in number"):
        mean_difference_test([{"a": [1], "b": [2]}, {"a": [1, 2], "b": [2, 3]}], groups=[0, 0])


# Many tests


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []
    assert holm([0.02, 0.02, 0.02]) == pytest.approx([0.06] * 3)
    with pytest.raises(ValueError, match="between"):
        holm([1.5])


def test_holm_is_over_the_systems_of_one_metric():
    rows = paired_test(SYSTEMS, [REFERENCE], "en", n_samples=200)
    for metric in ("bleu", "chrf"):
        part = [row for row in rows if row["metric"] == metric]
        assert [row["p_holm"] for row in part[1:]] == holm([row["p_two_sided"] for row in part[1:]])
