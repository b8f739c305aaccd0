"""What the compared outputs are like, beside their scores: lengths, loops, cuts, seconds, and every checkpoint.

Nothing here is a test; these are the columns that say why two scores differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convexlm.scoring import sentence_statistics

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from convexlm.decoded import Decoded

REPEATED = 4  # tokens of a run that is repeated at once
UNSPACED = ("ja", "th", "zh")  # languages whose texts have no blanks between words


def tokens_of(text: str, lang: str) -> list[str]:
    """Words at blanks; in languages without blanks, characters."""
    return [mark for mark in text if not mark.isspace()] if lang in UNSPACED else text.split()


def repeats(text: str, lang: str) -> bool:
    """Whether some four tokens (`tokens_of`) are followed at once by the same four."""
    tokens = tokens_of(text, lang)
    return any(
        tokens[at : at + REPEATED] == tokens[at + REPEATED : at + 2 * REPEATED]
        for at in range(len(tokens) - 2 * REPEATED + 1)
    )


def describe_outputs(final: Sequence[Decoded], arms: Sequence[str], searches: Sequence[str]) -> list[dict[str, Any]]:
    """One row a search and arm, over all its test sets and seeds.

    Returns:
        `length_ratio` (hypothesis over reference tokens, both summed, as BLEU counts them; None where BLEU is none of
        the metrics), `repetition_rate` (share of outputs that `repeats`), `cut_rate` (share that ran into
        `max_new_tokens`), `seconds_per_sentence` (of decoding; the last two None where a decode file does not say).
    """
    from convexlm.decoded import decoding_seconds, read_meta

    rows = []
    for search in searches:
        for arm in arms:
            mine = [entry for entry in final if entry.search == search and entry.run.arm == arm]
            count = sum(len(entry.hypotheses) for entry in mine)
            metas = [read_meta(entry) for entry in mine]
            cuts, seconds = _total(m.get("cut") for m in metas), _total(map(decoding_seconds, metas))
            loops = sum(repeats(line, entry.target_lang) for entry in mine for line in entry.hypotheses)
            rows.append(
                {
                    "search": search,
                    "arm": arm,
                    "num_sentences": count,
                    "length_ratio": _length_ratio(mine),
                    "repetition_rate": loops / count,
                    "cut_rate": None if cuts is None else cuts / count,
                    "seconds_per_sentence": None if seconds is None else seconds / count,
                }
            )
    return rows


def _total(values: Iterable[float | None]) -> float | None:
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _length_ratio(entries: Sequence[Decoded]) -> float | None:
    lengths = []
    for entry in entries:
        bleu = entry.scorer.metrics.get("bleu")
        if bleu is None:
            return None
        details = bleu._compute_score_from_stats(sentence_statistics(bleu, entry.hypotheses).sum(0).tolist())
        lengths.append((details.sys_len, details.ref_len))
    theirs = sum(reference for _, reference in lengths)
    return sum(ours for ours, _ in lengths) / theirs if theirs else None


def checkpoint_scores(
    decoded: Sequence[Decoded], metrics: Sequence[str], settings: dict[str, int]
) -> list[dict[str, Any]]:
    """The score of every checkpoint with its interval, where several of a run were decoded on the same sets.

    Returns:
        One row an arm, seed, role, search, metric and checkpoint: `score` (mean over sets), `low`, `high` (95 %, a
        bootstrap over sentences).
    """
    from convexlm.decoded import make_corpus
    from convexlm.significance import score_intervals

    groups: dict[tuple[str, int, str, str], dict[tuple[str, str], dict[str, Decoded]]] = {}
    for entry in decoded:
        corpora = groups.setdefault((entry.run.arm, entry.run.seed, entry.role, entry.search), {})
        corpora.setdefault((entry.test_set.name, entry.test_set.pair), {})[entry.checkpoint] = entry
    rows = []
    for (arm, seed, role, search), corpora in groups.items():
        if len(next(iter(corpora.values()))) < 2:
            continue
        made = [make_corpus(systems) for systems in corpora.values()]
        about = {"arm": arm, "seed": seed, "role": role, "search": search}
        for row in score_intervals(made, metrics, **settings):
            rows.append(about | {"checkpoint": row.pop("system")} | row)
    return rows
