"""Test sets of the same sentences count once: their sentences are drawn together."""

from __future__ import annotations

import random

import pytest

from convexlm.errors import UserError
from convexlm.preflight import check_apart
from convexlm.same_sentences import sentence_groups
from convexlm.significance import Corpus, joint_test
from convexlm.testsets import TestSet


def lines(seed: int, count: int = 20) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(1000)}" for _ in range(8)) for _ in range(count)]


def make(name: str, pair: str, sources: list[str], *references: list[str]) -> TestSet:
    return TestSet(name, pair, sources, list(references), [str(n) for n in range(len(sources))])


EN, DE, DE2, FR, OTHER, ELSE = (lines(seed) for seed in range(6))


@pytest.mark.parametrize(
    ("sets", "groups"),
    [
        ([("a", "en-de", EN, DE), ("b", "en-de", EN, DE2)], ["a en-de", "a en-de"]),  # two references apart
        ([("a", "en-de", EN, DE), ("a", "de-en", DE, EN)], ["a en-de", "a en-de"]),  # both directions
        ([("a", "en-de", EN, DE), ("a", "de-fr", DE, FR)], ["a en-de", "a en-de"]),  # one text in three languages
        ([("a", "en-de", EN, DE), ("a", "de-en", OTHER, ELSE)], ["a en-de", "a de-en"]),
        ([("a", "en-de", EN, DE), ("b", "en-de", EN[:-1], DE[:-1])], ["a en-de", "b en-de"]),
        # The third belongs to both, which have nothing in common.
        ([("a", "en-de", EN, DE), ("b", "en-fr", OTHER, FR), ("c", "de-fr", DE, FR)], ["a en-de"] * 3),
        ([("a", "en-de", EN, DE, DE2), ("b", "de-en", DE2, EN)], ["a en-de"] * 2),
    ],
)
def test_sets_with_a_text_in_common_are_one_group(sets, groups):
    assert sentence_groups([make(*one) for one in sets]) == groups


def test_a_set_twice_has_the_p_of_the_set_once():
    """As a group; as two it would look like twice the sentences."""
    draw = random.Random(7)

    def spoilt(share: float) -> list[str]:
        return [" ".join("x" if draw.random() < share else word for word in line.split()) for line in DE]

    systems = {"one": spoilt(0.3), "other": spoilt(0.22)}

    def row(groups):
        corpora = [Corpus(str(n), "de", systems, [DE], group=group) for n, group in enumerate(groups)]
        return next(row for row in joint_test(corpora, ["chrf"], n_samples=400) if row["system"] == "other")

    once, twice, apart = row(["a"]), row(["a", "a"]), row(["a", "b"])
    for name in ("delta", "delta_low", "delta_high", "p_two_sided"):
        assert twice[name] == pytest.approx(once[name], abs=1e-9)
    assert apart["delta_high"] - apart["delta_low"] < 0.9 * (once["delta_high"] - once["delta_low"])


@pytest.mark.parametrize("order", [1, -1])
def test_a_set_that_is_a_part_of_another_is_refused(order):
    whole, part = make("a", "en-de", EN, DE), make("b", "en-de", EN[:12], DE[:12])
    with pytest.raises(UserError, match="share 12 sentences of 12, which a test would count twice"):
        check_apart([whole, part][::order], [])
    shuffled = make("c", "en-de", EN[::-1], DE[::-1])
    with pytest.raises(UserError, match="in one order"):
        check_apart([whole, shuffled][::order], [])
    few = make("d", "en-de", [*EN[:5], *OTHER[5:]], [*DE[:5], *ELSE[5:]])
    check_apart([whole, few][::order], [])
    check_apart([whole, make("e", "de-en", DE, EN)], [])
