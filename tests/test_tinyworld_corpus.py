"""What the embedded corpus gives out: samples against its own probabilities, records, tokenizer, test sets."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter

import pytest
from scipy.stats import chisquare

from convexlm import tinyworld
from convexlm.errors import UserError
from convexlm.testsets import load_test_set
from convexlm.tinyworld import DIRECTIONS, Meaning, all_meanings, grammar
from convexlm.tinyworld.meaning import sample_meanings, split_of
from convexlm.tinyworld.style import FREE, PLAIN
from convexlm.tinyworld.tokenizer import train_tokenizer

HELP = Meaning("woman", "help", True, "man", "aged", True, "now")

# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_sampling_follows_the_exact_probabilities(direction):
    """Chi-square of 4000 draws for one meaning against the exact distribution, rare texts in one cell."""
    from convexlm.tinyworld.corpus import _sample
    from convexlm.tinyworld.meaning import make_random

    language = direction.split("-")[1]
    truth = tinyworld.renderings(HELP, language)
    rng = make_random("chi-square", direction)
    draws = 4000
    counts = Counter(_sample(grammar.clauses(HELP, language), rng) for _ in range(draws))
    assert counts.keys() <= truth.keys()
    common = [text for text, p in truth.items() if p * draws >= 8]
    observed = [counts[text] for text in common]
    expected = [truth[text] * draws for text in common]
    assert len(common) > 20
    p_value = chisquare([*observed, draws - sum(observed)], [*expected, draws - sum(expected)]).pvalue
    assert p_value > 0.001


def test_target_does_not_depend_on_the_source_wording():
    """Given the meaning, source and target are independent: p(target | source) is p(target | meaning)."""
    pairs = tinyworld.sample_corpus("en-de", 20000, seed=5)
    table = Counter(
        (pair.source.startswith("The"), pair.target.startswith(("Der", "Die", "Das")))
        for pair in pairs
        if pair.meaning.adverb == "secretly"
    )
    n = sum(table.values())
    for source, target in itertools.product((True, False), repeat=2):
        row = table[source, True] + table[source, False]
        column = table[True, target] + table[False, target]
        assert abs(table[source, target] / n - row * column / n**2) < 0.02


def test_corpus_is_clean_without_noise_and_a_prefix_of_a_larger_one():
    pairs = tinyworld.sample_corpus("zh-en", 300, seed=4)
    assert pairs == tinyworld.sample_corpus("zh-en", 400, seed=4)[:300]
    assert len({pair.id for pair in pairs}) == 300
    assert tinyworld.sample_corpus("zh-en", 300, seed=5) != pairs
    for pair in pairs:
        assert not pair.noisy
        assert tinyworld.meaning_of(pair.source, "zh") == pair.meaning == tinyworld.meaning_of(pair.target, "en")


@pytest.mark.parametrize("noise", [0.02, 0.25, 1.0])
def test_noise_exchanges_its_share_of_targets(noise):
    clean = tinyworld.sample_corpus("en-de", 400, seed=9)
    noisy = tinyworld.sample_corpus("en-de", 400, seed=9, noise=noise)
    assert sum(pair.noisy for pair in noisy) == round(noise * 400)
    assert Counter(pair.target for pair in clean) == Counter(pair.target for pair in noisy)  # exchanged, not invented
    for before, after in zip(clean, noisy, strict=True):
        assert (before.source, before.id, before.meaning) == (after.source, after.id, after.meaning)
        if after.noisy:
            assert tinyworld.probability(after.source, after.target, "en-de") == 0.0
        else:
            assert after == before
    exchanged = [(before.target, after.target) for before, after in zip(clean, noisy, strict=True) if after.noisy]
    assert all(before != after for before, after in exchanged)


def test_bad_arguments_are_refused():
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="share from 0 to 1"):
            tinyworld.sample_corpus("en-de", 10, 1, noise=bad)
    with pytest.raises(ValueError, match="too few"):
        tinyworld.sample_corpus("en-de", 1, 1, noise=1.0)
    with pytest.raises(ValueError, match="at least 1"):
        tinyworld.sample_corpus("en-de", 0, 1)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        tinyworld.sample_corpus("en-de", 3, 1, split="dev")
    with pytest.raises(ValueError, match="no direction"):
        tinyworld.sample_corpus("en-fr", 3, 1)


def test_train_and_test_meanings_are_disjoint():
    splits = Counter(split_of(meaning) for meaning in all_meanings())
    assert sum(splits.values()) == len(set(all_meanings())) > 50_000
    assert splits["test"] / sum(splits.values()) == pytest.approx(0.1, abs=0.01)
    assert {split_of(meaning) for meaning in sample_meanings(1, 3000, "train")} == {"train"}
    assert {split_of(meaning) for meaning in sample_meanings(1, 3000, "test")} == {"test"}


def test_another_process_and_hash_seed_draw_the_same():
    code = (
        "import hashlib\n"
        "from convexlm.tinyworld import sample_corpus, translations\n"
        "pairs = [p for d in ('en-de', 'zh-en') for p in sample_corpus(d, 200, 7, noise=0.1)]\n"
        "tables = [list(translations(p.source, 'en-de').items()) for p in pairs[:5]]\n"
        "print(hashlib.sha256(repr((pairs, tables)).encode()).hexdigest())\n"
    )
    digests = set()
    for hash_seed in ("0", "1", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", code]
        digests.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(digests) == 1


def test_records_are_alpaca_records():
    pairs = tinyworld.sample_corpus("en-zh", 3, seed=1)
    records = tinyworld.records(pairs, "en-zh")
    assert json.loads(json.dumps(records)) == [
        {
            "instruction": "Translate the following sentences from English to Chinese.",
            "input": pair.source,
            "output": pair.target,
        }
        for pair in pairs
    ]


# --- tokenizer -------------------------------------------------------------------------------------------------------

HOSTILE = [
    "",
    " ",
    "  two  blanks \t and\ttabs ",
    "line\nbreak\r\nand\rmore\n\n\n",
    "\x00\x01\x7f\x85\u2028\u2029\ufeff\ufffd",
    "e\u0301 \u1e9b\u0323 \uac00 \u200b\u200d\u202e",
    "\U0001f469\u200d\U0001f692 \U0001d54f \U0010ffff",
    "Ġ Ċ č Ń the byte alphabet's own letters",
    "### Response:### Input:\n\n### Instruction:\n",
    "今天天气很好。 Ελληνικά العربية עברית हिन्दी",
    "don't can't 'tis  ''quoted''",
]


@pytest.fixture(scope="module")
def texts():
    return [text for d in DIRECTIONS for p in tinyworld.sample_corpus(d, 3000, 1) for text in (p.source, p.target)]


def test_tokenizer_round_trip_of_hostile_text(texts, tmp_path):
    from transformers import AutoTokenizer

    from convexlm.templates import get_template

    tokenizer = train_tokenizer(texts, vocab_size=1024)
    prompts = [
        get_template("alpaca").fill(r) for r in tinyworld.records(tinyworld.sample_corpus("en-de", 3, 1), "en-de")
    ]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*HOSTILE, *texts[:200], *prompts, *(p + "\n" for p in prompts)]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)
    assert len(tokenizer) == 1024
    assert len(train_tokenizer(texts)) <= 2048
    specials = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert specials == ("<s>", "</s>", "<pad>")
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_a_prompt_is_few_tokens_and_a_target_seven_to_ten():
    from convexlm.templates import get_template

    pairs = tinyworld.sample_corpus("en-de", 8000, seed=1)
    tokenizer = train_tokenizer([text for p in pairs for text in (p.source, p.target)], vocab_size=1280)
    for record in tinyworld.records(pairs[:100], "en-de"):
        prompt = get_template("alpaca").fill(record)
        assert len(tokenizer(prompt)["input_ids"]) - len(tokenizer(record["input"])["input_ids"]) <= 5
    lengths = [len(tokenizer(pair.target)["input_ids"]) for pair in pairs]
    assert 7 <= sum(lengths) / len(lengths) <= 9


def test_tokenizer_is_deterministic(texts):
    assert train_tokenizer(texts).get_vocab() == train_tokenizer(list(texts)).get_vocab()
    with pytest.raises(ValueError, match="too small"):
        train_tokenizer(texts, vocab_size=200)


# --- the test set kind -----------------------------------------------------------------------------------------------


def test_test_set_kind():
    test_set = load_test_set({"name": "tinyworld", "kind": "tinyworld", "seed": 3, "size": 40}, "de-en")
    pairs = tinyworld.sample_corpus("de-en", 40, 3, split="test")
    assert test_set.sources == [pair.source for pair in pairs]
    assert test_set.references == [[pair.target for pair in pairs]]
    assert test_set.ids == [str(i) for i in range(40)]
    assert test_set.meta == {"kind": "tinyworld", "direction": "de-en", "seed": 3, "size": 40, "split": "test"}
    limited = load_test_set({"name": "t", "kind": "tinyworld", "seed": 3, "size": 40, "limit": 5}, "de-en")
    assert limited.sources == test_set.sources[:5]
    judged = tinyworld.judge(test_set.sources, test_set.references[0], test_set.meta["direction"])
    assert judged["valid_share"] == 1.0


@pytest.mark.parametrize(
    ("entry", "pair"),
    [
        ({}, "de-zh"),
        ({"size": 0}, "en-de"),
        ({"seed": "x"}, "en-de"),
        ({"split": "dev"}, "en-de"),
        ({"sed": 1}, "en-de"),
    ],
)
def test_test_set_mistakes_are_one_line(entry, pair):
    with pytest.raises(UserError):
        load_test_set({"name": "tinyworld", "kind": "tinyworld", **entry}, pair)


def test_plain_and_free_weights_are_distributions():
    for style in (PLAIN, FREE):
        for count, weights in enumerate(style.weights, start=1):
            assert len(weights) == count
            assert math.fsum(weights) == pytest.approx(1.0, abs=1e-12)
            assert len(set(weights)) == count
        assert 0 <= style.particle < 1
