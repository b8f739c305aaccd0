"""Print the tables of docs/evidence, in Markdown, from the rows and intervals in results/.

python benchmarks/evidence/tables.py results/evidence.jsonl results/evidence-intervals.json --experiment NAME
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

from rows import read_jsonl  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

SEARCHES = ("greedy", "beam5")


def compared(
    rows: list[dict[str, Any]],
    intervals: list[dict[str, Any]],
    baseline: str,
    metric: str,
    arms: Sequence[str] = (),
) -> list[str]:
    """Every arm (or some) against an arm at the same search: score, difference, intervals, p, each seed's."""
    out = [
        "| search | arm | " + metric + " | difference | sentences, 95 % | seeds, 95 % | p | p (Holm) | each seed |",
        "|---|---|--:|--:|---|---|--:|--:|---|",
    ]
    for search in SEARCHES:
        base = f"{baseline} {search}"
        same = [one for one in intervals if one["baseline"] == base and one["metric"] == metric]
        seeds = {seed for one in same for seed in one["delta_by_seed"]}
        scores = [
            row["score"]
            for row in final(rows, metric)
            if (row["arm"], row["search"]) == (baseline, search) and (not seeds or str(row["seed"]) in seeds)
        ]
        out.append(f"| {search} | `{baseline}` | {mean(scores):.2f} | | | | | | |")
        for one in same:
            arm, other = one["system"].rsplit(" ", 1)
            if other != search or (arms and arm not in arms):
                continue
            out.append(
                f"| {search} | `{arm}` | {one['score']:.2f} | {one['delta']:+.2f} "
                f"| [{one['delta_low']:+.2f}, {one['delta_high']:+.2f}] | {seed_interval(one)} "
                f"| {one['p_two_sided']:.3f} | {one['p_holm']:.3f} | {each_seed(one)} |"
            )
    return out


def crossed(intervals: list[dict[str, Any]], arm: str, baseline: str, metric: str) -> list[str]:
    """The one arm at greedy search against another arm at beam search."""
    for one in intervals:
        if (one["system"], one["baseline"], one["metric"]) == (f"{arm} greedy", f"{baseline} beam5", metric):
            return [
                f"`{arm}` greedy against `{baseline}` beam5: {one['delta']:+.2f} {metric} (sentences "
                f"[{one['delta_low']:+.2f}, {one['delta_high']:+.2f}], p = {one['p_two_sided']:.3f}; seeds "
                f"{seed_interval(one)}: {each_seed(one)})"
            ]
    return []


def by_test_set(rows: list[dict[str, Any]], metric: str) -> list[str]:
    """Arm by test set, greedy / beam, means over seeds."""
    kept = [*final(rows, metric), *(r for r in rows if r["stage"] == "base" and r["metric"] == metric)]
    kept = [row for row in kept if row["role"] == "test"]
    sets = sorted({row["test_set"] for row in kept})
    out = ["| arm | " + " | ".join(sets) + " |", "|---|" + "--:|" * len(sets)]
    for arm in dict.fromkeys(row["arm"] for row in sorted(kept, key=lambda row: row["stage"] != "base")):
        cells = []
        for name in sets:
            pair = []
            for search in SEARCHES:
                found = [
                    row["score"] for row in kept if (row["arm"], row["test_set"], row["search"]) == (arm, name, search)
                ]
                pair.append(f"{mean(found):.2f}" if found else "-")
            cells.append(" / ".join(pair))
        out.append(f"| `{arm}` | " + " | ".join(cells) + " |")
    return out


def tuning(rows: list[dict[str, Any]]) -> list[str]:
    """Validation BLEU of every arm by learning rate, at its first / second stopping step."""
    kept = [row for row in rows if row["stage"] == "tune" and row["metric"] == "bleu"]
    rates = sorted({row["learning_rate"] for row in kept})
    out = ["| arm | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---|" + "--:|" * len(rates)]
    for arm in dict.fromkeys(row["arm"] for row in kept):
        cells = []
        for rate in rates:
            found = sorted((r["step"], r["score"]) for r in kept if (r["arm"], r["learning_rate"]) == (arm, rate))
            cells.append(" / ".join(f"{score:.2f}" for _, score in found))
        out.append(f"| `{arm}` | " + " | ".join(cells) + " |")
    return out


def chosen(rows: list[dict[str, Any]]) -> list[str]:
    """What each final run was chosen at, and its minutes of training."""
    kept = [row for row in final(rows, "bleu") if row["search"] == "greedy"]
    out = ["| arm | learning rate | stopping step, each seed | minutes a training |", "|---|--:|---|--:|"]
    for arm in dict.fromkeys(row["arm"] for row in kept):
        mine = {row["seed"]: row for row in kept if row["arm"] == arm}
        steps = ", ".join(str(row["step"]) for _, row in sorted(mine.items()))
        minutes = mean(row["minutes"] for row in mine.values())
        out.append(f"| `{arm}` | {next(iter(mine.values()))['learning_rate']:g} | {steps} | {minutes:.1f} |")
    return out


def final(rows: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The test scores that arms are compared by."""
    return [
        row
        for row in rows
        if row["stage"] == "final" and row["role"] == "test" and row["selected"] and row["metric"] == metric
    ]


def seed_interval(one: dict[str, Any]) -> str:
    """The interval over seeds as text."""
    return "[{:+.2f}, {:+.2f}]".format(*one["seed_interval"]) if one["seed_interval"] else "-"


def each_seed(one: dict[str, Any]) -> str:
    """The seeds' differences as text."""
    return ", ".join(f"{delta:+.2f}" for _, delta in sorted(one["delta_by_seed"].items()))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("intervals", type=Path)
    parser.add_argument("--experiment", required=True)
    parser.add_argument(
        "--part", default="all", help="of the rows of intervals.py: `all`, `short`, `long`, or as named there"
    )
    args = parser.parse_args()
    rows = [row for row in read_jsonl(args.rows) if row["experiment"] == args.experiment]
    intervals = json.loads(args.intervals.read_text(encoding="utf-8"))
    intervals = [
        one for one in intervals if one["experiment"] == args.experiment and one.get("part", "all") == args.part
    ]
    arms = list(dict.fromkeys(row["arm"] for row in final(rows, "bleu")))
    parts = [compared(rows, intervals, "mle", "bleu"), compared(rows, intervals, "mle", "chrf")]
    for base in ("mle", "oracle-mle"):
        parts.append([line for arm in arms for line in crossed(intervals, arm, base, "bleu")])
    if "oracle-mle" in arms:
        parts.append(compared(rows, intervals, "oracle-mle", "bleu"))
    parts += [by_test_set(rows, "bleu"), tuning(rows), chosen(rows)]
    print("\n\n".join("\n".join(part) for part in parts))


if __name__ == "__main__":
    main()
