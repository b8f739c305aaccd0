"""Where a score is made: the sentences of every test set parted by a measure of theirs, and each part scored.

Parts are the quarters of a test set by the length of its sources, or by how unlikely the model that all arms start
from finds the references. Nothing here is a test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convexlm.descriptions import tokens_of
from convexlm.scoring import score_from_statistics, sentence_statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from convexlm.decoded import Decoded

BUCKETS = 4


def scores_by_length(
    final: Sequence[Decoded], arms: Sequence[str], searches: Sequence[str], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """`scores_in_parts` by the length of the sources, in tokens (see `tokens_of`)."""
    import numpy as np

    def lengths(entry: Decoded) -> np.ndarray:
        language = entry.test_set.pair.split("-")[0]
        return np.asarray([len(tokens_of(source, language)) for source in entry.test_set.sources])

    rows = scores_in_parts(final, arms, searches, metrics, lengths)
    return [
        {key: value for key, value in row.items() if key not in ("low", "high")}
        | {"shortest": int(row["low"]), "longest": int(row["high"])}
        for row in rows
    ]


def scores_in_parts(
    final: Sequence[Decoded],
    arms: Sequence[str],
    searches: Sequence[str],
    metrics: Sequence[str],
    measure: Callable[[Decoded], np.ndarray],
) -> list[dict[str, Any]]:
    """Scores of the sentences with low and high values of a measure: every test set is parted at its quartiles.

    Equal values stay together, so that parts may differ in size, or be missing. Sentences whose value is NaN are left
    out.

    Args:
        final: the decode files that are compared.
        arms: in the order wanted.
        searches: likewise.
        metrics: the recipe's; the score is chrF where it is among them, since BLEU says little of few sentences; else
            the first.
        measure: the value of every sentence of a decode file's test set, (sentences,).

    Returns:
        One row a search, arm and part: `metric`, `bucket` (0, the lowest, to 3), `score` (mean over test sets and
        seeds), `num_sentences` (of one seed), `low`, `high` (the least and largest value in the part over all test
        sets) and `median` (mean over test sets).
    """
    import numpy as np

    metric = "chrf" if "chrf" in metrics else metrics[0]
    parts: dict[tuple[str, str, int], list[tuple[int, float, int, float, float, float]]] = {}
    for entry in final:
        values = np.asarray(measure(entry))
        known = ~np.isnan(values) if values.dtype.kind == "f" else np.ones(len(values), dtype=bool)
        if not known.any():
            continue
        edges = np.quantile(values[known], [part / BUCKETS for part in range(1, BUCKETS)])
        buckets = np.where(known, np.searchsorted(edges, values, side="left"), -1)
        built = entry.scorer.metrics[metric]
        statistics = sentence_statistics(built, entry.hypotheses)
        for bucket in sorted(set(buckets[known].tolist())):
            inside = buckets == bucket
            score = score_from_statistics(built, statistics[inside].sum(0))
            mine = values[inside]
            span = (int(inside.sum()), float(mine.min()), float(mine.max()), float(np.median(mine)))
            parts.setdefault((entry.search, entry.run.arm, bucket), []).append((entry.run.seed, score, *span))
    rows = []
    for search in searches:
        for arm in arms:
            for bucket in range(BUCKETS):
                if found := parts.get((search, arm, bucket)):
                    first = found[0][0]
                    rows.append(
                        {
                            "search": search,
                            "arm": arm,
                            "metric": metric,
                            "bucket": bucket,
                            "score": sum(part[1] for part in found) / len(found),
                            "num_sentences": sum(part[2] for part in found if part[0] == first),
                            "low": min(part[3] for part in found),
                            "high": max(part[4] for part in found),
                            "median": sum(part[5] for part in found) / len(found),
                        }
                    )
    return rows
