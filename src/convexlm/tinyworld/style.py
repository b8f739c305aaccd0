"""Two ways to say a thing, and the pieces that sentences are put together from.

The plain construction has one word order and nearly always takes the usual words, so its probability sits on few
sentences. The free construction has the other word order, picks synonyms almost evenly and may put in a particle, so
its probability is spread over dozens of sentences. The free one is often the likelier *first word*, while the single
likeliest *sentence* is always the plain one in its usual words: a word-by-word choice and the best sentence part ways.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

Slot = tuple[tuple[str, float], ...]
"""Interchangeable strings with their probabilities; the strings of a sentence's slots are joined without separator."""


class Style(NamedTuple):
    """A construction: weights of a concept's 1 to 3 synonyms, how often it has a particle, and what comes first."""

    name: str
    weights: tuple[tuple[float, ...], ...]
    particle: float
    adverb_first: bool

    def slot(self, texts: Sequence[str]) -> Slot:
        """The synonyms `texts`, the usual one first, with this style's probabilities."""
        return tuple(zip(texts, self.weights[len(texts) - 1], strict=True))

    def with_particle(self, particle: str, slot: Slot) -> Slot:
        """`slot` with `particle` before it, as often as this style says."""
        if not self.particle:
            return slot
        bare = tuple((text, (1 - self.particle) * weight) for text, weight in slot)
        return bare + tuple((particle + text, self.particle * weight) for text, weight in slot)


class Clause(NamedTuple):
    """A sentence pattern: its share among the renderings of a meaning, and its slots, independent of each other."""

    share: float
    slots: tuple[Slot, ...]


PLAIN = Style("plain", ((1.0,), (0.93, 0.07), (0.90, 0.06, 0.04)), particle=0.0, adverb_first=False)
# The synonym that the free construction likes best is not the usual word.
FREE = Style("free", ((1.0,), (0.42, 0.58), (0.30, 0.42, 0.28)), particle=0.15, adverb_first=True)

PLAIN_SHARE = {"now": 0.24, "often": 0.27, "usually": 0.30, "suddenly": 0.33, "finally": 0.36, "secretly": 0.41}
"""How often a sentence with this adverb takes the plain construction.

A free sentence may start with any of the 2 or 3 synonyms of the adverb. The favourite of them is a likelier start than
the plain one's for most adverbs here, by a factor from 1.4 down to 0.8.
"""


def combine(*slots: Slot) -> Slot:
    """One slot for several: every combination, in order, with the product of the probabilities."""
    combined: Slot = (("", 1.0),)
    for slot in slots:
        combined = tuple((left + text, p * q) for left, p in combined for text, q in slot)
    return combined
