"""From hypotheses to `scores.jsonl` and `comparison.json`: every score, and how sure it is which arm is better.

Arms are compared at their last decoded checkpoint, or at the one that the recipe's `selection` chose: over all test
sets, directions and seeds at once (a paired bootstrap of the mean score), and with sacreBLEU's own paired bootstrap in
every direction and seed.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from convexlm.comet import imported_rows
from convexlm.decoded import decoding_seconds, make_corpus, read_decoded, read_meta
from convexlm.errors import UserError
from convexlm.files import (
    file_sha256,
    json_sha256,
    read_json_object,
    read_jsonl,
    text_sha256,
    write_atomic,
    write_jsonl,
)
from convexlm.randomization import randomization_p
from convexlm.reference_nll import reference_nll
from convexlm.resampling import holm
from convexlm.significance import joint_test, mean_difference_test, paired_test
from convexlm.sweep import chosen_checkpoints, read_instruction

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from convexlm.decoded import Decoded
    from convexlm.recipe import Recipe
    from convexlm.reference_nll import ReferenceNll
    from convexlm.runs import RunFolder, TrainedRun
    from convexlm.testsets import TestSet

SCHEMA = 1
CONTENT = 3  # raised when a comparison has more to it, so that older ones are made anew
MEASURES = {"mode_share": "is_mode", "valid_share": "is_valid"}  # of tinyworld, where the truth is known


def evaluate(
    recipe: Recipe,
    folder: RunFolder,
    runs: Sequence[TrainedRun],
    test_sets: Sequence[TestSet],
    validation_sets: Sequence[TestSet] = (),
) -> dict[str, Any]:
    """Score and compare whatever the run decoded; does nothing if both were done for the same files.

    Returns:
        What `comparison.json` holds: `baseline`, `selection`, `checkpoints`, `searches`, `metrics`, `corpora`, `table`
        (one row a search, metric and arm, over all corpora), `gaps` (greedy against beam search, an arm each),
        `paired` (sacreBLEU's tests in every direction and seed), `outputs` and `checkpoints_scores` (see
        `descriptions`), `by_length` and `by_reference_nll` (see `parts`) with `reference_nll`, the model behind it;
        on tinyworld also `distributions`, what each checkpoint gives to all translations.
    """
    chosen = chosen_checkpoints(recipe, folder, runs, test_sets, validation_sets)
    decoded = read_decoded(recipe, folder, runs, test_sets, chosen)
    if validation_sets:
        decoded += read_decoded(recipe, folder, runs, validation_sets, chosen, role="validation")
    inputs = json_sha256(
        [
            SCHEMA,
            CONTENT,
            recipe.compare,
            recipe.metrics,
            recipe.selection,
            chosen,
            [[str(d.path.relative_to(folder.path)), file_sha256(d.path)] for d in decoded],
            [
                [t.name, t.pair, [text_sha256(stream) for stream in t.references]]
                for t in [*test_sets, *validation_sets]
            ],
        ]
    )
    if known := _known(folder, inputs):
        return known
    rows = _score_rows(decoded)
    write_jsonl(folder.scores, [*rows, *imported_rows(folder.scores, rows)])
    nll = reference_nll(recipe, folder, test_sets)
    comparison = {"schema": SCHEMA, "inputs": inputs, "scores_sha256": _own_sha256(folder)}
    comparison |= _compare(recipe, decoded, chosen, nll)
    if whole := _whole_distributions(folder, decoded, chosen, read_instruction(recipe)):
        comparison["distributions"] = whole
    write_atomic(folder.comparison, json.dumps(comparison, ensure_ascii=False, indent=1) + "\n")
    return comparison


def _known(folder: RunFolder, inputs: str) -> dict[str, Any] | None:
    """The comparison of the same inputs, where it and the scores are still as they were written."""
    if not folder.comparison.exists() or not folder.scores.exists():
        return None
    try:
        known = read_json_object(folder.comparison)
    except UserError:  # damaged: made anew
        return None
    if known.get("inputs") != inputs:
        return None
    # A run that was killed may have left the scores of other inputs. Earlier versions kept no hash.
    return known if known.get("scores_sha256") in (None, _own_sha256(folder)) else None


def _own_sha256(folder: RunFolder) -> str:
    """The hash of the scores as they are now."""
    return scores_sha256(read_scores(folder))


def scores_sha256(rows: Sequence[Mapping[str, Any]]) -> str:
    """The hash that `comparison.json` has of the scores: of the rows without imported ones and seconds of decoding."""
    own = [row for row in rows if not row.get("imported")]
    return json_sha256([{key: value for key, value in row.items() if key != "decoding"} for row in own])


def _score_rows(decoded: Sequence[Decoded]) -> list[dict[str, Any]]:
    rows = []
    for entry in decoded:
        about = {
            "arm": entry.run.arm,
            "seed": entry.run.seed,
            "checkpoint": entry.checkpoint,
            "role": entry.role,
            "test_set": entry.test_set.name,
            "pair": entry.test_set.pair,
            "search": entry.search,
        }
        meta = read_meta(entry)
        decoding = {key: meta.get(key) for key in ("cut", "checkpoint_sha256", "sources_sha256")}
        decoding["seconds"] = decoding_seconds(meta)
        for score in entry.scorer.score(entry.hypotheses, label=str(entry.path)):
            rows.append(about | score.as_dict() | {"decoding": decoding})
        for measure, values in _truth(entry).items():
            rows.append(
                about
                | {"metric": measure, "score": sum(values) / len(values), "signature": "tinyworld|exact distribution"}
                | {"num_sentences": len(values)}
            )
    return rows


def _truth(entry: Decoded) -> dict[str, list[float]]:
    """Per sentence, what only a corpus with a known distribution can tell; empty for any other test set."""
    if entry.test_set.meta.get("kind") != "tinyworld":
        return {}
    from convexlm.tinyworld import judge

    sentences = judge(entry.test_set.sources, entry.hypotheses, entry.test_set.pair)["sentences"]
    return {measure: [float(sentence[key]) for sentence in sentences] for measure, key in MEASURES.items()}


def _whole_distributions(
    folder: RunFolder, decoded: Sequence[Decoded], chosen: dict[str, str], instruction: str | None
) -> list[dict[str, Any]]:
    """On tinyworld, each compared checkpoint's whole distribution against the true one, kept beside decode files."""
    from convexlm.tinyworld.model_truth import truth_of_checkpoint

    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for entry in decoded:
        key = (entry.run.name, entry.test_set.name, entry.test_set.pair)
        final = entry.role == "test" and entry.checkpoint == chosen[entry.run.name]
        if not final or key in rows or entry.test_set.meta.get("kind") != "tinyworld":
            continue
        checkpoint = folder.train(entry.run) / entry.checkpoint
        cache = entry.path.parent / f"{entry.test_set.name}.{entry.test_set.pair}.truth.json"
        about = {"arm": entry.run.arm, "seed": entry.run.seed, "test_set": key[1], "pair": key[2]}
        rows[key] = about | truth_of_checkpoint(checkpoint, entry.test_set, cache, instruction)
    return list(rows.values())


