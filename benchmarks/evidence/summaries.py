"""The tables that set experiments side by side: differences to `mle`, greedy / beam 5, a mark on what is not sure."""

from __future__ import annotations

from statistics import mean
from typing import Any

from tables import SEARCHES, final, seed_interval

UNSURE = "°"


def summary(table: dict[str, Any], intervals: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A row an experiment, a column a kind of arm.

    Args:
        table: `head`, the columns' names, the first that of the data; `rows`, each the data's name, the experiment,
            and one cell a further column: arms with `; ` between, each with a name of its own before `: ` if the
            column's does not say enough, or plain text after `= `.
        intervals: by experiment, as intervals.py wrote them.
    """
    out = ["| " + " | ".join(table["head"]) + " |", "|---|" + "--:|" * (len(table["head"]) - 1)]
    for label, experiment, *cells in table["rows"]:
        filled = [cell(text, intervals[experiment]) for text in cells]
        filled += [""] * (len(table["head"]) - 1 - len(filled))
        out.append(f"| {label} | " + " | ".join(filled) + " |")
    return out


def cell(text: str, intervals: list[dict[str, Any]]) -> str:
    """What one cell's arms gained: the first as it is, further ones in brackets."""
    if not text or text.startswith("= "):
        return text.removeprefix("= ")
    parts = []
    for one in text.split("; "):
        name, _, arm = one.rpartition(": ")
        parts.append((f"{name}: " if name else "") + gain(intervals, arm))
    return parts[0] + (f" ({'; '.join(parts[1:])})" if parts[1:] else "")


def gain(intervals: list[dict[str, Any]], arm: str) -> str:
    """`+1.58 / +0.77`: an arm against `mle`, greedy / beam 5."""
    return " / ".join(f"{one['delta']:+.2f}{'' if sure(one) else UNSURE}" for one in against_mle(intervals, arm))


def against_mle(intervals: list[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    """The comparisons of an arm with `mle` in BLEU, one a search.

    Raises:
        KeyError: there is none.
    """
    out = []
    for search in SEARCHES:
        wanted = (f"{arm} {search}", f"mle {search}", "bleu")
        found = [one for one in intervals if (one["system"], one["baseline"], one["metric"]) == wanted]
        if len(found) != 1:
            raise KeyError(f"{wanted} is there {len(found)} times")
        out.append(found[0])
    return out


def sure(one: dict[str, Any]) -> bool:
    """Whether neither interval, over sentences or over seeds, holds zero."""
    ends = [(one["delta_low"], one["delta_high"])]
    if one["seed_interval"]:
        ends.append(one["seed_interval"])
    return all(low > 0 or high < 0 for low, high in ends)


def starts(
    table: dict[str, Any], rows: dict[str, list[dict[str, Any]]], intervals: dict[str, list[dict[str, Any]]]
) -> list[str]:
    """The same arms from several starts: a row a start and search.

    Args:
        table: `arms`, each `[NAME, ARM]`, and `rows`, each `[START, MEDIAN, EXPERIMENT]`.
        rows: by experiment.
        intervals: by experiment.
    """
    heads = [f"{name} | sentences, 95 % | seeds, 95 %" for name, _ in table["arms"]]
    out = [
        "| start after | median p̄ | search | `mle` | " + " | ".join(heads) + " |",
        "|---|--:|---|--:|" + "--:|---|---|" * len(heads),
    ]
    for label, median, experiment in table["rows"]:
        for number, search in enumerate(SEARCHES):
            scores = [
                row["score"]
                for row in final(rows[experiment], "bleu")
                if (row["arm"], row["search"]) == ("mle", search)
            ]
            line = [label, str(median)] if number == 0 else ["", ""]
            line += [search, f"{mean(scores):.2f}"]
            for _, arm in table["arms"]:
                if any(one["system"] == f"{arm} {search}" for one in intervals[experiment]):
                    one = against_mle(intervals[experiment], arm)[number]
                    ends = f"[{one['delta_low']:+.2f}, {one['delta_high']:+.2f}]"
                    line += [f"{one['delta']:+.2f}", ends, seed_interval(one)]
                else:
                    line += ["not run", "", ""]
            out.append("| " + " | ".join(line) + " |")
    return out


def parts(intervals: list[dict[str, Any]], names: list[str], searches: list[str], arms: list[str]) -> list[str]:
    """Arms against `mle` on parts of the test sentences: a row an arm and search, a column a part.

    Args:
        intervals: one experiment's, of every part.
        names: of the parts, as intervals.py names them: `short`, `long`, ...
        searches: as in the rows.
        arms: in the table's order.
    """
    out = ["| arm | search | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for arm in arms:
        for search in searches:
            wanted = (f"{arm} {search}", f"mle {search}", "bleu")
            found = {
                one["part"]: f"{one['delta']:+.2f} [{one['delta_low']:+.2f}, {one['delta_high']:+.2f}]"
                for one in intervals
                if (one["system"], one["baseline"], one["metric"]) == wanted and "part" in one
            }
            out.append(f"| `{arm}` | {search} | " + " | ".join(found[name] for name in names) + " |")
    return out
