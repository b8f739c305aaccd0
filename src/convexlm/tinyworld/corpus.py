"""Sampling a parallel corpus: pairs drawn from the grammar, if wanted with a share of wrong ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from convexlm.tinyworld.grammar import clauses, probability, split_direction
from convexlm.tinyworld.meaning import make_random, sample_meanings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

    from convexlm.tinyworld.meaning import Meaning
    from convexlm.tinyworld.style import Clause


@dataclass(frozen=True, slots=True)
class Pair:
    """A source text and a target text.

    Attributes:
        source: a sentence that says `meaning` in the source language.
        target: drawn from the exact p(target | source); if `noisy`, another pair's target.
        meaning: what the source means.
        id: unique in the corpus, the same for the same seed.
        noisy: whether the target was exchanged; it is no valid translation of the source then.
    """

    source: str
    target: str
    meaning: Meaning
    id: str
    noisy: bool = False


def sample_corpus(direction: str, size: int, seed: int, noise: float = 0.0, split: str = "train") -> list[Pair]:
    """Draw `size` pairs: a meaning, a source that says it, and a target given the source, each at random.

    The same arguments give the same corpus, in any process and Python version. A larger corpus of the same seed,
    direction and split begins with the same sources.

    Args:
        direction: `en-de`, `de-en`, `en-zh` or `zh-en`.
        size: the number of pairs.
        seed: any integer.
        noise: share of pairs whose targets are exchanged among their sources, from 0 to 1; the number of such pairs is
            `noise * size`, rounded, and each of them gets a target that is wrong for its source.
        split: `train` or `test`; their meanings are disjoint.

    Raises:
        ValueError: unknown direction or split, `size` below 1, `noise` out of range, or pairs too few to exchange.
    """
    source_language, target_language = split_direction(direction)
    if not 0.0 <= noise <= 1.0:
        raise ValueError(f"noise is a share from 0 to 1, not {noise}")
    pairs = []
    rng = make_random("corpus", split, seed, direction)
    for number, meaning in enumerate(sample_meanings(seed, size, split)):
        source = _sample(clauses(meaning, source_language), rng)
        target = _sample(clauses(meaning, target_language), rng)
        pairs.append(Pair(source, target, meaning, f"{direction}.{split}.{seed}.{number}"))
    return _exchange(pairs, round(noise * size), direction, make_random("noise", split, seed, direction))


def _pick(weights: Sequence[float], rng: Random) -> int:
    point = rng.random()
    for index, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return index
    return len(weights) - 1  # the weights' rounding left a crumb


def _sample(patterns: Sequence[Clause], rng: Random) -> str:
    """One sentence: a pattern by its share, then every slot by its own probabilities."""
    clause = patterns[_pick([pattern.share for pattern in patterns], rng)]
    return "".join(slot[_pick([p for _, p in slot], rng)][0] for slot in clause.slots)


def _exchange(pairs: list[Pair], count: int, direction: str, rng: Random) -> list[Pair]:
    """Exchange the targets of `count` pairs drawn at random, so that each gets one that is wrong for its source."""
    if count == 0:
        return pairs
    order = list(range(len(pairs)))
    for place in range(len(order) - 1, 0, -1):
        other = int(rng.random() * (place + 1))
        order[place], order[other] = order[other], order[place]
    chosen = order[:count]
    # Each takes the target of the next in the circle: nobody keeps their own. Two neighbours may mean the same by
    # chance; then the giver is swapped for one that suits both places.
    givers = chosen[1:] + chosen[:1]

    def fits(place: int, giver: int) -> bool:
        taker = pairs[chosen[place]]
        if taker.meaning == pairs[giver].meaning:
            return False
        return taker.target != pairs[giver].target and not probability(taker.source, pairs[giver].target, direction)

    for place in range(count):
        if fits(place, givers[place]):
            continue
        for other in range(count):
            if fits(place, givers[other]) and fits(other, givers[place]):
                givers[place], givers[other] = givers[other], givers[place]
                break
        else:
            raise ValueError(
                f"cannot exchange the targets of {count} pairs: too few with different meanings; take more pairs"
            )
    result = list(pairs)
    for taker, giver in zip(chosen, givers, strict=True):
        result[taker] = replace(pairs[taker], target=pairs[giver].target, noisy=True)
    return result


def records(pairs: Sequence[Pair], direction: str) -> list[dict[str, str]]:
    """Pairs as Alpaca records: `instruction`, `input` (the source) and `output` (the target)."""
    from convexlm.templates import TRANSLATION_INSTRUCTION, fill_instruction

    split_direction(direction)
    instruction = fill_instruction(TRANSLATION_INSTRUCTION, direction)
    return [{"instruction": instruction, "input": pair.source, "output": pair.target} for pair in pairs]
