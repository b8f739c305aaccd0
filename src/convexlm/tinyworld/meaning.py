"""Meanings: what a sentence of the tiny world says, independent of any language."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING

from convexlm.tinyworld import lexicon

if TYPE_CHECKING:
    from collections.abc import Iterator

SPLITS = ("train", "test")
_TEST_TENTHS = 1


@dataclass(frozen=True, slots=True)
class Meaning:
    """Who does what to whom, when: `subject`, `verb`, `object` and `adverb` are concept names of `lexicon.py`.

    `definite` is the object's article (the subject is always definite); `adjective` belongs to the object if
    `describes_object`, to the subject otherwise.
    """

    subject: str
    verb: str
    definite: bool
    object: str
    adjective: str
    describes_object: bool
    adverb: str

    @property
    def key(self) -> str:
        """The meaning as one line of text, for files and hashes."""
        # Field by field: `astuple` copies each one, which for all meanings together takes many seconds.
        parts = (self.subject, self.verb, self.definite, self.object, self.adjective)
        return " ".join(map(str, (*parts, self.describes_object, self.adverb)))


def objects_of(verb: str) -> dict[str, lexicon.Noun]:
    """The nouns that can be the object of a verb."""
    return lexicon.THINGS if verb in lexicon.VERBS_WITH_THINGS else lexicon.PERSONS


def adjectives_of(noun: str) -> dict[str, lexicon.Adjective]:
    """The adjectives that can describe a noun."""
    return lexicon.ADJECTIVES_OF_THINGS if noun in lexicon.THINGS else lexicon.ADJECTIVES_OF_PERSONS


def all_meanings() -> Iterator[Meaning]:
    """Every meaning of the tiny world once, in a fixed order (some 200 thousand)."""
    for subject in lexicon.PERSONS:
        for verb in (*lexicon.VERBS_WITH_THINGS, *lexicon.VERBS_WITH_PERSONS):
            for thing in objects_of(verb):
                if thing == subject:  # nobody helps themselves: German and English would want a reflexive
                    continue
                for describes_object in (False, True):
                    for adjective in adjectives_of(thing if describes_object else subject):
                        for definite in (False, True):
                            for adverb in lexicon.ADVERBS:
                                yield Meaning(subject, verb, definite, thing, adjective, describes_object, adverb)


@lru_cache(maxsize=1)
def _meanings_by_split() -> dict[str, list[Meaning]]:
    splits: dict[str, list[Meaning]] = {split: [] for split in SPLITS}
    for meaning in all_meanings():
        splits[split_of(meaning)].append(meaning)
    return splits


def split_of(meaning: Meaning) -> str:
    """`train` or `test`: a tenth of all meanings, chosen by a hash of what they say, is for testing alone."""
    digest = hashlib.blake2b(meaning.key.encode(), digest_size=4).digest()
    return "test" if int.from_bytes(digest, "big") % 10 < _TEST_TENTHS else "train"


def make_random(*what: object) -> Random:
    """A generator that depends on `what` alone, not on the process or Python's hash seed.

    Only its `random()` is used here: that sequence is the one Python keeps the same in every version.
    """
    digest = hashlib.blake2b("/".join(map(str, what)).encode(), digest_size=16).digest()
    return Random(int.from_bytes(digest, "big"))


def sample_meanings(seed: int, n: int, split: str = "train") -> list[Meaning]:
    """Draw `n` meanings uniformly, with replacement, from one split.

    Raises:
        ValueError: `n` below 1, or an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if n < 1:
        raise ValueError(f"the number of meanings must be at least 1, not {n}")
    meanings = _meanings_by_split()[split]
    rng = make_random("meanings", split, seed)
    return [meanings[int(rng.random() * len(meanings))] for _ in range(n)]
