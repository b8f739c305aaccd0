"""Scores are sacreBLEU's and rouge-score's to the last digit, on odd input too."""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.util
import json
import os
import random

import pytest
import sacrebleu

from convexlm.errors import UserError
from convexlm.files import read_lines, text_sha256
from convexlm.scoring import (
    METRICS,
    Scorer,
    check_language,
    get_metric,
    register_metric,
    sacrebleu_seed,
    score_corpus,
    score_from_statistics,
    sentence_statistics,
)
from convexlm.segments import read_hypotheses, read_references

REFERENCE = ["The cat sat on the mat.", "It is raining again today.", "He bought a new car last week."]
HYPOTHESIS = ["The cat sat on a mat.", "It rains again today.", "He has bought a new car last week."]
CHINESE_REFERENCE = ["今天天气很好。", "我昨天买了三本书。"]
CHINESE_HYPOTHESIS = ["今天的天气很好。", "昨天我买了三本新书。"]


def one(metric, hypotheses, references, target_lang="en", **options):
    return score_corpus(hypotheses, references, target_lang, [metric], **options)[0]


# Against published and independently computed numbers


def test_published_wmt22_scores_come_out_to_the_last_digit(shared_data):
    folder = shared_data / "wmt22_systems"
    with (folder / "published_scores.tsv").open(encoding="utf-8") as file:
        published = list(csv.DictReader(file, delimiter="\t"))
    assert len(published) == 6
    scorer = Scorer([read_references(folder / "generaltest2022.en-de.ref.A.de")], "de", ["bleu", "chrf"])
    for row in published:
        hypotheses = read_hypotheses(folder / f"generaltest2022.en-de.hyp.{row['system']}.de")
        scores = {score.metric: score.score for score in scorer.score(hypotheses)}
        assert repr(scores[row["metric"].removesuffix("-A")]) == row["score"]


@pytest.mark.parametrize(
    ("metric", "function", "options"),
    [
        ("bleu", sacrebleu.corpus_bleu, {}),
        ("chrf", sacrebleu.corpus_chrf, {}),
        ("chrf++", sacrebleu.corpus_chrf, {"word_order": 2}),
        ("ter", sacrebleu.corpus_ter, {}),
    ],
)
@pytest.mark.parametrize("streams", [1, 2])
def test_scores_equal_sacrebleu(metric, function, options, streams):
    references = [REFERENCE, HYPOTHESIS[::-1]][:streams]
    score = one(metric, HYPOTHESIS, references)
    assert score.score == function(HYPOTHESIS, references, **options).score
    assert score.signature.startswith(f"nrefs:{streams}|")
    assert score.signature.endswith(f"|version:{sacrebleu.__version__}")


def test_chinese_gets_its_own_tokenizer():
    score = one("bleu", CHINESE_HYPOTHESIS, [CHINESE_REFERENCE], "zh")
    assert score.score == sacrebleu.corpus_bleu(CHINESE_HYPOTHESIS, [CHINESE_REFERENCE], tokenize="zh").score
    assert "|tok:zh|" in score.signature
    overridden = one("bleu", CHINESE_HYPOTHESIS, [CHINESE_REFERENCE], "zh", tokenize="13a")
    assert overridden.score == sacrebleu.corpus_bleu(CHINESE_HYPOTHESIS, [CHINESE_REFERENCE]).score
    assert "|tok:13a|" in overridden.signature
    assert score.score > overridden.score + 5


def test_chinese_ter_counts_characters_and_says_so():
    score = one("ter", CHINESE_HYPOTHESIS, [CHINESE_REFERENCE], "zh")
    assert "asian:yes" in score.signature
    assert score.score < 50
    plain = one("ter", HYPOTHESIS, [REFERENCE], "de")
    assert "asian:no" in plain.signature


def test_rouge_lsum_parts_both_sides_by_one_rule():
    """A decoded answer is one line; a data set's summary has a sentence a line, and has none in a text file."""
    from rouge_score.rouge_scorer import RougeScorer

    lines = ["The cat sat down .", "It was on a mat!", "Nobody knew why."]
    hypothesis = "Nobody knew why. The cat was on the mat."
    split = RougeScorer(["rougeLsum"], use_stemmer=True).score(
        "\n".join(lines), "Nobody knew why.\nThe cat was on the mat."
    )
    for reference in ("\n".join(lines), " ".join(lines)):
        score = one("rougeLsum", [hypothesis], [[reference]], "en")
        assert score.score == pytest.approx(100 * split["rougeLsum"].fmeasure, rel=1e-12)
        assert "|sents:punctuation|" in score.signature
    assert "|sents:whole|" in one("rouge1", [hypothesis], [["x"]], "en").signature


