"""The comparison as a terminal table: arms by search, what is better by how much, and how sure that is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convexlm.significance import is_sure

if TYPE_CHECKING:
    from rich.console import Console

TITLES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "chrf++": "chrF++",
    "ter": "TER",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeLsum": "ROUGE-Lsum",
    "mode_share": "most probable",
    "valid_share": "valid",
}
SHARES = ("mode_share", "valid_share")


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign; what rounds to nothing has none."""
    text = f"{value:+.{digits}f}"
    return text if text.strip("+-0.") else text[1:]


def show_comparison(comparison: dict[str, Any], console: Console) -> None:
    """Print the table of a `comparison.json`, and the sentences that read it; fits 80 columns."""
    from rich import box
    from rich.table import Table

    arms, baseline = comparison["arms"], comparison["baseline"]
    metrics = [metric for metric in _metrics(comparison) if metric != "valid_share"]
    cells = {(row["arm"], row["search"], row["metric"]): row for row in comparison["table"]}
    console.print(_title(comparison), style="bold", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for metric in metrics:
        table.add_column(TITLES.get(metric, metric), justify="right", no_wrap=True)
        if metric == metrics[0] and len(arms) > 1:
            table.add_column(f"vs {baseline} [95 %]", justify="right", no_wrap=True)
        if metric in (metrics[0], "mode_share") and len(arms) > 1:
            table.add_column("p", justify="right", no_wrap=True)
    for search in comparison["searches"]:
        table.add_row(search, style="bold")
        for arm in arms:
            line = [f"  {arm}"]
            for metric in metrics:
                row = cells[arm, search, metric]
                line.append(_value(row["score"], metric))
                if metric == metrics[0] and len(arms) > 1:
                    line.append(_delta(row))
                if metric in (metrics[0], "mode_share") and len(arms) > 1:
                    line.append(_p(row))
            table.add_row(*line)
    gaps = [gap for gap in comparison["gaps"] if gap["metric"] == metrics[0]]
    for search in dict.fromkeys(gap["search"] for gap in gaps):
        table.add_section()
        table.add_row(f"{search} - greedy", style="bold")
        for gap in gaps:
            if gap["search"] == search:
                rest = [_delta(gap), _p(gap)] if len(arms) > 1 else []
                table.add_row(f"  {gap['arm']}", signed(gap["delta"]), *rest)
    console.print(table)
    console.print()
    if said := selection_said(comparison):
        # Red for what a reader must know before the figures are believed.
        style = "bold red" if comparison["selection"]["on"] == "test" else "dim"
        console.print(said, style=style, markup=False, soft_wrap=True)
    for sentence in [*conclusions(comparison), *_distributions_said(comparison)]:
        console.print(sentence, soft_wrap=True)


def _metrics(comparison: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["metric"] for row in comparison["table"]))


def selection_said(comparison: dict[str, Any]) -> str:
    """How the compared checkpoints were chosen; empty where they are the last ones."""
    selection = comparison.get("selection") or {"on": "last"}
    if selection["on"] == "last":
        return ""
    by = f"by {TITLES.get(selection['metric'], selection['metric'])} with {selection['search']} search"
    chosen = ", ".join(f"{run} {checkpoint}" for run, checkpoint in selection["chosen"].items())
    if selection["on"] == "test":
        return (
            f"Checkpoints were selected on the test set itself, {by}: scores are too good, intervals and p-values do "
            f"not hold. Selected: {chosen}."
        )
    return f"Checkpoints were selected on the validation sets, {by}: {chosen}."


def _distributions_said(comparison: dict[str, Any]) -> list[str]:
    """On tinyworld, one line an arm: what it gives to all translations of a source; means over seeds and pairs."""
    rows = comparison.get("distributions", [])
    said = []
    for arm in comparison["arms"]:
        mine = [row for row in rows if row["arm"] == arm]
        if not mine:
            continue
        valid, mode, cross, entropy, true = (
            sum(row[key] for row in mine) / len(mine)
            for key in ("valid_mass", "mode_mass", "cross_entropy", "model_entropy", "truth_entropy")
        )
        said.append(
            f"{arm} gives {100 * valid:.0f} % of its probability to valid translations, {100 * mode:.0f} % to the "
            f"most probable; entropy {entropy:.2f} nats (true {true:.2f}), cross-entropy {cross:.2f}"
        )
    return said


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
        rows = sorted(rows, key=lambda row: -sign * row["delta"])
        best, sure = rows[0], [row for row in rows if is_sure(row)]
        ahead = [row for row in sure if sign * row["delta"] > 0]
        behind = ", ".join(row["arm"] for row in sure if sign * row["delta"] < 0)
        if ahead:
            said.append(f"{search}: {ahead[0]['arm']} is ahead of {baseline} by {_by(ahead[0], metric)}")
            if best is not ahead[0]:
                said[-1] += f"; the lead of {best['arm']}, {_by(best, metric)}, may be luck"
        elif len(sure) == len(rows):
            said.append(f"{search}: {baseline} is ahead of every other arm, of {best['arm']} by {_by(best, metric)}")
        elif sure:
            said.append(f"{search}: no arm is surely ahead of {baseline}, and surely behind is {behind}")
        else:
            said.append(
                f"{search}: no arm differs from {baseline} in {TITLES.get(metric, metric)} beyond chance; nearest the "
                f"top is {best['arm']}, {signed(best['delta'])} (p = {best['p_two_sided']:.3f})"
            )
    return said


def _by(row: dict[str, Any], metric: str) -> str:
    return f"{abs(row['delta']):.2f} {TITLES.get(metric, metric)} (p = {row['p_two_sided']:.3f})"


def _title(comparison: dict[str, Any]) -> str:
    corpora = comparison["corpora"]
    where = ", ".join(f"{corpus['test_set']} {corpus['pair']}" for corpus in corpora)
    seeds = len(comparison["seeds"])
    over = [f"{count} {what}" for count, what in ((len(corpora), "test sets"), (seeds, "seeds")) if count > 1]
    means = f"; means over {' and '.join(over)}" if over else ""
    return f"{comparison['recipe']}: {where}{means}"


def _value(score: float, metric: str) -> str:
    return f"{100 * score:.1f} %" if metric in SHARES else f"{score:.2f}"


def _delta(row: dict[str, Any]) -> str:
    if row.get("delta") is None:
        return ""
    return f"{signed(row['delta'])} [{signed(row['delta_low'])}, {signed(row['delta_high'])}]"


def _p(row: dict[str, Any]) -> str:
    if row.get("p_two_sided") is None:
        return ""
    return f"{row['p_two_sided']:.3f}" + ("*" if is_sure(row) else "")
