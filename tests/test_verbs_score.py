"""`convexlm score` and `convexlm compare` as people and scripts call them."""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu
from rich.console import Console

from convexlm.cli import main
from convexlm.errors import UserError
from convexlm.verbs import compare, score

REFERENCE = [
    "Die Katze saß auf der Matte.",
    "Es regnet heute schon wieder.",
    "Er kaufte letzte Woche ein neues Auto.",
] * 8
GOOD = ["Die Katze saß auf der Matte.", "Es regnet heute wieder.", "Er kaufte letzte Woche ein Auto."] * 8
BAD = ["Eine Katze sitzt auf Matte.", "Heute gibt es Regen.", "Er hat ein Auto."] * 8


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, lines in {"ref": REFERENCE, "good": GOOD, "bad": BAD}.items():
        Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    records = "".join(json.dumps({"id": str(i), "hypothesis": line}) + "\n" for i, line in enumerate(GOOD))
    Path("good.jsonl").write_text(records)
    Path("good.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    Path("torn.jsonl").write_text(records[:-9])
    Path("short").write_text("eins\nzwei\n")
    Path("empty").write_text("")
    return tmp_path


def json_of(capsys, *words):
    assert main([*words, "--json"]) == 0
    out = capsys.readouterr()
    return json.loads(out.out)


SCORE = ["score", "--references", "ref", "--target_lang", "de", "--hypotheses"]
COMPARE = ["compare", "--references", "ref", "--target_lang", "de", "--systems"]


@pytest.mark.parametrize("name", ["good", "good.jsonl", "good.jsonl.gz"])
def test_score_gives_sacrebleu_s_numbers_as_json(files, capsys, name):
    result = json_of(capsys, *SCORE, name)
    assert result["num_sentences"] == 24
    bleu, chrf = result["scores"]
    assert (bleu["metric"], chrf["metric"]) == ("bleu", "chrf")
    assert bleu["score"] == sacrebleu.corpus_bleu(GOOD, [REFERENCE]).score
    assert chrf["score"] == sacrebleu.corpus_chrf(GOOD, [REFERENCE]).score
    assert bleu["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|")
    assert len(bleu["hypotheses_sha256"]) == 64


def test_score_takes_two_references_metrics_and_intervals(files, capsys):
    words = ["--references", "ref", "bad", "--metrics", "bleu", "chrf++", "ter", "--confidence", "--n_samples", "50"]
    result = json_of(capsys, "score", "--hypotheses", "good", "--target_lang", "de", *words)
    assert [part["metric"] for part in result["scores"]] == ["bleu", "chrf++", "ter"]
    for part in result["scores"]:
        assert part["signature"].startswith("nrefs:2|bs:50|seed:12345|")
        assert part["ci"] >= 0
    assert result["scores"][0]["score"] == sacrebleu.corpus_bleu(GOOD, [REFERENCE, BAD]).score


def test_score_prints_a_table(files, capsys):
    assert main([*SCORE, "good", "--confidence", "--metrics", "bleu", "ter", "--n_samples", "20"]) == 0
    out = capsys.readouterr().out
    assert f"{sacrebleu.corpus_bleu(GOOD, [REFERENCE]).score:.2f}" in out
    assert "TER (less is better)" in out
    assert "24 sentences" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SCORE, "nothing"], "nothing: no such file"),
        ([*SCORE, "empty"], "empty: the file is empty"),
        ([*SCORE, "short"], "short (hypotheses) has 2 lines but ref has 24"),
        ([*SCORE, "torn.jsonl"], "torn.jsonl, line 24: not valid JSON"),
        ([*SCORE, "good", "--target_lang", "en-de"], "target language 'en-de'"),
        ([*SCORE, "good", "--target_lang", ""], "target language ''"),
        ([*SCORE, "good", "--metrics", "blue"], "unknown metric `blue`"),
        ([*SCORE, "good", "--tokenize", "x"], "unknown tokenizer `x`"),
        ([*SCORE, "good", "--tokenize", "13a", "--metrics", "chrf"], "--tokenize 13a is for BLEU"),
        ([*SCORE, "good", "--confidence", "--n_samples", "1"], "--n_samples"),
        (
            [*SCORE, "good", "--confidence", "--n_samples", "1000001"],
            "--n_samples: the number of resamples must be at most",
        ),
        ([*SCORE, "good", "--confidence", "--seed", "-1"], "seed"),
        (["score", "--hypotheses", "good", "--target_lang", "de"], "--references"),
        ([*SCORE, "good", "--export_comet", "o.jsonl", "--sources", "good.jsonl"], "good.jsonl: is JSON"),
        ([*COMPARE, "a=good"], "at least two"),
        ([*COMPARE, "a=good", "bad"], "expected NAME=FILE, found 'bad'"),
        ([*COMPARE, "a=good", "=bad"], "expected NAME=FILE"),
        ([*COMPARE, "a=good", "b="], "expected NAME=FILE"),
        ([*COMPARE, "a=good", "a=bad"], "`a` is given twice"),
        ([*COMPARE, "a=good", "b=short"], "ref has 24 lines but short (b) has 2"),
        ([*COMPARE, "a=good", "b=bad", "--method", "t"], "--method"),
        ([*COMPARE, "a=good", "b=bad", "--n_samples", "0"], "at least 1"),
        ([*COMPARE, "a=good", "b=bad", "--n_samples", "many"], "--n_samples"),
        ([*COMPARE, "a=good", "b=bad", "--n_samples", "9" * 25], "must be at most 1000000"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(files, capsys, words, message):
    assert main(words) == 2
    out = capsys.readouterr()
    assert message in out.err
    assert out.err.count("\n") == 1
    assert out.out == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["th"],
            "`th` has no blanks between words, .*: BLEU takes .* go by chrF, or give .* --tokenize flores200 or char",
        ),
        (["yue", "--metrics", "bleu", "ter"], "BLEU and TER take .* --tokenize zh for BLEU"),
        (["yue", "--metrics", "ter", "bleu", "--tokenize", "zh"], "TER takes what stands .*go by chrF$"),
        (["th", "--tokenize", "char"], None),
        (["th", "--metrics", "chrf"], None),
        (["vi"], None),
    ],
)
def test_words_that_no_tokenizer_parts_are_told(files, capsys, words, told):
    """The number is sacreBLEU's, which says nothing."""
    assert main([*SCORE, "good", "--target_lang", *words]) == 0
    said = capsys.readouterr().err.strip()
    assert re.search(told, said) if told else said == ""
    assert main([*COMPARE, "a=good", "b=bad", "--n_samples", "20", "--target_lang", *words]) == 0
    assert capsys.readouterr().err.strip() == said


