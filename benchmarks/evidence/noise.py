"""Kinds of noise in parallel text: a seeded function that spoils a share of sentence pairs and says which.

`exchanged`: the chosen pairs pass their targets around among themselves, so that every target is a good sentence of
the target language under a wrong source. `wrong_language`: the target is the *source-language* sentence of another
chosen pair. `off_topic`: the target is a sentence of another text in its language. `copied`: the target is its own
source. `truncated`: the target breaks off after a quarter to three quarters of its words. `shuffled`: the target's
words stand in another order.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Pair = tuple[str, str]
    Spoil = Callable[[Sequence[Pair], Random], list[str]]


def exchanged(pairs: Sequence[Pair], random: Random) -> list[str]:
    """The targets, moved on by one place in a random order: nobody keeps his own place's."""
    return [target for _, target in _moved_on(pairs, random)]


def wrong_language(pairs: Sequence[Pair], random: Random) -> list[str]:
    """The sources, moved on by one place in a random order."""
    return [source for source, _ in _moved_on(pairs, random)]


def copied(pairs: Sequence[Pair], random: Random) -> list[str]:
    """Every pair's own source."""
    return [source for source, _ in pairs]


def truncated(pairs: Sequence[Pair], random: Random) -> list[str]:
    """The first words of every target: a quarter to three quarters of them, at least one."""
    out = []
    for _, target in pairs:
        words = target.split(" ")
        out.append(" ".join(words[: max(1, round(len(words) * random.uniform(0.25, 0.75)))]))
    return out


def shuffled(pairs: Sequence[Pair], random: Random) -> list[str]:
    """The words of every target in a random order."""
    out = []
    for _, target in pairs:
        words = target.split(" ")
        random.shuffle(words)
        out.append(" ".join(words))
    return out


KINDS: dict[str, Spoil] = {kind.__name__: kind for kind in (exchanged, wrong_language, copied, truncated, shuffled)}
OFF_TOPIC, MOST_WORDS = "off_topic", 25


def off_topic(other: Sequence[str], count: int, random: Random) -> list[str]:
    """Sentences of another text of at most 25 words, as captions have: each once before any comes again.

    Args:
        other: its sentences.
        count: how many to draw.
        random: draws them.

    Raises:
        ValueError: there is none of that length.
    """
    fitting = sorted({line.strip() for line in other if 0 < len(line.split()) <= MOST_WORDS})
    if not fitting:
        raise ValueError(f"`{OFF_TOPIC}` needs sentences of another text, of at most {MOST_WORDS} words")
    out: list[str] = []
    while len(out) < count:
        out += random.sample(fitting, len(fitting))
    return out[:count]


def spoil(
    pairs: Sequence[Pair], kind: str, share: float, seed: int, other: Sequence[str] = ()
) -> list[tuple[str, str, bool]]:
    """Spoil a share of the pairs, drawn by `seed`.

    Args:
        pairs: (source, target).
        kind: a name in `KINDS`, or `off_topic`.
        share: of the pairs to draw, from 0 to 1; the number is rounded.
        seed: of the draw and of the noise itself.
        other: sentences in the targets' language on something else, for `off_topic`.

    Returns:
        (source, target, clean) in the given order. A drawn pair whose target came out as it was counts as clean, so a
        few less than the share may be spoilt.

    Raises:
        ValueError: an unknown kind, a share outside 0 to 1, or no other text.
    """
    if kind not in (*KINDS, OFF_TOPIC):
        raise ValueError(f"unknown noise `{kind}`; known: {', '.join((*KINDS, OFF_TOPIC))}")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"the share of noise is from 0 to 1, not {share}")
    random = Random(f"{kind} {share} {seed}")
    chosen = sorted(random.sample(range(len(pairs)), round(share * len(pairs))))
    drawn = [pairs[place] for place in chosen]
    made = off_topic(other, len(drawn), random) if kind == OFF_TOPIC else KINDS[kind](drawn, random)
    targets = dict(zip(chosen, made, strict=True))
    return [
        (source, targets.get(place, target), targets.get(place, target) == target)
        for place, (source, target) in enumerate(pairs)
    ]


def _moved_on(pairs: Sequence[Pair], random: Random) -> list[Pair]:
    order = list(range(len(pairs)))
    random.shuffle(order)
    out = list(pairs)
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        out[here] = pairs[there]
    return out
