"""German sentences: `Heute hilft die alte Frau wirklich einem Kind.`, `Die alte Frau hilft heute einem Kind.`.

The verb stands second; articles and adjective endings follow gender, case and article; which case the object takes is
the verb's own business, so two synonyms may ask for different cases (`unterstützt den Mann`, `hilft dem Mann`).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from convexlm.tinyworld import lexicon
from convexlm.tinyworld.meaning import adjectives_of
from convexlm.tinyworld.style import Clause, Slot, Style

if TYPE_CHECKING:
    from convexlm.tinyworld.meaning import Meaning

_ARTICLES = {
    # (definite, case): article for m, f, n
    (True, "nom"): {"m": "der", "f": "die", "n": "das"},
    (True, "acc"): {"m": "den", "f": "die", "n": "das"},
    (True, "dat"): {"m": "dem", "f": "der", "n": "dem"},
    (False, "nom"): {"m": "ein", "f": "eine", "n": "ein"},
    (False, "acc"): {"m": "einen", "f": "eine", "n": "ein"},
    (False, "dat"): {"m": "einem", "f": "einer", "n": "einem"},
}


def article(gender: str, case: str, definite: bool) -> str:
    """The article of a singular noun; `case` is `nom`, `acc` or `dat`."""
    return _ARTICLES[definite, case][gender]


def adjective_ending(gender: str, case: str, definite: bool) -> str:
    """The ending of an adjective after that article.

    `-en` in the dative and the masculine accusative; else `-e`, but where `ein` shows no gender the adjective does.
    """
    if case == "dat" or (case == "acc" and gender == "m"):
        return "en"
    if not definite and gender != "f":
        return {"m": "er", "n": "es"}[gender]
    return "e"


@cache
def noun_phrase(noun: str, adjective: str | None, definite: bool, case: str, style: Style) -> Slot:
    """A noun phrase with a leading space: ` einem alten Mann`, ` die Lampe`."""
    phrases = []
    for form, p in zip(*_forms_and_weights(noun, style), strict=True):
        word = form.oblique if form.oblique and case != "nom" else form.form
        start = f" {article(form.gender, case, definite)}"
        if adjective is None:
            phrases.append((f"{start} {word}", p))
            continue
        ending = adjective_ending(form.gender, case, definite)
        for stem, q in style.slot(adjectives_of(noun)[adjective].de):
            phrases.append((f"{start} {stem}{ending} {word}", p * q))
    return tuple(phrases)


def _forms_and_weights(noun: str, style: Style) -> tuple[tuple[lexicon.GermanNoun, ...], tuple[float, ...]]:
    forms = (lexicon.PERSONS | lexicon.THINGS)[noun].de
    return forms, style.weights[len(forms) - 1]


def clauses(meaning: Meaning, style: Style) -> list[Clause]:
    """The sentence patterns of a style, one for each verb; their shares sum to 1."""
    verbs = (lexicon.VERBS_WITH_THINGS | lexicon.VERBS_WITH_PERSONS)[meaning.verb].de
    on_object, adjective = meaning.describes_object, meaning.adjective
    subject = noun_phrase(meaning.subject, None if on_object else adjective, True, "nom", style)
    adverb = style.slot(lexicon.ADVERBS[meaning.adverb].de)
    patterns = []
    for verb, share in zip(verbs, style.weights[len(verbs) - 1], strict=True):
        thing = noun_phrase(meaning.object, adjective if on_object else None, meaning.definite, verb.case, style)
        thing = style.with_particle(f" {lexicon.PARTICLES['de']}", thing)
        slots: tuple[Slot, ...]
        if style.adverb_first:
            opening = tuple((f"{word[0].upper()}{word[1:]} {verb.form}", p) for word, p in adverb)
            slots = (opening, subject, thing, ((".", 1.0),))
        else:
            opening = tuple((f"{text[1].upper()}{text[2:]}", p) for text, p in subject)
            slots = (opening, tuple((f" {verb.form} {word}", p) for word, p in adverb), thing, ((".", 1.0),))
        patterns.append(Clause(share, slots))
    return patterns