@pytest.mark.parametrize("metric", ["rouge1", "rouge2", "rougeLsum"])
@pytest.mark.parametrize("target_lang", ["en", "de"])
def test_rouge_is_the_mean_f1_of_rouge_score(metric, target_lang):
    from rouge_score.rouge_scorer import RougeScorer

    references = [[*REFERENCE, "One thing.\nAnother thing."], [*HYPOTHESIS[::-1], "Nothing"]]
    hypotheses = [*HYPOTHESIS, "Another thing.\nOne thing happened."]
    # Every sentence but these ends with its segment, so only these are parted.
    scorer = RougeScorer([metric], use_stemmer=target_lang == "en")
    best = [
        max(scorer.score(reference, hypothesis)[metric].fmeasure for reference in both)
        for hypothesis, *both in zip(hypotheses, *references, strict=True)
    ]
    score = one(metric, hypotheses, references, target_lang)
    assert score.score == pytest.approx(100 * sum(best) / len(best), rel=1e-12)
    assert f"|stem:{'yes' if target_lang == 'en' else 'no'}|" in score.signature
    assert "impl:rouge-score|version:0.1.2" in score.signature
    assert set(score.versions) == {"convexlm", "rouge-score"}


def test_rouge_refuses_a_script_that_its_tokenizer_drops():
    with pytest.raises(UserError, match="a-z"):
        one("rouge1", CHINESE_HYPOTHESIS, [CHINESE_REFERENCE], "zh")


def test_bleu_shows_its_parts():
    score = one("bleu", HYPOTHESIS, [REFERENCE])
    oracle = sacrebleu.corpus_bleu(HYPOTHESIS, [REFERENCE])
    assert score.details == {
        "bp": oracle.bp,
        "ratio": oracle.ratio,
        "hyp_len": oracle.sys_len,
        "ref_len": oracle.ref_len,
        "precisions": oracle.precisions,
    }
    assert score.signature == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"


def test_the_hashes_are_those_of_the_text():
    score = one("bleu", HYPOTHESIS, [REFERENCE, HYPOTHESIS])
    assert score.hypotheses_sha256 == hashlib.sha256("".join(f"{x}\n" for x in HYPOTHESIS).encode()).hexdigest()
    assert score.references_sha256 == [text_sha256(REFERENCE), text_sha256(HYPOTHESIS)]
    assert score.num_sentences == 3
    assert json.loads(json.dumps(score.as_dict()))["score"] == score.score


@pytest.mark.parametrize("seed", [0, 7, 12345])
def test_intervals_are_sacrebleu_s_and_leave_no_trace(monkeypatch, seed):
    monkeypatch.setenv("SACREBLEU_SEED", str(seed))
    oracle = sacrebleu.BLEU(references=[REFERENCE])
    expected = oracle.corpus_score(HYPOTHESIS, None, n_bootstrap=100)
    signature = str(oracle.get_signature())
    monkeypatch.setenv("SACREBLEU_SEED", "99")
    scorer = Scorer([REFERENCE], "en", ["bleu"])
    score = scorer.score(HYPOTHESIS, confidence=100, seed=seed)[0]
    assert (score.mean, score.ci, score.signature) == (expected._mean, expected._ci, signature)
    plain = scorer.score(HYPOTHESIS)[0]
    assert plain.mean is None
    assert "mean" not in plain.as_dict()
    assert "bs:" not in plain.signature
    assert os.environ["SACREBLEU_SEED"] == "99"


def test_the_seed_variable_is_put_back_after_an_error(monkeypatch):
    monkeypatch.delenv("SACREBLEU_SEED", raising=False)
    with pytest.raises(RuntimeError), sacrebleu_seed(3):
        assert os.environ["SACREBLEU_SEED"] == "3"
        raise RuntimeError
    assert "SACREBLEU_SEED" not in os.environ


