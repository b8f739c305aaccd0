"""Which test sets hold the same sentences: two references apart, or both directions of one parallel text.

A test that drew the sentences of each anew would count every sentence as several, and its p would be too small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from convexlm.errors import UserError
from convexlm.files import text_sha256

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convexlm.testsets import TestSet


def sentence_groups(sets: Sequence[TestSet]) -> list[str]:
    """A label for every test set: equal ones hold the same sentences in the same order, and are resampled together.

    Two do where a text of the one, sources or references, is a text of the other, line by line.
    """
    names = [f"{one.name} {one.pair}" for one in sets]
    labels = list(names)
    owner: dict[str, int] = {}
    for index, one in enumerate(sets):
        for stream in _streams(one):
            other = owner.setdefault(text_sha256(stream), index)
            if labels[other] != labels[index]:
                first, later = sorted((labels[other], labels[index]), key=names.index)
                labels = [first if label == later else label for label in labels]
    return labels


def check_whole(sets: Sequence[TestSet]) -> None:
    """See that no two test sets share most of their sentences without being the same, which no test could heed.

    Raises:
        UserError: two share more than half of the smaller one's.
    """
    labels = sentence_groups(sets)
    for index, one in enumerate(sets):
        for label, other in zip(labels[:index], sets[:index], strict=True):
            if label == labels[index]:
                continue
            smaller = min(len(one.sources), len(other.sources))
            shared = max(len(set(mine) & set(theirs)) for mine in _streams(one) for theirs in _streams(other))
            if 2 * shared > smaller:
                raise UserError(
                    f"test sets `{other.name}` {other.pair} and `{one.name}` {one.pair} share {shared} sentences of "
                    f"{smaller}, which a test would count twice; leave one out, or give both whole and in one order"
                )


def _streams(one: TestSet) -> list[list[str]]:
    return [one.sources, *one.references]
