"""Paired approximate randomization, and sacreBLEU's own `PairedTest` as `significance` calls it.

In every trial the two outputs of each sentence are exchanged or not, and both corpora are scored. sacreBLEU counts
the trials that are *further* apart than what was observed. Here those that are as far count, too, as the test has it.
Where only a few sentences differ, many trials exchange all of them or none; without those p is 0.0001 for four better
sentences, which cannot prove more than 2 / 2^4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from convexlm.scoring import check_lengths, sacrebleu_seed, score_from_statistics, sentence_statistics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from convexlm.scoring import Scorer

_CELLS = 1 << 22  # sentences of trials that are summed at a time


def randomization_p(
    systems: Mapping[str, Sequence[str]], scorer: Scorer, metrics: Sequence[str], *, n_trials: int, seed: int
) -> dict[tuple[str, str], float]:
    """The p-values of the paired approximate randomization, by (metric, system), of all systems but the first.

    The trials are sacreBLEU's from the same seed; where none is just as far apart as what was observed, so is p.
    """
    check_lengths({"reference 1": scorer.references[0], **systems})
    baseline, *others = systems
    found = {}
    for name in metrics:
        metric = scorer.metrics[name]
        statistics = {system: sentence_statistics(metric, lines) for system, lines in systems.items()}
        for system in others:
            found[name, system] = _p(metric, statistics[baseline], statistics[system], n_trials, seed)
    return found


def _p(metric: Any, one: np.ndarray, other: np.ndarray, n_trials: int, seed: int) -> float:
    """(1 + trials that are at least as far apart) / (1 + trials), of two systems' statistics of the sentences."""

    def apart(first: np.ndarray, second: np.ndarray) -> float:
        return abs(score_from_statistics(metric, first) - score_from_statistics(metric, second))

    # Sums in another order may differ by a hair's width.
    observed = apart(one.sum(0), other.sum(0)) * (1 - 1e-9)
    exchanged = np.random.default_rng(seed).integers(2, size=(n_trials, len(one)), dtype=bool)
    total, difference, count = one.sum(0) + other.sum(0), other - one, 0
    step = max(1, _CELLS // len(one))
    for start in range(0, n_trials, step):
        for first in one.sum(0) + exchanged[start : start + step] @ difference:
            count += apart(first, total - first) >= observed
    return (1 + count) / (1 + n_trials)


def sacrebleu_test(
    systems: Mapping[str, Sequence[str]],
    scorer: Scorer,
    metrics: Sequence[str],
    method: str,
    n_samples: int,
    seed: int,
    resamples: int,
) -> tuple[Any, Any]:
    """Signatures and results of sacreBLEU's `PairedTest`; `resamples` (above 0) is what intervals of `ar` rest on."""
    from numpy.random import SeedSequence
    from sacrebleu.significance import PairedTest

    with sacrebleu_seed(seed):
        test = PairedTest(
            [(name, list(lines)) for name, lines in systems.items()],
            {name: scorer.metrics[name] for name in metrics},
            None,
            test_type=method,
            n_samples=n_samples,
            n_ar_confidence=resamples if method == "ar" else -1,
        )
        if seed == 0:
            test._seed = SeedSequence(0)  # PairedTest takes 0 for no seed; this draws the same and is not falsy
        return test()
