r"""Draw docs/evidence/kinds.svg: what each kind of wrong target, half of them, did to every way of going on.

python benchmarks/evidence/figure_kinds.py results/evidence-intervals.json results/evidence-ranks.json \
        --output docs/evidence/kinds.svg

The second file says for each experiment how often p̄ of its base ranks a right pair above a wrong one, as
`filter_data.py` prints it (`auc`); kinds stand in that order.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

WIDTH, LEFT, RIGHT, TOP, ROW = 760, 210, 24, 74, 15
ARMS = {"convex-k1": "#0072B2", "filter-65-mle": "#009E73", "dft": "#D55E00", "oracle-mle": "#888888"}
NAMES = {
    "convex-k1": "convex k = 1",
    "filter-65-mle": "65 % of lowest p̄ dropped",
    "dft": "token level (DFT)",
    "oracle-mle": "MLE on the right pairs",
}
KINDS = {
    "exchanged": "other source's target",
    "truncated": "truncated",
    "copied": "copied source",
    "wrong_language": "wrong language",
    "shuffled": "shuffled words",
}


def differences(intervals: list[dict[str, Any]], experiment: str, search: str) -> dict[str, dict[str, Any]]:
    """By arm: the row that compares it with `mle` at the same search, over all sentences."""
    return {
        row["system"].rsplit(" ", 1)[0]: row
        for row in intervals
        if row["experiment"] == experiment
        and row["metric"] == "bleu"
        and row.get("part", "all") == "all"
        and row["baseline"] == f"mle {search}"
        and row["system"].endswith(f" {search}")
    }


def draw(intervals: list[dict[str, Any]], ranks: dict[str, float], pair: str, share: int) -> str:
    """The figure as SVG text: greedy search in the upper row of a kind, beam 5 in the lower."""
    from convexlm.report.svg import Scale, drawing, element, padded, tick_text, ticks

    found = {kind: f"multi30k-{pair}-{kind}-{share}" for kind in KINDS}
    kinds = sorted((kind for kind in KINDS if found[kind] in ranks), key=lambda kind: -ranks[found[kind]])
    rows = {
        (kind, search): differences(intervals, name, search)
        for kind, name in found.items()
        for search in ("greedy", "beam5")
    }
    # The filter of the exchanged targets is an experiment of its own, from the same base and with the same steps.
    for search in ("greedy", "beam5"):
        extra = differences(intervals, f"multi30k-{pair}-exchanged-{share}-filter", search)
        rows["exchanged", search] = {**extra, **rows["exchanged", search]}
    shown = [row[arm]["delta"] for row in rows.values() for arm in ARMS if arm in row]
    low, high = padded([0.0, *shown], 0.06)
    x, height = Scale(low, high, LEFT, WIDTH - RIGHT), ROW * 2 + 26
    bottom = TOP + height * len(kinds)
    title = f"Half of the training targets wrong, five ways: BLEU against going on with MLE ({pair})"
    parts = [element("rect", x=0, y=0, width=WIDTH, height=bottom + 44, fill="#ffffff")]
    parts.append(element("text", title, x=12, y=22, font_size=14, font_weight="bold", fill="#222222"))
    for number, (arm, colour) in enumerate(ARMS.items()):
        at = 12 + number * 182
        parts.append(element("circle", cx=at + 5, cy=44, r=5, fill=colour))
        parts.append(element("text", NAMES[arm], x=at + 15, y=48, font_size=12, fill="#222222"))
    marks = ticks(low, high, 7)
    for mark in marks:
        line = "#888888" if mark == 0 else "#dddddd"
        parts.append(element("line", x1=x(mark), x2=x(mark), y1=TOP - 8, y2=bottom, stroke=line))
        label = tick_text(mark, marks[1] - marks[0])
        parts.append(
            element("text", label, x=x(mark), y=bottom + 16, font_size=12, text_anchor="middle", fill="#666666")
        )
    axis = {"font_size": 12, "text_anchor": "middle", "fill": "#444444"}
    parts.append(element("text", "BLEU − MLE's", x=(LEFT + WIDTH - RIGHT) / 2, y=bottom + 36, **axis))
    for number, kind in enumerate(kinds):
        y = TOP + height * number + 12
        parts.append(element("text", KINDS[kind], x=12, y=y + 6, font_size=13, font_weight="bold", fill="#222222"))
        told = f"p̄ ranks right above wrong: {100 * ranks[found[kind]]:.0f} %"
        parts.append(element("text", told, x=12, y=y + 24, font_size=11, fill="#666666"))
        for offset, search in ((0, "greedy"), (ROW + 6, "beam5")):
            small = {"font_size": 10, "text_anchor": "end", "fill": "#666666"}
            parts.append(element("text", search, x=LEFT - 6, y=y + offset + 4, **small))
            for arm, colour in ARMS.items():
                row = rows[kind, search].get(arm)
                if row is None:
                    continue
                ends = {"x1": x(row["delta_low"]), "x2": x(row["delta_high"])}
                parts.append(element("line", **ends, y1=y + offset, y2=y + offset, stroke=colour, stroke_width=2))
                about = element("title", f"{NAMES[arm]}, {search}: {row['delta']:+.2f}")
                parts.append(element("circle", about, cx=x(row["delta"]), cy=y + offset, r=5, fill=colour))
    svg = str(drawing(WIDTH, bottom + 44, title, *parts))
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" ', 1) + "\n"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("intervals", type=Path)
    parser.add_argument("ranks", type=Path)
    parser.add_argument("--pair", default="en-de")
    parser.add_argument("--share", type=int, default=50)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    intervals, ranks = (json.loads(path.read_text(encoding="utf-8")) for path in (args.intervals, args.ranks))
    args.output.write_text(draw(intervals, ranks, args.pair, args.share), encoding="utf-8")


if __name__ == "__main__":
    main()