def test_compare_gives_every_test_as_json(files, capsys):
    result = json_of(
        capsys, *COMPARE, "mle=bad", "convex=good.jsonl", "same=good", "--n_samples", "100", "--seed", "3"
    )
    assert result["baseline"] == "mle"
    assert [system["name"] for system in result["systems"]] == ["mle", "convex", "same"]
    assert result["systems"][1]["hypotheses_sha256"] == result["systems"][2]["hypotheses_sha256"]
    assert result["num_sentences"] == 24
    assert len(result["tests"]) == 6
    row = result["tests"][1]
    assert (row["metric"], row["system"], row["baseline"]) == ("bleu", "convex", "mle")
    assert row["delta"] == pytest.approx(
        sacrebleu.corpus_bleu(GOOD, [REFERENCE]).score - sacrebleu.corpus_bleu(BAD, [REFERENCE]).score
    )
    assert row["p_holm"] == pytest.approx(min(1.0, 2 * row["p_two_sided"]))
    assert "bs:100|seed:3|" in row["signature"]
    assert (result["method"], result["n_samples"], result["seed"]) == ("bs", 100, 3)


def shown(files_or_result, width=120):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    compare.show(files_or_result, console)
    return console.file.getvalue()


def compared(*words):
    parser = compare.make_parser("convexlm compare")
    return compare.run(parser.parse([*COMPARE[1:], *words]))


