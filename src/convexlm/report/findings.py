"""What a comparison comes to: the headline, and the rows of the main table.

A lead is called sure only if the 95 % interval of the difference leaves out zero and both the two-sided p and the
Holm-corrected p are below 0.05.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from convexlm.comet import segments_file
from convexlm.report.text import delta_text, interval_text, is_number, is_share, metric_title, p_text, score_text
from convexlm.significance import is_sure, mean_difference_test

if TYPE_CHECKING:
    from convexlm.report.data import RunData


def headline(run: RunData) -> tuple[str, list[str]]:
    """One line that says which objective won, and sentences that say by how much and how sure, a search each."""
    comparison = run.comparison
    if len(run.arms) == 1:
        return f"{run.arms[0]}: scores of one objective, with nothing to compare it to", _scores_said(run)
    found = [_verdict(run, search) for search in comparison["searches"]]
    winners = [verdict["winner"] for verdict in found]
    sentences = [verdict["text"] for verdict in found] + _gap_said(run) + _disagreement_said(run)
    baseline, metric = comparison["baseline"], comparison["metrics"][0]
    if len(set(winners)) == 1:
        winner = winners[0]
        if winner is None:
            differs = any(verdict["behind"] for verdict in found)
            by = f" in {metric_title(metric)}" if _others_sure(run) else ""
            said = f"is surely ahead of {baseline}{by}" if differs else f"differs from {baseline}{by} beyond chance"
            return f"No objective {said}", sentences
        if winner == baseline:
            return f"{baseline} is ahead of every other objective", sentences
        searches = "with every search" if len(winners) > 1 else f"with {comparison['searches'][0]} search"
        lead = found[0]["lead"]
        suffix = _by(lead, metric) + (f" ({comparison['searches'][0]} search)" if len(winners) > 1 else "")
        return f"{winner} beats {baseline} {searches}: {suffix}", sentences
    parts = []
    for search, verdict in zip(comparison["searches"], found, strict=True):
        winner = verdict["winner"]
        said = "no objective is surely ahead" if winner is None else f"{winner} is ahead"
        if winner not in (None, baseline):
            said += f" of {baseline} by {_by(verdict['lead'], metric)}"
        parts.append(f"with {search} search {said}")
    text = "; ".join(parts)
    return text[0].upper() + text[1:], sentences


def main_table(run: RunData) -> list[dict[str, Any]]:
    """For every search, its rows, an arm each: `arm`, `style`, `baseline`, `scores` (by metric), `gap`, `best`."""
    comparison = run.comparison
    cells = {(row["search"], row["arm"], row["metric"]): row for row in comparison["table"]}
    primary = comparison["metrics"][0]
    gaps = {(gap["search"], gap["arm"]): gap for gap in comparison["gaps"] if gap["metric"] == primary}
    groups = []
    for search in comparison["searches"]:
        rows = []
        for arm in run.arms:
            scores = {metric: cells.get((search, arm, metric), {}) for metric in table_metrics(run)}
            entry = {"arm": arm, "style": run.style(arm), "baseline": arm == comparison["baseline"]}
            rows.append(entry | {"search": search, "scores": scores, "gap": gaps.get((search, arm)), "best": False})
        _mark_best(rows, primary)
        groups.append({"search": search, "rows": rows})
    return groups


def comet_rows(run: RunData) -> dict[tuple[str, str], dict[str, Any]]:
    """Imported COMET by (search, arm) at the compared checkpoints, of arms whose outputs all have it.

    Returns:
        `score` (the mean over test sets and seeds); where the baseline has it too also `delta`, `delta_low`,
        `delta_high`, `p_two_sided` and `p_holm` of `mean_difference_test` over segments.
    """
    final = {(one.arm, one.seed): run.checkpoint(one) for one in run.runs}
    found: dict[str, dict[str, dict[tuple[str, str, int], dict[str, Any]]]] = {}
    for row in run.scores:
        place = final.get((str(row.get("arm")), row.get("seed", 0)))
        if row.get("metric") == "comet" and row.get("role") == "test" and row.get("checkpoint") == place:
            corpus = (str(row["test_set"]), str(row["pair"]), int(row.get("seed") or 0))
            found.setdefault(row["search"], {}).setdefault(row["arm"], {})[corpus] = row
    whole = len(run.comparison["corpora"]) * len(run.comparison["seeds"])
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for search, arms in found.items():
        complete = {arm: corpora for arm, corpora in arms.items() if len(corpora) == whole}
        for arm, corpora in complete.items():
            rows[search, arm] = {"score": sum(row["score"] for row in corpora.values()) / whole}
        for row in _comet_test(run, complete):
            rows[search, row["system"]] = row
    return rows


def _comet_test(run: RunData, arms: dict[str, dict[tuple[str, str, int], dict[str, Any]]]) -> list[dict[str, Any]]:
    baseline = run.comparison["baseline"]
    if baseline not in arms or len(arms) < 2:
        return []
    corpora = list(arms[baseline])
    values: list[dict[str, list[float]]] = []
    for corpus in corpora:
        files = {arm: segments_file(run.folder, rows[corpus]) for arm, rows in arms.items()}
        if not all(path.is_file() for path in files.values()):
            return []  # imported by an older version, which kept the means only
        values.append({arm: json.loads(path.read_text(encoding="utf-8")) for arm, path in files.items()})
    settings = {key: run.comparison["resampling"][key] for key in ("n_samples", "seed")}
    # Of test sets that hold the same sentences; an older comparison does not say it.
    groups_of = {(row["test_set"], row["pair"]): row.get("group") for row in run.comparison["corpora"]}
    groups = [groups_of.get((test_set, pair)) or f"{test_set} {pair}" for test_set, pair, _ in corpora]
    return mean_difference_test(values, baseline, groups=groups, **settings)


def table_metrics(run: RunData) -> list[str]:
    """Every measure of the table, the recipe's first metric first."""
    return list(dict.fromkeys([run.comparison["metrics"][0], *(row["metric"] for row in run.comparison["table"])]))