@pytest.mark.parametrize("name", sorted(METRICS))
def test_what_we_use_of_sacrebleu_s_inside_still_does_what_it_did(name):
    """The joint test stands on statistics that add up over sentences and give the corpus score."""
    rng = random.Random(1)
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "house", "red", "blue"]
    lines = [[" ".join(rng.choices(words, k=9)) for _ in range(40)] for _ in range(2)]
    metric = get_metric(name).build("en", None, [lines[0]])
    statistics = sentence_statistics(metric, lines[1])
    assert statistics.shape[0] == 40
    assert statistics.ndim == 2
    expected = metric.corpus_score(lines[1], None).score
    assert score_from_statistics(metric, statistics.sum(0)) == pytest.approx(expected, rel=1e-12)
    half = metric.corpus_score(lines[1], [lines[0]]).score
    assert half == pytest.approx(expected, rel=1e-12)
    again = metric.corpus_score(lines[1] * 2, [lines[0] * 2]).score
    assert score_from_statistics(metric, 2 * statistics.sum(0)) == pytest.approx(again, rel=1e-12)


# Odd input


def test_empty_hypotheses_stay_in_step_and_are_counted():
    hypotheses = [HYPOTHESIS[0], "  ", HYPOTHESIS[2]]
    score = one("bleu", hypotheses, [REFERENCE])
    assert score.num_empty == 1
    assert score.score == sacrebleu.corpus_bleu(hypotheses, [REFERENCE]).score
    nothing = score_corpus(["", ""], [["", ""]], "en", [name for name in METRICS])
    assert [score.score for score in nothing] == [0.0] * len(METRICS)
    assert one("bleu", ["", ""], [["a b", "c d"]]).score == 0


@pytest.mark.parametrize("metric", ["bleu", "chrf", "ter"])
def test_a_blank_line_of_one_stream_is_a_missing_reference(metric):
    """sacreBLEU leaves out None, and takes an empty text for a reference of no words: 92 BLEU in place of 75."""
    hypotheses = ["the cat sat on the mat today", "a dog", "we go home now ."]
    first = ["the cat sat on the mat", "a dog runs quickly away", "we go home now ."]
    second = ["the cat is on a mat today", "", " "]
    theirs = {"bleu": sacrebleu.BLEU, "chrf": sacrebleu.CHRF, "ter": sacrebleu.TER}[metric]()
    expected = theirs.corpus_score(hypotheses, [first, [second[0], None, None]])
    for streams in ([first, second], [second, first]):
        score = one(metric, hypotheses, streams)
        assert score.score == expected.score
        assert "nrefs:var" in score.signature
    # Where no stream has a text there is nothing to leave out.
    assert one("bleu", ["a", "b c"], [["", "b c"], ["", "b c d"]]).signature.startswith("nrefs:2")


@pytest.mark.parametrize("metric", ["rouge1", "rougeLsum"])
def test_rouge_leaves_out_a_missing_reference_too(metric):
    hypotheses, first = ["the cat sat. On the mat.", "a dog"], ["the cat. It sat.", ""]
    second = ["", "a dog runs"]
    alone = one(metric, hypotheses, [["the cat. It sat.", "a dog runs"]])
    score = one(metric, hypotheses, [first, second])
    assert score.score == alone.score and score.signature == alone.signature


def test_other_lengths_are_refused_with_both_counts():
    with pytest.raises(UserError, match="hypotheses has 2 lines but reference 1 has 3"):
        score_corpus(HYPOTHESIS[:2], [REFERENCE], "en")
    with pytest.raises(UserError, match="reference 1 has 3 lines but reference 2 has 1"):
        score_corpus(HYPOTHESIS, [REFERENCE, REFERENCE[:1]], "en")
    with pytest.raises(UserError, match="no sentence"):
        score_corpus([], [[]], "en")
    with pytest.raises(UserError, match="no references"):
        score_corpus(HYPOTHESIS, [], "en")


def test_a_flat_list_of_references_is_a_programming_mistake():
    with pytest.raises(ValueError, match="streams"):
        score_corpus(HYPOTHESIS, REFERENCE, "en")


@pytest.mark.parametrize("code", ["", "en-de", "ZH", "zh-CN", "z", "zh ", "cmn", "jp"])
def test_malformed_languages_are_refused(code):
    with pytest.raises(UserError, match="target language"):
        score_corpus(CHINESE_HYPOTHESIS, [CHINESE_REFERENCE], code)