def _compare(recipe: Recipe, decoded: Sequence[Decoded], chosen: dict[str, str], nll: ReferenceNll) -> dict[str, Any]:
    from convexlm.descriptions import checkpoint_scores, describe_outputs
    from convexlm.parts import scores_by_length

    final = [entry for entry in decoded if entry.role == "test" and entry.checkpoint == chosen[entry.run.name]]
    searches = list(dict.fromkeys(entry.search for entry in final))
    arms = list(dict.fromkeys(entry.run.arm for entry in final))
    arms.sort(key=lambda arm: arm != recipe.baseline)  # stable: the baseline first
    settings = {"n_samples": int(recipe.compare["n_samples"]), "seed": int(recipe.compare["seed"])}
    table: list[dict[str, Any]] = []
    paired: list[dict[str, Any]] = []
    for search in searches:
        groups = _by_corpus([entry for entry in final if entry.search == search])
        table += _scores_of(search, groups, arms, recipe.metrics, settings)
        table += _measures_of(search, groups, arms, settings)
        if len(arms) > 1:
            for entries in groups:
                paired += _paired(search, entries, arms, recipe.metrics, settings)
    return {
        "recipe": recipe.name,
        "baseline": recipe.baseline,
        "arms": arms,
        "seeds": list(recipe.seeds),
        "selection": {**recipe.selection, "chosen": chosen},
        "checkpoints": chosen,
        "searches": searches,
        "metrics": list(recipe.metrics),
        "resampling": settings,
        "corpora": _corpora(final),
        "table": table,
        "gaps": _gaps(final, arms, _without_sampling(recipe, searches), recipe.metrics, settings),
        "paired": paired,
        "outputs": describe_outputs(final, arms, searches),
        "by_length": scores_by_length(final, arms, searches, recipe.metrics),
        "by_reference_nll": _by_reference_nll(final, arms, searches, recipe.metrics, nll),
        "reference_nll": {"base": nll.base, "reason": nll.reason},
        "checkpoints_scores": checkpoint_scores(decoded, recipe.metrics, settings),
    }


