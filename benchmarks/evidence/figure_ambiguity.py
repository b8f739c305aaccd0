r"""Draw docs/evidence/ambiguity.svg: how often greedy search finds the most probable translation, by their number.

    python benchmarks/evidence/figure_ambiguity.py results/evidence.jsonl --output docs/evidence/ambiguity.svg

Prints the table of docs/evidence/ambiguity.md too. Lines are means over seeds, every seed a dot; dashed lines are what
theory predicts of a model that is free to follow the objective to its optimum.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from rows import read_jsonl  # noqa: E402

COLOURS = {"mle": "#666666", "convex-k1": "#56B4E9", "convex-k2": "#0072B2", "convex-k3": "#D55E00"}
NAMES = {"mle": "MLE", "convex-k1": "convex k = 1", "convex-k2": "convex k = 2", "convex-k3": "convex k = 3"}


def curves(rows: list[dict[str, Any]], metric: str) -> dict[str, dict[float, list[float]]]:
    """By arm, then by number of free translations: the greedy scores, one a seed."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        ours = row["experiment"].startswith("tinyworld-choices") and row["arm"] in COLOURS
        if ours and row["metric"] == metric and row["search"] == "greedy":
            found.setdefault(row["arm"], {}).setdefault(row["variants"], []).append(row["score"])
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown: means over seeds and, in brackets, every seed; what theory predicts; BLEU of both searches."""
    columns = [
        "free translations",
        "arm",
        "greedy is the mode, %",
        "theory",
        "beam5 is the mode, %",
        "BLEU greedy, beam5",
    ]
    out = ["| " + " | ".join(columns) + " |", "|--:|---|---|--:|--:|---|"]
    kept = [row for row in rows if row["experiment"].startswith("tinyworld-choices") and row["stage"] != "tune"]
    kept = [row for row in kept if row["role"] == "theory" or (row["role"] == "test" and row["selected"])]
    for n in sorted({row["variants"] for row in kept}):
        for arm, name in NAMES.items():
            found: dict[tuple[str, str], list[float]] = {}
            for row in sorted(kept, key=lambda row: row.get("seed", 0)):
                if (row["variants"], row["arm"]) == (n, arm):
                    found.setdefault((row["metric"], row["search"]), []).append(row["score"])
            if not found:
                continue
            modes = found["mode_share", "greedy"]
            out.append(
                f"| {n:g} | {name} | {mean(modes):.1f} ({', '.join(f'{score:.0f}' for score in modes)}) "
                f"| {mean(found['predicted_mode_share', 'greedy']):.0f} | {mean(found['mode_share', 'beam5']):.1f} "
                f"| {mean(found['bleu', 'greedy']):.1f}, {mean(found['bleu', 'beam5']):.1f} |"
            )
    return "\n".join(out)


def main() -> None:
    """Read the command line."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    rows = read_jsonl(args.rows)
    print(table(rows))
    measured, predicted = curves(rows, "mode_share"), curves(rows, "predicted_mode_share")
    settings = {"svg.hashsalt": "convexlm", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(settings):
        figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
        for arm, name in NAMES.items():
            for found, style in ((measured, "-"), (predicted, "--")):
                points = sorted(found.get(arm, {}).items())
                label = name if style == "-" else None
                ys = [mean(scores) for _, scores in points]
                axes.plot([n for n, _ in points], ys, style, color=COLOURS[arm], label=label, lw=1.6)
            dots = [(n, score) for n, scores in measured.get(arm, {}).items() for score in scores]
            axes.scatter([n for n, _ in dots], [score for _, score in dots], s=9, color=COLOURS[arm])
        axes.plot([], [], "--", color="#999999", label="theory")
        axes.set(xscale="log", ylim=(-3, 103), xlabel="equally good free translations beside the most probable one")
        axes.set(ylabel="greedy output is the most\nprobable translation, %")
        ticks = sorted({n for points in measured.values() for n in points})
        axes.set_xticks(ticks, [f"{n:g}" for n in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.45, 1.15))
        figure.savefig(args.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