def test_languages_without_a_tokenizer_of_their_own_get_13a():
    assert "tok:13a" in one("bleu", HYPOTHESIS, [REFERENCE], "xx").signature
    check_language("liv")


@pytest.mark.parametrize(("code", "module"), [("ja", "MeCab"), ("ko", "mecab_ko")])
def test_a_tokenizer_that_is_not_installed_is_an_error_with_the_command(code, module):
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is installed")
    for options in ({"target_lang": code}, {"target_lang": "de", "tokenize": f"{code}-mecab"}):
        with pytest.raises(UserError) as refusal:
            one("bleu", ["a"], [["a"]], **options)
        assert f"pip install 'sacrebleu[{code}]'" in str(refusal.value)
    assert one("chrf", ["a"], [["a"]], code).score == 100


def test_unknown_names_are_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"unknown metric `blue`; known: bleu, chrf, chrf\+\+, ter"):
        one("blue", HYPOTHESIS, [REFERENCE])
    with pytest.raises(UserError, match="unknown tokenizer `zhh`"):
        one("bleu", HYPOTHESIS, [REFERENCE], tokenize="zhh")
    with pytest.raises(UserError, match="twice"):
        score_corpus(HYPOTHESIS, [REFERENCE], "en", ["bleu", "bleu"])


def test_a_metric_is_one_function(monkeypatch):
    monkeypatch.setattr("convexlm.scoring.METRICS", dict(METRICS))

    @register_metric("bleu-lc", title="BLEU (lower case)")
    def build(target_lang, tokenize, references):
        return sacrebleu.BLEU(lowercase=True, references=references)

    score = one("bleu-lc", [line.upper() for line in REFERENCE], [REFERENCE])
    assert score.score == pytest.approx(100)
    assert "case:lc" in score.signature


def test_text_files_with_bom_crlf_and_line_separators_are_read_right(tmp_path):
    lines = ["eins\u2028zwei", "drei\x85vier", "", "fünf"]
    (tmp_path / "plain").write_bytes("\n".join(lines).encode() + b"\n")
    (tmp_path / "dos").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    (tmp_path / "packed.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    for name in ("plain", "dos", "packed.gz"):
        assert read_references(tmp_path / name) == lines
        assert read_hypotheses(tmp_path / name) == lines
    assert one("bleu", read_lines(tmp_path / "plain"), [read_lines(tmp_path / "dos")]).score == pytest.approx(
        sacrebleu.corpus_bleu(lines, [lines]).score
    )


def write_records(path, records):
    raw = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_decode_s_records_are_read_in_the_file_s_order(tmp_path, name):
    texts = ["a\nb", "\ud800 lone", "", "c\u2028d\x85e"]
    records = [{"id": str(9 - number), "hypothesis": text} for number, text in enumerate(texts)]
    path = write_records(tmp_path / name, records)
    hypotheses = read_hypotheses(path)
    assert hypotheses == ["a b", "\ud800 lone", "", "c\u2028d\x85e"]
    score = one("bleu", hypotheses, [["a b", "x lone", "y", "z"]])
    assert score.num_empty == 1
    assert len(score.hypotheses_sha256) == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "0", "hypothesis": "a"}\n{"id": "0", "hypothesis": "b"}\n', "record 2: the id `0` is given twice"),
        ('{"id": "0", "hypothesis": "a"}\n{"id": "1", "hypo', "line 2: not valid JSON"),
        ('{"id": "0"}\n', "record 1: no text under `hypothesis`"),
        ('{"id": "0", "hypothesis": null}\n', "record 1: no text under `hypothesis`"),
        ('["a"]\n', "line 1: expected a JSON object"),
        ("", "empty"),
        ("\n\n", "empty"),
    ],
)
def test_broken_records_are_refused(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as refusal:
        read_hypotheses(path)
    assert message in str(refusal.value)


def test_an_unfinished_decode_file_is_refused(tmp_path):
    (tmp_path / "x.jsonl.part").write_text("{}\n")
    with pytest.raises(UserError, match="not finished"):
        read_hypotheses(tmp_path / "x.jsonl.part")


def test_references_may_be_records_too(tmp_path):
    path = write_records(tmp_path / "r.jsonl", [{"reference": "a"}, {"reference": "b"}])
    assert read_references(path) == ["a", "b"]
    with pytest.raises(UserError, match="`hypothesis`"):
        read_hypotheses(path)
