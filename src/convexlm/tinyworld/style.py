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
    """A construction: weights of a concept's 1 to 5 synonyms, how often it has a particle, and what comes first."""

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


_NO_CHOICE = (1.0,)
PLAIN = Style(
    "plain", (_NO_CHOICE, (0.93, 0.07), (0.90, 0.06, 0.04), (), (0.90, 0.04, 0.03, 0.02, 0.01)), 0.0, adverb_first=False
)
FREE = Style(
    "free", (_NO_CHOICE, (0.47, 0.53), (0.35, 0.37, 0.28), (), (0.22, 0.21, 0.20, 0.19, 0.18)), 0.2, adverb_first=True
)

PLAIN_SHARE = {"now": 0.15, "often": 0.165, "usually": 0.18, "suddenly": 0.20, "finally": 0.24, "secretly": 0.28}
"""How often a sentence with this adverb takes the plain construction."""


def combine(*slots: Slot) -> Slot:
    """One slot for several: every combination, in order, with the product of the probabilities."""
    combined: Slot = (("", 1.0),)
    for slot in slots:
        combined = tuple((left + text, p * q) for left, p in combined for text, q in slot)
    return combined