def test_compare_s_table_names_the_winner(files):
    text = shown(compared("mle=bad", "convex=good", "--metrics", "bleu", "ter", "--n_samples", "100"))
    assert [line.split()[1] for line in text.splitlines() if line.startswith("★")] == ["convex", "convex"]
    assert "convex is ahead of mle by" in text
    assert "Holm" not in text


def test_compare_s_table_when_the_baseline_wins_or_nobody_does(files):
    text = shown(compared("base=good", "x=bad", "y=bad", "--metrics", "bleu", "--n_samples", "100"))
    assert "base is ahead of x by" in text
    assert "p (Holm)" in text
    text = shown(compared("a=good", "b=good", "--metrics", "bleu", "--n_samples", "100"))
    assert "★" not in text
    assert "No single system" in text


def test_a_lead_that_may_be_luck_is_called_so(files):
    lines = [*BAD[:-1], GOOD[-1]]
    Path("near").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = shown(compared("a=bad", "b=near", "--metrics", "bleu", "--n_samples", "200", "--method", "ar"))
    assert "may be luck" in text
    assert "approximate randomization, 200 trials (intervals: bootstrap, 1000 samples)" in text


def test_a_difference_of_nothing_has_no_sign(files):
    """The lead of a baseline is minus the other's delta, and minus nothing is nothing."""
    Path("near").write_text("\n".join([*GOOD[:-1], BAD[-1]]) + "\n", encoding="utf-8")
    text = shown(compared("base=good", "x=near", "same=good", "--metrics", "bleu", "--n_samples", "100"))
    assert "0.00   [0.00, 0.00]" in text and ", 0.00]" in text
    assert "-0.00" not in text and "+0.00" not in text
    text = shown(compared("base=good", "x=near", "--metrics", "bleu", "--n_samples", "100"))
    assert "95 % interval 0.00 to +" in text


def test_randomization_decides_where_it_was_asked_for(files, capsys):
    """One trial can only give p = 0.5 or 1, whatever a bootstrap would say."""
    words = ("--systems", "a=bad", "b=good", "--references", "ref", "--target_lang", "de", "--metrics", "bleu")
    (row,) = json_of(capsys, "compare", *words, "--method", "ar", "--n_samples", "1")["tests"][1:]
    assert row["p_value"] == row["p_two_sided"] == row["p_holm"] >= 0.5
    text = shown(compared("a=bad", "b=good", "--metrics", "bleu", "--method", "ar", "--n_samples", "1"))
    assert "may be luck" in text
    text = shown(compared("a=bad", "b=good", "--metrics", "bleu", "--method", "ar"))
    assert "b is ahead of a by" in text


def test_names_are_text_and_not_markup(files):
    text = shown(compared("[red]a=bad", "[/b]=good", "--metrics", "bleu", "--n_samples", "20"))
    assert "[red]a" in text
    assert "[/b] is ahead of [red]a" in text


def test_systems_come_from_a_config_file_too(files, capsys):
    Path("c.yaml").write_text("references: [ref]\ntarget_lang: de\nsystems: [a=bad, b=good]\nn_samples: 20\n")
    assert json_of(capsys, "compare", "--config", "c.yaml")["baseline"] == "a"


def test_parse_systems_keeps_order_and_equal_signs_in_paths():
    assert list(compare.parse_systems(["b=x=1", "a=y"]).items()) == [("b", "x=1"), ("a", "y")]
    with pytest.raises(UserError):
        compare.parse_systems(["a\n=x", "b=y"])


def test_the_installed_command(files):
    words = ["score", "--hypotheses", "good", "--references", "ref", "--target_lang", "ja"]
    command = [sys.executable, "-m", "convexlm.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 0:
        pytest.skip("ja-mecab is installed")
    assert done.returncode == 2
    assert done.stderr.startswith("convexlm score: error: the tokenizer `ja-mecab` is not at hand: pip install")
    assert done.stderr.count("\n") == 1


def test_score_s_parser_lists_the_metrics():
    assert "rougeLsum" in score.make_parser("x").format_help()
