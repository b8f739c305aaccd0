"""Is one system better than another, or was it luck with the sentences?

Three tests, all paired (every system is seen on the same sentences):

- `paired_test`: one corpus, by sacreBLEU's own `PairedTest` (bootstrap or approximate randomization);
- `joint_test`: several corpora at once (directions, training seeds), by a bootstrap of the mean score;
- `mean_difference_test`: the same for any measure that every sentence has, such as 0/1.

All give two p-values, `p_value` in sacreBLEU's convention and `p_two_sided`, which is stricter: `resampling` says how
they differ, and `randomization` for approximate randomization, whose interval is still a bootstrap's. Decide on the
second, and on the interval.

A test over sentences says nothing of what another training seed would have given: show the spread over seeds, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.files import json_sha256
from convexlm.randomization import randomization_p, sacrebleu_test
from convexlm.resampling import check_samples, draw, holm, least_p, percentile_interval, sacrebleu_p, two_sided_p
from convexlm.scoring import (
    DEFAULT_METRICS,
    DEFAULT_SEED,
    Scorer,
    check_lengths,
    get_metric,
    score_from_statistics,
    sentence_statistics,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    import numpy as np

LEVEL = 0.05  # of significance
DEFAULT_SAMPLES = {"bs": 1000, "ar": 10000}  # sacreBLEU's own


@dataclass(frozen=True)
class Corpus:
    """One corpus of a joint test: all systems' outputs on one test set.

    Attributes:
        name: such as `en-de` or `en-de, seed 1`.
        target_lang: the language code of the references.
        systems: hypotheses by system name, the baseline first.
        references: reference streams.
        group: corpora of one group are resampled together. By default they are those with equal references, so that
            the same sentences under two training seeds do not count as two independent draws.
        scorer: a scorer for these references with the metrics that are asked for, whose statistics are shared; made
            anew by default.
    """

    name: str
    target_lang: str
    systems: Mapping[str, Sequence[str]]
    references: Sequence[Sequence[str]]
    group: str | None = None
    scorer: Scorer | None = None


def paired_test(
    systems: Mapping[str, Sequence[str]],
    references: Sequence[Sequence[str]],
    target_lang: str,
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    method: str = "bs",
    n_samples: int | None = None,
    seed: int = DEFAULT_SEED,
    tokenize: str | None = None,
    scorer: Scorer | None = None,
) -> list[dict[str, Any]]:
    """Compare every system with the first by sacreBLEU's `PairedTest`.

    Args:
        systems: hypotheses by name; the first is the baseline.
        references: reference streams.
        target_lang: the language code of the references.
        metrics: registered metrics.
        method: `bs` (paired bootstrap) or `ar` (approximate randomization).
        n_samples: resamples or trials; by default sacreBLEU's 1000 (`bs`) or 10000 (`ar`).
        seed: of the resampling.
        tokenize: a sacreBLEU tokenizer for BLEU instead of the language's own.
        scorer: a scorer made of just these references, language, metrics and tokenizer, to share its statistics.

    Returns:
        One row a metric and system, metrics in the order given, the baseline first: `metric`, `higher_is_better`,
        `system`, `baseline`, `score` with its 95 % bootstrap percentiles `low`, `high` and sacreBLEU's `mean` and `ci`
        (half-width), `delta` to the baseline with `delta_low`, `delta_high`, `p_value`, `p_two_sided`, `p_holm`
        (`p_two_sided` corrected over the systems of one metric) and `signature`. On the baseline's own rows, deltas
        and p are None. With `ar` every p is the randomization's; intervals are of a bootstrap of 1000 resamples.

    Raises:
        UserError: fewer than two systems, streams of different length, and all that `Scorer` refuses.
    """
    if method not in DEFAULT_SAMPLES:
        raise UserError(f"unknown test `{method}`; known: bs (paired bootstrap), ar (approximate randomization)")
    _check_systems(list(systems))
    n_samples = DEFAULT_SAMPLES[method] if n_samples is None else check_samples(n_samples)
    scorer = scorer or Scorer(references, target_lang, metrics, tokenize=tokenize)
    check_lengths({"reference 1": scorer.references[0], **systems})
    corpus = Corpus(target_lang, target_lang, {name: list(lines) for name, lines in systems.items()}, references)
    baseline = next(iter(systems))
    # How many resamples the intervals rest on; an `ar` test has none of its own.
    resamples = n_samples if method == "bs" else DEFAULT_SAMPLES["bs"]
    signatures, results = sacrebleu_test(systems, scorer, metrics, method, n_samples, seed, resamples)
    ours = randomization_p(systems, scorer, metrics, n_trials=n_samples, seed=seed) if method == "ar" else {}
    rows = []
    # sacreBLEU's result has the metrics in our order, under names of its own.
    for name, title in zip(metrics, [key for key in results if key != "System"], strict=True):
        metric = scorer.metrics[name]
        statistics = _statistics([corpus], [metric], list(systems))
        sampled = _resampled_scores([metric], statistics, [0], resamples, seed)
        found = dict(zip(systems, results[title], strict=True))
        metric_rows = []
        for system, result in found.items():
            base = found[baseline].score
            row = _row(baseline, system, float(result.score), sampled[system], float(base), sampled[baseline])
            row |= _no_less(row, statistics, [0])
            # Ours is 1 where nothing differs, and sacreBLEU's otherwise.
            if row["p_value"] is not None and not nothing_differs(row):
                row["p_value"] = float(result.p_value)
            if method == "ar" and system != baseline:
                row["p_two_sided"] = ours[name, system]
            extra = {"mean": float(result.mean), "ci": float(result.ci), "signature": str(signatures[title])}
            metric_rows.append({"metric": name, "higher_is_better": get_metric(name).higher_is_better} | row | extra)
        rows += _add_holm(_without_a_sample(metric_rows, [len(scorer.references[0])]))
    return rows


def joint_test(
    corpora: Sequence[Corpus],
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    baseline: str | None = None,
    n_samples: int = 1000,
    seed: int = DEFAULT_SEED,
) -> list[dict[str, Any]]:
    """Compare systems over several corpora at once: a paired bootstrap of the mean of the corpora's scores.

    Sentences are drawn anew within every corpus (the same draw for all systems, and for corpora of one group), every
    corpus is scored, and the mean over corpora is what is compared. Over a single corpus, p is sacreBLEU's.

    Args:
        corpora: all with the same systems.
        metrics: registered metrics; the score of a corpus is made for its own target language.
        baseline: the system to compare with; the first corpus's first by default.
        n_samples: number of resamples.
        seed: of the resampling.

    Returns:
        One row a metric and system: `metric`, `system`, `baseline`, `score` (mean over corpora) with its 95 %
        percentile interval `low`, `high`, `delta`, `delta_low`, `delta_high`, `p_value`, `p_two_sided`, `p_holm`
        (`p_two_sided` corrected over the systems of one metric), `higher_is_better` and `corpora`: the list
        of `name`, `score`, `delta` and `signature`.

    Raises:
        UserError: no corpus, corpora with other systems than the first, and all that `paired_test` refuses.
    """
    names, baseline = _common_systems([corpus.systems for corpus in corpora], baseline)
    check_samples(n_samples)
    scorers, labels = _scorers_and_groups(corpora, metrics)
    rows = []
    for name in metrics:
        built = [scorer.metrics[name] for scorer in scorers]
        statistics = _statistics(corpora, built, names)
        sampled = _resampled_scores(built, statistics, labels, n_samples, seed)
        scores = {
            system: [
                score_from_statistics(metric, part[system].sum(0))
                for metric, part in zip(built, statistics, strict=True)
            ]
            for system in names
        }
        base = sum(scores[baseline]) / len(corpora)
        metric_rows = []
        for system in names:
            mean = sum(scores[system]) / len(corpora)
            parts = [
                {
                    "name": corpus.name,
                    "score": score,
                    "delta": None if system == baseline else score - base_score,
                    "signature": str(metric.get_signature()),
                }
                for corpus, metric, score, base_score in zip(
                    corpora, built, scores[system], scores[baseline], strict=True
                )
            ]
            row = _row(baseline, system, mean, sampled[system], base, sampled[baseline])
            row |= _no_less(row, statistics, labels)
            extra = {"higher_is_better": get_metric(name).higher_is_better}
            metric_rows.append({"metric": name} | extra | row | {"corpora": parts})
        rows += _add_holm(_without_a_sample(metric_rows, [len(scorer.references[0]) for scorer in scorers]))
    return rows


def score_intervals(
    corpora: Sequence[Corpus], metrics: Sequence[str], *, n_samples: int = 1000, seed: int = DEFAULT_SEED
) -> list[dict[str, Any]]:
    """The mean score over corpora of every system, with a 95 % interval, and no comparison; one system is enough.

    Returns:
        One row a metric and system: `metric`, `system`, `score`, `low`, `high` (percentiles of the bootstrap of
        `joint_test`).

    Raises:
        UserError: no corpus, or streams of different length.
    """
    if not corpora:
        raise UserError("there is no corpus to score")
    check_samples(n_samples)
    names = list(corpora[0].systems)
    scorers, labels = _scorers_and_groups(corpora, metrics)
    rows = []
    for name in metrics:
        built = [scorer.metrics[name] for scorer in scorers]
        statistics = _statistics(corpora, built, names)
        sampled = _resampled_scores(built, statistics, labels, n_samples, seed)
        for system in names:
            parts = zip(built, statistics, strict=True)
            scores = [score_from_statistics(metric, part[system].sum(0)) for metric, part in parts]
            low, high = percentile_interval(sampled[system])
            row = {"metric": name, "system": system, "score": sum(scores) / len(scores), "low": low, "high": high}
            rows.append(row)
    return rows


def mean_difference_test(
    values: Sequence[Mapping[str, Sequence[float]]],
    baseline: str | None = None,
    *,
    groups: Sequence[Hashable] | None = None,
    n_samples: int = 1000,
    seed: int = DEFAULT_SEED,
) -> list[dict[str, Any]]:
    """Compare systems by the mean of a measure that every sentence has (0/1 or real), over one or several corpora.

    Args:
        values: for every corpus, the sentences' values by system; the mean is over each corpus, then over corpora.
        baseline: the system to compare with; the first corpus's first by default.
        groups: a label a corpus; corpora with equal labels hold the same sentences (say, under two training seeds) and
            are resampled together. None: all are different sentences.
        n_samples: number of resamples.
        seed: of the resampling.

    Returns:
        One row a system: `system`, `baseline`, `score` (the mean), `low`, `high`, `delta`, `delta_low`, `delta_high`,
        `p_value`, `p_two_sided`, `p_holm`, as `joint_test` gives them.

    Raises:
        UserError: as `joint_test`.
        ValueError: a value is not finite, or `groups` does not fit.
    """
    import numpy as np

    names, baseline = _common_systems(values, baseline)
    check_samples(n_samples)
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"{len(values)} corpora but {len(groups)} groups")
    labels = list(range(len(values))) if groups is None else list(groups)
    arrays = [{name: np.asarray(corpus[name], dtype=np.float64) for name in names} for corpus in values]
    if any(not np.isfinite(array).all() for corpus in arrays for array in corpus.values()):
        raise ValueError("every value must be a finite number")
    sizes = []
    for number, corpus in enumerate(arrays, start=1):
        lengths = {name: len(corpus[name]) for name in names}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise UserError(f"corpus {number}: systems must have the same number of values, at least 1, not {lengths}")
        sizes.append(lengths[baseline])
    sampled = {name: np.zeros(n_samples) for name in names}
    for rows, index, counts in draw(labels, sizes, n_samples, seed):
        for name in names:
            sampled[name][rows] += (counts @ arrays[index][name]) / sizes[index] / len(values)
    observed = {name: float(np.mean([corpus[name].mean() for corpus in arrays])) for name in names}
    found = [
        _row(baseline, name, observed[name], sampled[name], observed[baseline], sampled[baseline]) for name in names
    ]
    found = [row | _no_less(row, arrays, labels) for row in found]
    return _add_holm(_without_a_sample(found, sizes))


def _scorers_and_groups(corpora: Sequence[Corpus], metrics: Sequence[str]) -> tuple[list[Scorer], list[str]]:
    """A scorer for every corpus and what it is resampled with, after seeing that its streams fit together."""
    scorers = [corpus.scorer or Scorer(corpus.references, corpus.target_lang, metrics) for corpus in corpora]
    labels = []
    for corpus, scorer in zip(corpora, scorers, strict=True):
        streams = {f"{corpus.name}, {name}": lines for name, lines in corpus.systems.items()}
        check_lengths({f"{corpus.name}, reference 1": scorer.references[0], **streams})
        labels.append(json_sha256(scorer.references_sha256) if corpus.group is None else corpus.group)
    return scorers, labels


def _statistics(
    corpora: Sequence[Corpus], metrics: Sequence[Any], names: Sequence[str]
) -> list[dict[str, np.ndarray]]:
    """For every corpus, the systems' sentence statistics: (sentences, statistics)."""
    return [
        {name: sentence_statistics(metric, corpus.systems[name]) for name in names}
        for metric, corpus in zip(metrics, corpora, strict=True)
    ]


