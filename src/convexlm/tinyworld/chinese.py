"""Chinese sentences, without spaces: `现在那位年老的女人真的购买一本书籍。`, `那位年老的女人现在购买一本书籍。`.

A counted or pointed-at noun takes its measure word (`一本书籍`, `那辆汽车`, `那位女人`). English and German `the` is
`那` for the subject, `那` or `这` for the object; `a` is `一`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from convexlm.tinyworld import lexicon
from convexlm.tinyworld.meaning import adjectives_of
from convexlm.tinyworld.style import Clause, Slot, Style, combine

if TYPE_CHECKING:
    from convexlm.tinyworld.meaning import Meaning


@cache
def noun_phrase(noun: str, adjective: str | None, determiners: tuple[str, ...], style: Style) -> Slot:
    """Determiner, measure word, adjective and noun."""
    entry = (lexicon.PERSONS | lexicon.THINGS)[noun]
    start = combine(style.slot(determiners), style.slot(entry.measures))
    middle = style.slot(adjectives_of(noun)[adjective].zh) if adjective is not None else (("", 1.0),)
    return combine(start, middle, style.slot(entry.zh))


def clauses(meaning: Meaning, style: Style) -> list[Clause]:
    """The sentence patterns of a style; their shares sum to 1."""
    verbs = lexicon.VERBS_WITH_THINGS | lexicon.VERBS_WITH_PERSONS
    on_object, adjective = meaning.describes_object, meaning.adjective
    subject = noun_phrase(meaning.subject, None if on_object else adjective, ("那",), style)
    verb = style.with_particle(lexicon.PARTICLES["zh"], style.slot(verbs[meaning.verb].zh))
    determiners = ("那", "这") if meaning.definite else ("一",)
    thing = noun_phrase(meaning.object, adjective if on_object else None, determiners, style)
    adverb = style.slot(lexicon.ADVERBS[meaning.adverb].zh)
    front = (adverb, subject) if style.adverb_first else (subject, adverb)
    return [Clause(1.0, (*front, verb, thing, (("。", 1.0),)))]