def seed_deltas(run: RunData, search: str, arm: str, metric: str) -> list[float]:
    """The difference from the baseline under every training seed."""
    rows = {row["arm"]: row for row in run.comparison["table"] if row["search"] == search and row["metric"] == metric}
    mine = rows.get(arm, {}).get("by_seed") or {}
    base = rows.get(run.comparison["baseline"], {}).get("by_seed") or {}
    return [mine[s] - base[s] for s in mine if s in base and is_number(mine[s]) and is_number(base[s])]


def _mark_best(rows: list[dict[str, Any]], metric: str) -> None:
    scored = [row for row in rows if is_number(row["scores"][metric].get("score"))]
    values = [_sign(row["scores"][metric]) * row["scores"][metric]["score"] for row in scored]
    if len(scored) > 1 and values.count(max(values)) == 1:  # of equals none is the best
        scored[values.index(max(values))]["best"] = True


def _sign(row: dict[str, Any]) -> int:
    return 1 if row.get("higher_is_better", True) else -1


def _verdict(run: RunData, search: str) -> dict[str, Any]:
    """Who is surely ahead with one search (an arm, or None), the row that says so, who is behind, and a sentence."""
    metric, baseline = run.comparison["metrics"][0], run.comparison["baseline"]
    rows = [
        row
        for row in run.comparison["table"]
        if row["search"] == search and row["metric"] == metric and is_number(row.get("delta"))
    ]
    start = f"With {search} search "
    if not rows:
        text = f"{start}there is no test against {baseline}."
        return {"winner": None, "lead": None, "behind": [], "text": text}
    rows = sorted(rows, key=lambda row: -_sign(row) * row["delta"])
    best, sure = rows[0], [row for row in rows if is_sure(row)]
    ahead = [row for row in sure if _sign(row) * row["delta"] > 0]
    behind = [row["arm"] for row in sure if _sign(row) * row["delta"] < 0]

    def figures(row: dict[str, Any]) -> str:
        return f"{_figures(row, metric)}{_seeds_said(run, search, row['arm'], metric)}"

    winner = None
    if ahead:
        lead = ahead[0]
        winner = lead["arm"]
        text = f"{start}{winner} scores {score_text(lead['score'], metric)} {metric_title(metric)}, {figures(lead)}"
        if best is not lead:
            text += f"; {best['arm']} scores more, but that may be luck: {figures(best)}"
    elif len(behind) == len(rows):
        winner = baseline
        text = f"{start}every other objective is behind {baseline}; nearest is {best['arm']}, {figures(best)}"
    else:
        text = (
            f"{start}no objective is surely ahead of {baseline}; best of the others is {best['arm']}, {figures(best)}"
        )
        if behind:
            text += f"; surely behind: {', '.join(behind)}"
    return {"winner": winner, "lead": ahead[0] if ahead else best, "behind": behind, "text": f"{text}."}


