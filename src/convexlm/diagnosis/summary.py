"""A diagnosis on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from convexlm.diagnosis.advice import grouped
from convexlm.report.text import visible

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

_SHOWN_NEGLECTED = 3


def print_summary(result: dict[str, Any], console: Console) -> None:
    """Print what matters of a result: the data, a row an objective, shares of the tenths, advice, what comes next."""

    def line(text: str = "", style: str | None = None) -> None:
        console.print(visible(text), style=style, markup=False, soft_wrap=True)

    data, reading = result["data"], result["reading"]
    p = data["p_bar"]["quantiles"]
    line(f"{reading['sampled']} of {reading['total_records']} records of {result['dataset']}", "bold")
    weighting = result["objectives"][0]["objective"]["length_weighting"]
    line(
        f"measured with {result['model']} ({result['dtype']}, template {result['prompt']['template']}); "
        f"length weighting by {weighting}",
        "dim",
    )
    line(
        f"p̄: 5 % below {p['0.05']:.2g}, median {p['0.5']:.2g}, 5 % above {p['0.95']:.2g}; "
        f"NLL {data['nll']:.3f} nats a token; answers of {data['lengths']['quantiles']['0']:.0f} to "
        f"{data['lengths']['quantiles']['1']:.0f} tokens (mean {data['lengths']['mean']:.0f})"
    )
    line()
    console.print(_objectives(result))
    line()
    line("share of the gradient by tenth of the data, from the least likely to the likeliest", "bold")
    console.print(_tenths(result))
    if data["judged"]:
        line()
        _print_judged(result, console, line)
    if result.get("comparison"):
        line()
        line(f"before and after: {result['comparison']['checkpoint']}", "bold")
        console.print(_comparison(result["comparison"]))
    first = result["objectives"][0]
    line()
    line(f"most neglected by {first['label']} (more in --page and --output_file)", "bold")
    for row in first["neglected"][:_SHOWN_NEGLECTED]:
        record = result["records"][str(row["index"])]
        text = " ".join(record["completion"].split())
        line(f"  {row['weight']:.2g}  p̄ {row['p_bar']:.2g}  {record['id']}  {text[:80]}")
    line()
    line("advice", "bold")
    for group in grouped(result["advice"]):
        for one in group:
            line(f"• {one['objective'] + ': ' if one['objective'] else ''}{one['finding']}")
        line(f"  {group[0]['advice']}")
        line(f"  why: {group[0]['reason']} [{group[0]['evidence']}]", "dim")
    if not result["advice"]:
        line("  no rule applies")
    if "records_file" in result:
        line(f"records: {result['records_file']}")
    if "page" in result:
        line(f"page: {result['page']}")


def _print_judged(result: dict[str, Any], console: Console, line: Callable[..., None]) -> None:
    judged, entries = result["data"]["judged"], result["objectives"]
    low, high = judged["p_bar_interval"]
    medians, tokens = judged["p_bar_median"], judged["mean_tokens"]
    unjudged = f", {judged['unjudged']} not judged" if judged["unjudged"] else ""
    field = result["reading"]["judged_field"]
    line(f"judged by `{field}`: {judged['right']} right, {judged['wrong']} wrong{unjudged}", "bold")
    line(
        f"p̄ ranks a right one above a wrong one in {judged['p_bar_ranks_right']:.0%} of couples (95 %: {low:.0%} to "
        f"{high:.0%}); the right one is the longer in {judged['length_ranks_right']:.0%}. Median p̄ "
        f"{medians['right']:.2g} and {medians['wrong']:.2g}; {tokens['right']:.0f} and {tokens['wrong']:.0f} tokens"
    )
    shares = _table()
    for name in ("what wrong ones get", "mle", *(entry["label"] for entry in entries)):
        shares.add_column(name, justify="left" if name.startswith("what") else "right")
    for title, key in (("of the gradient", "share"), ("at the logits", "logit_share")):
        values = [entries[0]["wrong"][f"mle_{key}"], *(entry["wrong"][key] for entry in entries)]
        if None not in values:
            shares.add_row(title, *(f"{value:.1%}" for value in values))
    console.print(shares)
    dropping = _table()
    dropping.add_column("least likely dropped")
    for row in judged["dropping"]:
        dropping.add_column(f"{row['dropped']:.0%}", justify="right")
    for title, key in (("wrong among the rest", "wrong_left"), ("right ones lost", "right_dropped")):
        dropping.add_row(title, *(f"{row[key]:.0%}" for row in judged["dropping"]))
    console.print(dropping)


def _table() -> Table:
    return Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))


def _objectives(result: dict[str, Any]) -> Table:
    table = _table()
    names = (
        "objective",
        "mean weight",
        "5 %",
        "median",
        "95 %",
        "eff. sample",
        "update / MLE",
        "w < 0.01",
        "exponent",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "objective" else "right")
    for entry in result["objectives"]:
        weight, optimum = entry["weight"], entry["optimum"]
        exponent = optimum["exponent"]["0.5"] if optimum and optimum["exponent"] else None
        collapsed = f" ({optimum['collapsed']} one-hot)" if optimum and optimum["collapsed"] else ""
        table.add_row(
            entry["label"],
            f"{weight['mean']:.3g}",
            *(f"{weight['quantiles'][q]:.2g}" for q in ("0.05", "0.5", "0.95")),
            f"{weight['effective_sample_size']:.0%}",
            f"{entry['update_ratio']:.3g}",
            f"{entry['gets_nothing']['count']} ({entry['gets_nothing']['share']:.0%})",
            (f"{exponent:.3f}" if exponent is not None else "–") + collapsed,
        )
    return table


def _tenths(result: dict[str, Any]) -> Table:
    table = _table()
    first = result["objectives"][0]["by_p_bar"]
    table.add_column("p̄ up to")
    for row in first:
        table.add_column(f"{row['to']:.2g}", justify="right")
    table.add_row("mle", *(f"{row['mle_share']:.1%}" for row in first), style="dim")
    for entry in result["objectives"]:
        table.add_row(entry["label"], *(f"{row['share']:.1%}" for row in entry["by_p_bar"]))
    return table


def _comparison(comparison: dict[str, Any]) -> Table:
    table = _table()
    for name in ("tenth by p̄ before", "NLL before", "NLL after", "p̄ before", "p̄ after", "records worse"):
        table.add_column(name, justify="left" if name.startswith("tenth") else "right")
    rows = [(f"{row['from']:.2g} to {row['to']:.2g}", row) for row in comparison["by_p_bar"]]
    for name, row in [*rows, ("all", comparison["all"])]:
        values = (row[key] for key in ("nll_before", "nll_after", "p_bar_before", "p_bar_after"))
        table.add_row(name, *(f"{value:.3f}" for value in values), f"{row['worse']:.0%}")
    return table