def _resampled_scores(
    metrics: Sequence[Any],
    statistics: Sequence[Mapping[str, np.ndarray]],
    labels: Sequence[Hashable],
    n_samples: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """For every system the mean score over corpora in every resample: (n_samples,)."""
    import numpy as np

    sizes = [len(next(iter(part.values()))) for part in statistics]
    sampled = {name: np.zeros(n_samples) for name in statistics[0]}
    for rows, index, counts in draw(labels, sizes, n_samples, seed):
        for name, values in statistics[index].items():
            scores = [score_from_statistics(metrics[index], totals) for totals in counts @ values]
            sampled[name][rows] += np.asarray(scores) / len(statistics)
    return sampled


def _row(
    baseline: str, name: str, score: float, sampled: np.ndarray, base_score: float, base_sampled: np.ndarray
) -> dict[str, Any]:
    row: dict[str, Any] = {"system": name, "baseline": baseline, "score": score}
    row["low"], row["high"] = percentile_interval(sampled)
    if name == baseline:
        return row | {"delta": None, "delta_low": None, "delta_high": None, "p_value": None, "p_two_sided": None}
    deltas = sampled - base_sampled
    low, high = percentile_interval(deltas)
    delta = score - base_score
    row |= {"delta": delta, "delta_low": low, "delta_high": high}
    return row | {"p_value": sacrebleu_p(deltas, delta), "p_two_sided": two_sided_p(deltas, delta)}


def _no_less(
    row: Mapping[str, Any], values: Sequence[Mapping[str, np.ndarray]], labels: Sequence[Hashable]
) -> dict[str, Any]:
    """The row's two-sided p, made no smaller than the sentences that differ allow."""
    if row["p_two_sided"] is None:
        return {}
    parts = [(label, part[row["baseline"]], part[row["system"]]) for label, part in zip(labels, values, strict=True)]
    return {"p_two_sided": max(row["p_two_sided"], least_p(parts))}


def _without_a_sample(rows: list[dict[str, Any]], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The rows, with p = 1 where every corpus is one sentence: all resamples are then the same, and prove nothing."""
    if max(sizes) > 1:
        return rows
    return [row | {key: None if row[key] is None else 1.0 for key in ("p_value", "p_two_sided")} for row in rows]


def nothing_differs(row: Mapping[str, Any]) -> bool:
    """Whether neither the observed difference from the baseline nor its interval leaves zero."""
    return not (row["delta"] or row["delta_low"] or row["delta_high"])


def _add_holm(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put `p_holm`, over these rows' `p_two_sided`, behind every row; None where that is None."""
    adjusted = iter(holm([row["p_two_sided"] for row in rows if row["p_two_sided"] is not None]))
    return [row | {"p_holm": None if row["p_two_sided"] is None else next(adjusted)} for row in rows]


def _common_systems(corpora: Sequence[Mapping[str, Any]], baseline: str | None) -> tuple[list[str], str]:
    """The systems' names, the baseline first, after seeing that every corpus has the same ones."""
    if not corpora:
        raise UserError("there is no corpus to compare systems on")
    names = list(corpora[0])
    _check_systems(names)
    for number, corpus in enumerate(corpora, start=1):
        if set(corpus) != set(names):
            raise UserError(f"corpus {number} has the systems {', '.join(corpus)}; corpus 1 has {', '.join(names)}")
    baseline = names[0] if baseline is None else baseline
    if baseline not in names:
        raise UserError(f"there is no system `{baseline}` to be the baseline; there are: {', '.join(names)}")
    return [baseline, *(name for name in names if name != baseline)], baseline


def _check_systems(names: Sequence[str]) -> None:
    if len(names) < 2:
        raise UserError(f"a comparison needs at least two systems, there is {len(names)}")


def is_sure(row: Mapping[str, Any]) -> bool:
    """Whether a row's difference from the baseline is more than chance.

    Its interval leaves out zero, and every p-value that it has, corrected ones included, is below 0.05.
    """
    delta, low, high = (row.get(key) for key in ("delta", "delta_low", "delta_high"))
    if delta is None or low is None or high is None:
        return False
    known = [row[key] for key in ("p_value", "p_two_sided", "p_holm") if row.get(key) is not None]
    return bool(known) and max(known) < LEVEL and low * high > 0