def _by_reference_nll(
    final: Sequence[Decoded], arms: list[str], searches: list[str], metrics: Sequence[str], nll: ReferenceNll
) -> list[dict[str, Any]]:
    from convexlm.parts import scores_in_parts

    def values(entry: Decoded) -> np.ndarray:
        import numpy as np

        found = nll.values[entry.test_set.name, entry.test_set.pair, entry.run.seed]
        return np.asarray([np.nan if value is None else value for value in found])

    return scores_in_parts(final, arms, searches, metrics, values) if nll.values else []


def _by_corpus(entries: Sequence[Decoded]) -> list[dict[str, Decoded]]:
    """For every (test set, pair, seed), the arms' decode files."""
    groups: dict[tuple[str, str, int], dict[str, Decoded]] = {}
    for entry in entries:
        groups.setdefault((entry.test_set.name, entry.test_set.pair, entry.run.seed), {})[entry.run.arm] = entry
    return list(groups.values())


def _scores_of(
    search: str, groups: list[dict[str, Decoded]], arms: list[str], metrics: Sequence[str], settings: dict[str, int]
) -> list[dict[str, Any]]:
    seeds = [next(iter(group.values())).run.seed for group in groups]
    if len(arms) == 1:
        return [
            {"search": search, "metric": metric, "arm": arms[0], "score": sum(scores) / len(scores)}
            | {"by_seed": _by_seed(seeds, scores), "delta": None, "p_value": None, "p_two_sided": None}
            for metric in metrics
            for scores in [[_one_score(group[arms[0]], metric) for group in groups]]
        ]
    corpora = [make_corpus({arm: group[arm] for arm in arms}) for group in groups]
    rows = []
    for row in joint_test(corpora, metrics, baseline=arms[0], **settings):
        scores = [part["score"] for part in row.pop("corpora")]
        rows.append({"search": search, **row, "arm": row["system"], "by_seed": _by_seed(seeds, scores)})
    return [{key: value for key, value in row.items() if key != "system"} for row in rows]


def _one_score(entry: Decoded, metric: str) -> float:
    found = entry.scorer.score(entry.hypotheses, label=str(entry.path))
    return next(score.score for score in found if score.metric == metric)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _by_seed(seeds: list[int], scores: list[float]) -> dict[str, float]:
    """The mean over corpora of each training seed, for the spread between seeds."""
    out = {}
    for seed in dict.fromkeys(seeds):
        mine = [score for one, score in zip(seeds, scores, strict=True) if one == seed]
        out[str(seed)] = sum(mine) / len(mine)
    return out