def _by(row: dict[str, Any], metric: str) -> str:
    unit = "points" if is_share(metric) else metric_title(metric)
    return f"{delta_text(row['delta'], metric)} {unit}"


def _figures(row: dict[str, Any], metric: str) -> str:
    said = f"{delta_text(row['delta'], metric)} against {row.get('baseline', 'the baseline')}"
    interval = interval_text(row, metric)
    ps = [f"p {_equals(row.get('p_two_sided', row.get('p_value')))}"]
    if is_number(row.get("p_holm")):
        ps.append(f"Holm-corrected {_equals(row['p_holm'])}")
    return f"{said} (95 % interval {interval}; {', '.join(ps)})" if interval else f"{said} ({', '.join(ps)})"


def _equals(value: Any) -> str:
    text = p_text(value)
    return text if text.startswith("<") else f"= {text}"


def _seeds_said(run: RunData, search: str, arm: str, metric: str) -> str:
    deltas = seed_deltas(run, search, arm, metric)
    if len(deltas) < 2:
        return ""
    low, high = (delta_text(value, metric) for value in (min(deltas), max(deltas)))
    return f"; over the {len(deltas)} training seeds the difference runs from {low} to {high}"


def _gap_said(run: RunData) -> list[str]:
    """What beam search adds to greedy search: for the baseline, and where of the others that is least."""
    metric, baseline = run.comparison["metrics"][0], run.comparison["baseline"]
    said = []
    for search in run.comparison["searches"]:
        gaps = [g for g in run.comparison["gaps"] if g["search"] == search and g["metric"] == metric]
        gaps = [gap for gap in gaps if is_number(gap.get("delta"))]
        base = next((gap for gap in gaps if gap["arm"] == baseline), None)
        others = [gap for gap in gaps if gap["arm"] != baseline]
        if base is None or not others:
            continue
        least = min(others, key=lambda gap: abs(gap["delta"]))
        said.append(
            f"{search} adds {delta_text(base['delta'], metric)} {metric_title(metric)} to greedy search "
            f"for {baseline}, of the others least for {least['arm']}: {delta_text(least['delta'], metric)}."
        )
    return said


def _others_sure(run: RunData) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of other measures with a sure difference that the first measure's row (the second of each pair) lacks."""
    first = run.comparison["metrics"][0]
    rows = {(row["search"], row["arm"], row["metric"]): row for row in run.comparison["table"]}
    pairs = [(row, rows.get((search, arm, first))) for (search, arm, metric), row in rows.items() if metric != first]
    return [(row, base) for row, base in pairs if base is not None and is_sure(row) and not _agree(row, base)]


def _agree(row: dict[str, Any], base: dict[str, Any]) -> bool:
    return is_sure(base) and _sign(row) * row["delta"] * _sign(base) * base["delta"] > 0


def _disagreement_said(run: RunData) -> list[str]:
    """Where another measure surely says the opposite of the first one, or is sure of what the first one is not."""
    said, baseline = [], run.comparison["baseline"]
    further: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row, base in _others_sure(run):
        metric, where = row["metric"], "ahead of" if _sign(row) * row["delta"] > 0 else "behind"
        if is_sure(base):
            said.append(
                f"{metric_title(metric)} disagrees: by it {row['arm']} with {row['search']} search is {where} "
                f"{baseline}, {delta_text(row['delta'], metric)} (95 % interval {interval_text(row, metric)})."
            )
        else:
            arms = further.setdefault((metric, row["search"]), {}).setdefault(where, [])
            arms.append(f"{row['arm']} ({delta_text(row['delta'], metric)})")
    for (metric, search), places in further.items():
        parts = [f"{', '.join(arms)} surely {where} {baseline}" for where, arms in places.items()]
        said.append(f"By {metric_title(metric)}, with {search} search: {'; '.join(parts)}.")
    return said


def _scores_said(run: RunData) -> list[str]:
    metric = run.comparison["metrics"][0]
    return [
        f"With {row['search']} search it scores {score_text(row.get('score'), metric)} {metric_title(metric)}."
        for row in run.comparison["table"]
        if row["metric"] == metric
    ]
