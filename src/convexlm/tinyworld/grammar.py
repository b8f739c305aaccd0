"""The exact distribution over translations: what a meaning can be called, and what a text means.

A text means one thing only (`tests/test_tinyworld.py` proves it for every text of the grammar), so the translations of
a source are the renderings of its meaning in the other language, with the same probabilities.
"""

from __future__ import annotations

import itertools
import math
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from convexlm.tinyworld import chinese, english, german, lexicon
from convexlm.tinyworld.meaning import Meaning, adjectives_of, objects_of
from convexlm.tinyworld.style import FREE, PLAIN, PLAIN_SHARE, Clause

if TYPE_CHECKING:
    from collections.abc import Iterable

DIRECTIONS = ("en-de", "de-en", "en-zh", "zh-en")
_LANGUAGES = {"en": english, "de": german, "zh": chinese}


def split_direction(direction: str) -> tuple[str, str]:
    """`en-de` -> (`en`, `de`).

    Raises:
        ValueError: a direction that the tiny world does not have.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"the tiny world has no direction {direction!r}; it has {', '.join(DIRECTIONS)}")
    source, target = direction.split("-")
    return source, target


def clauses(meaning: Meaning, language: str) -> list[Clause]:
    """Every sentence pattern for a meaning; the shares sum to 1."""
    module = _LANGUAGES[language]
    share = PLAIN_SHARE[meaning.adverb]
    plain, free = module.clauses(meaning, PLAIN), module.clauses(meaning, FREE)
    return [Clause(share * c.share, c.slots) for c in plain] + [Clause((1 - share) * c.share, c.slots) for c in free]


@lru_cache(maxsize=4096)
def _renderings(meaning: Meaning, language: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for clause in clauses(meaning, language):
        for words in itertools.product(*clause.slots):
            text = "".join(word for word, _ in words)
            found[text] = found.get(text, 0.0) + clause.share * math.prod(p for _, p in words)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def renderings(meaning: Meaning, language: str) -> dict[str, float]:
    """Every sentence for a meaning with its probability, the likeliest first."""
    return dict(_renderings(meaning, language))


def _forms(entry: lexicon.Noun | lexicon.Verb | lexicon.Adjective | lexicon.Adverb, language: str) -> list[str]:
    """The strings by which a concept shows in a text (German endings left off), in lower case."""
    value = getattr(entry, language)
    words: Iterable[object] = (value,) if isinstance(value, str) else value
    return [str(getattr(word, "form", word)).lower() for word in words]


@cache
def _inventory(kind: str, language: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    table: dict[str, tuple[object, ...]] = {}
    for part in kind.split("+"):
        table |= getattr(lexicon, part)
    return tuple((name, tuple(_forms(entry, language))) for name, entry in table.items())  # type: ignore[arg-type]


def _shown(kind: str, language: str, text: str) -> list[str]:
    return [name for name, forms in _inventory(kind, language) if any(form in text for form in forms)]


@lru_cache(maxsize=65536)
def meanings_of(text: str, language: str) -> tuple[Meaning, ...]:
    """Every meaning that `text` can render: one for a sentence of the tiny world, none for any other text.

    Concepts whose words occur in the text make the candidates; a candidate counts if its renderings hold the text.
    """
    lower = text.lower()
    nouns = _shown("PERSONS+THINGS", language, lower)
    found = []
    for adverb in _shown("ADVERBS", language, lower):
        for verb in _shown("VERBS_WITH_THINGS+VERBS_WITH_PERSONS", language, lower):
            for subject, thing in itertools.permutations(nouns, 2):
                if subject not in lexicon.PERSONS or thing not in objects_of(verb):
                    continue
                for on_object in (False, True):
                    kind = "THINGS" if on_object and thing in lexicon.THINGS else "PERSONS"
                    for adjective in _shown(f"ADJECTIVES_OF_{kind}", language, lower):
                        for definite in (False, True):
                            meaning = Meaning(subject, verb, definite, thing, adjective, on_object, adverb)
                            assert adjective in adjectives_of(thing if on_object else subject)
                            if text in _renderings(meaning, language):
                                found.append(meaning)
    return tuple(found)


def meaning_of(text: str, language: str) -> Meaning:
    """What a sentence of the tiny world means.

    Raises:
        ValueError: the text is no sentence of the tiny world in that language.
    """
    found = meanings_of(text, language)
    if len(found) != 1:
        raise ValueError(f"not a sentence of the tiny world in {language!r}: {text!r}")
    return found[0]


def translations(source: str, direction: str) -> dict[str, float]:
    """The exact distribution over translations of a source text, the likeliest first; it sums to 1.

    Raises:
        ValueError: unknown direction, or `source` is no sentence of the tiny world.
    """
    source_language, target_language = split_direction(direction)
    return renderings(meaning_of(source, source_language), target_language)


def probability(source: str, target: str, direction: str) -> float:
    """The exact probability of one translation; 0 for a text that is no translation of `source`."""
    return translations(source, direction).get(target, 0.0)


def most_probable(source: str, direction: str) -> str:
    """The one likeliest translation of a source text."""
    return next(iter(translations(source, direction)))


def entropy(source: str, direction: str) -> float:
    """The entropy of the translations of a source text, in nats."""
    return -math.fsum(p * math.log(p) for p in translations(source, direction).values())
