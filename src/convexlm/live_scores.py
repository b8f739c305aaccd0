"""The latest scores while a run goes on, for the progress lines; the figures that count are made at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convexlm.scoring import Scorer
from convexlm.segments import read_hypotheses

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from convexlm.testsets import TestSet


class LiveScores:
    """Scores decode files by a recipe's first metric as they are done."""

    def __init__(self, sets: Sequence[TestSet], metric: str) -> None:
        self._metric = metric
        self._sets = {(one.name, one.pair): one for one in sets if one.references}
        self._scorers: dict[tuple[str, str], Scorer] = {}

    def said(self, results: Iterable[Any]) -> str:
        """Such as `bleu 31.32 greedy, 35.72 beam5`: the mean over test sets and directions, a search each.

        Args:
            results: `DecodeResult`s of one checkpoint; empty text where none of them has references.
        """
        found: dict[str, list[float]] = {}
        for result in results:
            key = (result.test_set, result.pair)
            if key in self._sets:
                score = self._scorer(key).score(read_hypotheses(result.output_file), label=str(result.output_file))
                found.setdefault(result.search, []).append(score[0].score)
        means = [f"{sum(scores) / len(scores):.2f} {search}" for search, scores in found.items()]
        return f"{self._metric} {', '.join(means)}" if means else ""

    def _scorer(self, key: tuple[str, str]) -> Scorer:
        if key not in self._scorers:
            self._scorers[key] = Scorer(self._sets[key].references, key[1].split("-")[1], [self._metric])
        return self._scorers[key]
