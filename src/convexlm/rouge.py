"""ROUGE in the shape of a sacreBLEU metric, so that intervals and paired tests work on it as on BLEU.

The numbers are rouge-score's: the F1 of every segment (the best reference where there are several), times 100, and
their mean over the corpus. rouge-score has no signatures; the one here is our own, in sacreBLEU's notation.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sacrebleu.metrics.base import Metric, Score, Signature

from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence


_SENTENCE_END, _LINE_ENDS = re.compile(r"(?<=[.!?])\s+"), re.compile(r"[\r\n]+")


class RougeSignature(Signature):
    """How a ROUGE score was made: number of references, stemmer, sentence split, package and its version."""

    def __init__(self, args: dict[str, Any]) -> None:
        super().__init__(args)
        self.info.update(
            {
                "case": "lc",
                "tok": "a-z0-9",
                "stem": args["stemmer"],
                "sents": args["sentences"],
                "agg": "mean-f1",
                "impl": "rouge-score",
                "version": version("rouge-score"),
            }
        )


class Rouge(Metric):
    """ROUGE-1, ROUGE-2 or ROUGE-Lsum by rouge-score.

    ROUGE-Lsum compares sentences. Decoded answers are one line, and so are references in a text file, where a data
    set has a sentence a line; so both are parted by the same rule, after `.`, `!` or `?` before a blank, and line ends
    count as blanks. rouge-score itself goes by line ends, by which a one-line answer is a single sentence.

    Args:
        kind: `rouge1`, `rouge2` or `rougeLsum`.
        stemmer: apply the English Porter stemmer.
        references: reference streams, None where one has none, kept for all systems that are scored against them.

    Raises:
        UserError: the references are in a script that rouge-score's tokenizer (`a-z0-9`) drops.
    """

    _SIGNATURE_TYPE = RougeSignature

    def __init__(self, kind: str, *, stemmer: bool, references: Sequence[Sequence[Any]]) -> None:
        super().__init__()
        from rouge_score.rouge_scorer import RougeScorer

        self.kind = kind
        self.stemmer = stemmer
        _check_script(references)
        self._scorer = RougeScorer([kind], use_stemmer=stemmer)
        self.sentences = "punctuation" if kind == "rougeLsum" else "whole"
        self._ref_cache = self._cache_references(references)

    def _preprocess_segment(self, sent: str) -> str:
        return "\n".join(_SENTENCE_END.split(_LINE_ENDS.sub(" ", sent))) if self.kind == "rougeLsum" else sent

    def _extract_reference_info(self, refs: Sequence[str]) -> dict[str, Any]:
        return {"references": list(refs)}

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict[str, Any]) -> list[float]:
        best = self._scorer.score_multi(ref_kwargs["references"], hypothesis)[self.kind]
        return [float(best.fmeasure), 1.0]

    def _compute_score_from_stats(self, stats: Sequence[float]) -> Score:
        return Score(self.kind, float(100 * stats[0] / stats[1]))

    def _aggregate_and_compute(self, stats: Sequence[Sequence[float]]) -> Score:
        return self._compute_score_from_stats([sum(column) for column in zip(*stats, strict=True)])


def _check_script(references: Sequence[Sequence[str | None]]) -> None:
    lines = [line for stream in references for line in stream if line is not None]
    letters = [mark for line in lines for mark in line.lower() if mark.isalnum()]
    kept = sum(1 for mark in letters if re.match("[a-z0-9]", mark))
    if letters and kept < len(letters) / 2:
        raise UserError(
            "ROUGE: rouge-score keeps only the letters a-z and digits, and most of these references have others"
        )
