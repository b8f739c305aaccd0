"""English sentences: `Today the old woman really buys a book.`, `The old woman buys a book today.`."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from convexlm.tinyworld import lexicon
from convexlm.tinyworld.meaning import adjectives_of
from convexlm.tinyworld.style import Clause, Slot, Style

if TYPE_CHECKING:
    from convexlm.tinyworld.meaning import Meaning

# Words that are written with a vowel and spoken with a consonant ("a used car").
_SPOKEN_WITH_CONSONANT = ("used",)


def indefinite_article(following: str) -> str:
    """`a` or `an`, by the word that follows."""
    vowel = following[0] in "aeiou" and following not in _SPOKEN_WITH_CONSONANT
    return "an" if vowel else "a"


@cache
def noun_phrase(noun: str, adjective: str | None, definite: bool, style: Style) -> Slot:
    """A noun phrase with a leading space: ` the old woman`, ` an odd picture`."""
    nouns = (lexicon.PERSONS | lexicon.THINGS)[noun].en
    words = style.slot(nouns)
    if adjective is not None:
        adjectives = style.slot(adjectives_of(noun)[adjective].en)
        words = tuple((f"{a} {n}", p * q) for a, p in adjectives for n, q in words)
    return tuple(
        (f" the {text}" if definite else f" {indefinite_article(text.split(' ')[0])} {text}", p) for text, p in words
    )


def clauses(meaning: Meaning, style: Style) -> list[Clause]:
    """The sentence patterns of a style; their shares sum to 1."""
    verbs = lexicon.VERBS_WITH_THINGS | lexicon.VERBS_WITH_PERSONS
    on_object, adjective = meaning.describes_object, meaning.adjective
    subject = noun_phrase(meaning.subject, None if on_object else adjective, True, style)
    verb = style.slot([f" {form}" for form in verbs[meaning.verb].en])
    verb = style.with_particle(f" {lexicon.PARTICLES['en']}", verb)
    thing = noun_phrase(meaning.object, adjective if on_object else None, meaning.definite, style)
    adverb = style.slot(lexicon.ADVERBS[meaning.adverb].en)
    slots: tuple[Slot, ...]
    if style.adverb_first:
        slots = (tuple((word.capitalize(), p) for word, p in adverb), subject, verb, thing, ((".", 1.0),))
    else:
        opening = tuple((text.strip().capitalize(), p) for text, p in subject)
        slots = (opening, verb, thing, tuple((f" {word}.", p) for word, p in adverb))
    return [Clause(1.0, slots)]