def _measures_of(
    search: str, groups: list[dict[str, Decoded]], arms: list[str], settings: dict[str, int]
) -> list[dict[str, Any]]:
    truths = [{arm: _truth(group[arm]) for arm in arms} for group in groups]
    if not all(truth[arms[0]] for truth in truths):
        return []
    seeds = [next(iter(group.values())).run.seed for group in groups]
    if len(arms) == 1:
        shares = {m: [_mean(truth[arms[0]][m]) for truth in truths] for m in MEASURES}
        return [
            {"search": search, "metric": measure, "arm": arms[0], "score": _mean(means)}
            | {"by_seed": _by_seed(seeds, means), "delta": None, "p_value": None, "p_two_sided": None}
            for measure, means in shares.items()
        ]
    labels = [next(iter(group.values())).group for group in groups]
    rows = []
    for measure in MEASURES:
        values = [{arm: truth[arm][measure] for arm in arms} for truth in truths]
        for row in mean_difference_test(values, arms[0], groups=labels, **settings):
            arm = row.pop("system")
            means = [sum(value[arm]) / len(value[arm]) for value in values]
            rows.append(
                {"search": search, "metric": measure, "higher_is_better": True, **row}
                | {"arm": arm, "by_seed": _by_seed(seeds, means)}
            )
    return rows


def _paired(
    search: str, entries: dict[str, Decoded], arms: list[str], metrics: Sequence[str], settings: dict[str, int]
) -> list[dict[str, Any]]:
    """The paired bootstrap of sacreBLEU on one corpus, and beside it the p of approximate randomization."""
    entry = next(iter(entries.values()))
    systems = {arm: entries[arm].hypotheses for arm in arms}
    references, lang = entry.test_set.references, entry.target_lang
    n_samples, seed = settings["n_samples"], settings["seed"]
    rows = paired_test(systems, references, lang, metrics, n_samples=n_samples, seed=seed, scorer=entry.scorer)
    randomized = randomization_p(systems, entry.scorer, metrics, n_trials=n_samples, seed=seed)
    about = {"search": search, "test_set": entry.test_set.name, "pair": entry.test_set.pair, "seed": entry.run.seed}
    for row in rows:
        row["p_ar"] = randomized.get((row["metric"], row["system"]))
    return [about | row for row in rows]


def _without_sampling(recipe: Recipe, searches: list[str]) -> list[str]:
    from convexlm.decoding import Search

    sampling = {search.name for search in map(Search.from_mapping, recipe.decode["searches"]) if search.do_sample}
    return [search for search in searches if search not in sampling]


def _gaps(
    final: Sequence[Decoded], arms: list[str], searches: list[str], metrics: Sequence[str], settings: dict[str, int]
) -> list[dict[str, Any]]:
    """What each beam search gains over greedy search, an arm each: the gap that a sharper model closes.

    `p_holm` is corrected over the arms of one search and metric.
    """
    rows: list[dict[str, Any]] = []
    for search in searches if "greedy" in searches else []:
        if search == "greedy":
            continue
        for arm in arms:
            corpora = []
            for key in dict.fromkeys((e.test_set.name, e.test_set.pair, e.run.seed) for e in final):
                systems = {
                    e.search: e
                    for e in final
                    if e.run.arm == arm
                    and (e.test_set.name, e.test_set.pair, e.run.seed) == key
                    and e.search in ("greedy", search)
                }
                corpora.append(make_corpus({"greedy": systems["greedy"], search: systems[search]}))
            for row in joint_test(corpora, metrics, baseline="greedy", **settings):
                if row["system"] == search:
                    kept = ("metric", "delta", "delta_low", "delta_high", "p_value", "p_two_sided")
                    rows.append({"arm": arm, "search": search, **{key: row[key] for key in kept}})
    for family in dict.fromkeys((row["search"], row["metric"]) for row in rows):
        mine = [row for row in rows if (row["search"], row["metric"]) == family]
        for row, corrected in zip(mine, holm([row["p_two_sided"] for row in mine]), strict=True):
            row["p_holm"] = corrected
    return rows


def _corpora(final: Sequence[Decoded]) -> list[dict[str, Any]]:
    seen = {(e.test_set.name, e.test_set.pair): (len(e.test_set.sources), e.group) for e in final}
    return [
        {"test_set": name, "pair": pair, "num_sentences": count, "group": group}
        for (name, pair), (count, group) in seen.items()
    ]


def read_scores(folder: RunFolder) -> list[dict[str, Any]]:
    """The rows of `scores.jsonl`.

    Raises:
        UserError: it is damaged.
    """
    try:
        return list(read_jsonl(folder.scores))
    except UserError as error:
        raise UserError(
            f"{error}; delete it, and `convexlm run` makes it anew (scores that were imported: import them again)"
        ) from None
