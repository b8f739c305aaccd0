"""The comparison as a terminal table: arms by search, what is better by how much, and how sure that is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

TITLES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "chrf++": "chrF++",
    "ter": "TER",
    "mode_share": "most probable",
    "valid_share": "valid",
}
SHARES = ("mode_share", "valid_share")
SURE = 0.05


def show_comparison(comparison: dict[str, Any], console: Console) -> None:
    """Print the table of a `comparison.json`, and one sentence that reads it."""
    from rich.table import Table

    metrics = list(dict.fromkeys(row["metric"] for row in comparison["table"]))
    table = Table(title=_title(comparison), title_justify="left", title_style="bold", header_style="bold")
    table.add_column("arm")
    table.add_column("search")
    for metric in metrics:
        table.add_column(TITLES.get(metric, metric), justify="right")
        if metric in (metrics[0], "mode_share") and len(comparison["arms"]) > 1:
            table.add_column(f"vs {comparison['baseline']} [95 %]", justify="right")
            table.add_column("p", justify="right")
    table.add_column("beam - greedy [95 %]", justify="right")
    cells = {(row["arm"], row["search"], row["metric"]): row for row in comparison["table"]}
    gaps = {(gap["arm"], gap["search"]): gap for gap in comparison["gaps"] if gap["metric"] == metrics[0]}
    for arm in comparison["arms"]:
        for number, search in enumerate(comparison["searches"]):
            line = [arm if number == 0 else "", search]
            for metric in metrics:
                row = cells[arm, search, metric]
                line.append(_value(row["score"], metric))
                if metric in (metrics[0], "mode_share") and len(comparison["arms"]) > 1:
                    line += [_delta(row, metric), _p(row)]
            line.append(_gap(gaps.get((arm, search))))
            table.add_row(*line, end_section=number == len(comparison["searches"]) - 1)
    console.print(table)
    for sentence in conclusions(comparison):
        console.print(sentence)


def conclusions(comparison: dict[str, Any]) -> list[str]:
    """What the comparison says, in plain sentences; never more than its tests carry."""
    metric, baseline = comparison["metrics"][0], comparison["baseline"]
    said = []
    for search in comparison["searches"]:
        rows = [
            r for r in comparison["table"] if r["search"] == search and r["metric"] == metric and r["arm"] != baseline
        ]
        if not rows:
            continue
        sign = 1 if rows[0].get("higher_is_better", True) else -1
        best = max(rows, key=lambda row: sign * row["delta"])
        title = TITLES.get(metric, metric)
        by = f"{abs(best['delta']):.2f} {title} (p = {best['p_two_sided']:.3f})"
        if best["p_two_sided"] >= SURE:
            said.append(f"{search}: no arm differs from {baseline} beyond chance; nearest is {best['arm']}, by {by}")
        elif sign * best["delta"] > 0:
            said.append(f"{search}: {best['arm']} is ahead of {baseline} by {by}")
        else:
            said.append(f"{search}: {baseline} is ahead of every other arm, of {best['arm']} by {by}")
    return said


def _title(comparison: dict[str, Any]) -> str:
    corpora = comparison["corpora"]
    where = ", ".join(f"{corpus['test_set']} {corpus['pair']}" for corpus in corpora)
    seeds = len(comparison["seeds"])
    means = (
        "" if len(corpora) * seeds == 1 else f"; means over {seeds} seed{'s' * (seeds > 1)} and {len(corpora)} corpora"
    )
    return f"{comparison['recipe']}: {where}{means}"


def _value(score: float, metric: str) -> str:
    return f"{100 * score:.1f} %" if metric in SHARES else f"{score:.2f}"


def _delta(row: dict[str, Any], metric: str) -> str:
    if row.get("delta") is None:
        return ""
    scale, digits = (100, 1) if metric in SHARES else (1, 2)
    values = [f"{scale * row[key]:+.{digits}f}" for key in ("delta", "delta_low", "delta_high")]
    return f"{values[0]} [{values[1]}, {values[2]}]"


def _p(row: dict[str, Any]) -> str:
    if row.get("p_two_sided") is None:
        return ""
    return f"{row['p_two_sided']:.3f}" + ("*" if row["p_two_sided"] < SURE else "")


def _gap(gap: dict[str, Any] | None) -> str:
    return "" if gap is None else f"{gap['delta']:+.2f} [{gap['delta_low']:+.2f}, {gap['delta_high']:+.2f}]"
