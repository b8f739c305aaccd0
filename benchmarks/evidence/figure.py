r"""Draw docs/evidence/30.svg from results/evidence.jsonl: each arm's BLEU at greedy and beam search, every seed a dot.

python benchmarks/evidence/figure.py results/evidence.jsonl \
        --experiment multi30k-en-de-exchanged-30 --output docs/evidence/30.svg
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from rows import read_jsonl  # noqa: E402

WIDTH, LEFT, RIGHT, ROW, TOP = 760, 190, 60, 46, 62
COLOURS = {"greedy": "#0072B2", "beam5": "#D55E00"}
NAMES = {
    "start": "start (MLE, from scratch)",
    "mle": "MLE",
    "dft": "token level (DFT)",
    "convex-k1": "convex k = 1",
    "convex-k2": "convex k = 2",
    "convex-k4": "convex k = 4",
    "convex-k8": "convex k = 8",
    "filter-mle": "MLE, filtered by p̄",
    "oracle-mle": "MLE, clean pairs (oracle)",
}


def points(rows: list[dict[str, Any]], experiment: str, metric: str) -> dict[tuple[str, str], list[float]]:
    """By (arm, search): each seed's mean over the test sets, at the chosen checkpoints."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        if row["experiment"] == experiment and row["metric"] == metric and row["role"] == "test" and row["selected"]:
            found.setdefault((row["arm"], row["search"]), {}).setdefault(row["seed"], []).append(row["score"])
    return {key: [mean(scores) for scores in seeds.values()] for key, seeds in found.items()}


def draw(found: dict[tuple[str, str], list[float]], title: str, unit: str) -> str:
    """The figure as SVG text."""
    from convexlm.report.svg import Scale, drawing, element, padded, tick_text, ticks

    arms = list(dict.fromkeys(arm for name in NAMES for arm, _ in found if arm == name))
    arms += [arm for arm in dict.fromkeys(arm for arm, _ in found) if arm not in arms]
    low, high = padded([value for values in found.values() for value in values], 0.08)
    x = Scale(low, high, LEFT, WIDTH - RIGHT)
    bottom = TOP + ROW * len(arms)
    parts = [element("rect", x=0, y=0, width=WIDTH, height=bottom + 44, fill="#ffffff")]
    parts.append(element("text", title, x=12, y=22, font_size=15, font_weight="bold", fill="#222222"))
    for at, search in zip((LEFT, LEFT + 110), COLOURS, strict=True):
        parts.append(element("circle", cx=at + 4, cy=40, r=5, fill=COLOURS[search]))
        parts.append(element("text", search, x=at + 14, y=44, font_size=12, fill="#222222"))
    parts.append(element("text", "small dots: seeds", x=LEFT + 220, y=44, font_size=12, fill="#666666"))
    marks = ticks(low, high, 6)
    for mark in marks:
        label = tick_text(mark, marks[1] - marks[0] if len(marks) > 1 else 1.0)
        parts.append(element("line", x1=x(mark), x2=x(mark), y1=TOP - 6, y2=bottom, stroke="#dddddd"))
        parts.append(
            element("text", label, x=x(mark), y=bottom + 16, font_size=12, text_anchor="middle", fill="#666666")
        )
    parts.append(
        element("text", unit, x=(LEFT + WIDTH - RIGHT) / 2, y=bottom + 34, font_size=12, text_anchor="middle")
    )
    for number, arm in enumerate(arms):
        y = TOP + ROW * number + ROW / 2
        name = NAMES.get(arm, arm)
        parts.append(element("text", name, x=LEFT - 12, y=y + 4, font_size=13, text_anchor="end", fill="#222222"))
        for offset, search in ((-9.0, "greedy"), (9.0, "beam5")):
            values = found.get((arm, search), [])
            for value in values if len(values) > 1 else []:
                parts.append(
                    element("circle", cx=x(value), cy=y + offset, r=2.5, fill=COLOURS[search], fill_opacity=0.5)
                )
            if values:
                middle = mean(values)
                parts.append(element("circle", cx=x(middle), cy=y + offset, r=5, fill=COLOURS[search]))
                words = {"font_size": 11, "fill": "#444444"}
                parts.append(element("text", f"{middle:.1f}", x=WIDTH - RIGHT + 10, y=y + offset + 4, **words))
    svg = str(drawing(WIDTH, bottom + 44, title, *parts))
    # A file of its own needs the namespace and a font.
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" ', 1) + "\n"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--metric", default="bleu")
    parser.add_argument("--title", default="Multi30k en-de, 30 % of the training targets exchanged")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    found = points(read_jsonl(args.rows), args.experiment, args.metric)
    if not found:
        raise SystemExit(f"{args.rows} has no test scores of {args.experiment}")
    unit = f"{args.metric.upper() if args.metric == 'bleu' else args.metric}, mean over the three test sets"
    args.output.write_text(draw(found, args.title, unit), encoding="utf-8")


if __name__ == "__main__":
    main()
