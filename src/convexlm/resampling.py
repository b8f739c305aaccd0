"""Resampling sentences, and what p-values and intervals are made of it.

With d the observed difference and d*_b that of resample b, out of B, there are two p-values:

- `sacrebleu_p`: (1 + #{b: |d*_b| - mean|d*| > |d|}) / (1 + B). Once d is well away from 0 only one tail can fulfil it,
  so it is about half of a two-sided p, and p < 0.05 comes by chance in about one of ten cases;
- `two_sided_p`: (1 + #{b: |d*_b - d| >= |d|}) / (1 + B), which holds its level and agrees with the 95 % interval. What
  is reported is no smaller than `least_p`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

MOST_SAMPLES = 1_000_000  # more would tell p-values apart that nobody needs to, in more memory than there is
_CELLS = 1 << 24  # resampled sentences held at a time


def check_samples(n_samples: int, least: int = 1) -> int:
    """A number of resamples that can be made, as it is.

    Raises:
        UserError: it is below `least`, or above a million.
    """
    if n_samples < least:
        raise UserError(f"the number of resamples must be at least {least}, it is {n_samples}")
    if n_samples > MOST_SAMPLES:
        raise UserError(f"the number of resamples must be at most {MOST_SAMPLES}, it is {n_samples}")
    return n_samples


def draw(
    labels: Sequence[Hashable], sizes: Sequence[int], n_samples: int, seed: int
) -> Iterator[tuple[slice, int, np.ndarray]]:
    """Draw sentences with replacement, once for all corpora of one label.

    Yields:
        Which resamples (a slice of them), which corpus, and how often each of its sentences was drawn: (resamples,
        sentences) float64. For a single corpus these are the very draws that sacreBLEU makes from the same seed.
    """
    if seed < 0:
        raise UserError(f"the seed must not be negative, it is {seed}")
    rng = np.random.default_rng(seed)
    for label in dict.fromkeys(labels):
        members = [index for index, one in enumerate(labels) if one == label]
        size = sizes[members[0]]
        if any(sizes[index] != size for index in members):
            raise UserError(f"corpora of one group hold the same sentences, but those of {label!r} differ in number")
        step = max(1, _CELLS // size)
        for start in range(0, n_samples, step):
            rows = slice(start, min(start + step, n_samples))
            count = rows.stop - rows.start
            drawn = rng.choice(size, size=(count, size), replace=True)
            # One bincount over all resamples: those of resample r are counted from r * size on.
            offsets = size * np.arange(count)[:, None]
            counts = np.bincount((drawn + offsets).ravel(), minlength=count * size).reshape(count, size)
            for index in members:
                yield rows, index, counts.astype(np.float64)


def percentile_interval(sampled: np.ndarray) -> tuple[float, float]:
    """The 2.5th and the 97.5th percentile."""
    low, high = np.quantile(sampled, [0.025, 0.975])
    return float(low), float(high)


def sacrebleu_p(deltas: np.ndarray, observed: float) -> float:
    """The p of an observed difference in sacreBLEU's convention; 1 (not its smallest p) if nothing ever differs."""
    if observed == 0 and not deltas.any():
        return 1.0
    sizes = np.abs(deltas)
    return (int(np.sum(sizes - sizes.mean() > abs(observed))) + 1) / (len(deltas) + 1)


def two_sided_p(deltas: np.ndarray, observed: float) -> float:
    """How often a resample is as far from the observed difference as that is from zero."""
    # A hair's width of tolerance: equal differences must count as such whatever order they were summed in.
    return (int(np.sum(np.abs(deltas - observed) >= abs(observed) * (1 - 1e-9))) + 1) / (len(deltas) + 1)


def least_p(parts: Sequence[tuple[Hashable, np.ndarray, np.ndarray]]) -> float:
    """The smallest p that sentences can give: 2 / 2^n where n of them differ, for they can be exchanged in 2^n ways.

    A bootstrap says less where few differ: 0.045 of four that are all better, which cannot prove more than 0.125.

    Args:
        parts: a corpus' label, and its sentences' values under both systems, (sentences,) or (sentences, statistics);
            corpora of one label hold the same sentences.
    """
    differ: dict[Hashable, np.ndarray] = {}
    for label, one, other in parts:
        here = (one != other).reshape(len(one), -1).any(1)
        differ[label] = differ[label] | here if label in differ else here
    return float(min(1.0, 2.0 ** (1 - sum(int(found.sum()) for found in differ.values()))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values, in the order given, that hold for the whole family of tests.

    The k-th smallest of n is multiplied by n - k + 1, made no smaller than those before it, and at most 1.
    """
    if any(not 0 <= p <= 1 for p in p_values):
        raise ValueError("p-values lie between 0 and 1")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
