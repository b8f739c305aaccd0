"""The embedded corpus: a small grammar of English, German and Chinese with a known distribution over translations."""

from __future__ import annotations

from convexlm.tinyworld.corpus import Pair, records, sample_corpus
from convexlm.tinyworld.grammar import (
    DIRECTIONS,
    entropy,
    meaning_of,
    most_probable,
    probability,
    renderings,
    translations,
)
from convexlm.tinyworld.judging import distribution_measures, judge
from convexlm.tinyworld.meaning import Meaning, all_meanings, sample_meanings

__all__ = [
    "DIRECTIONS",
    "Meaning",
    "Pair",
    "all_meanings",
    "distribution_measures",
    "entropy",
    "judge",
    "meaning_of",
    "most_probable",
    "probability",
    "records",
    "renderings",
    "sample_corpus",
    "sample_meanings",
    "translations",
]
