"""`python -m convexlm.plot_objectives [FILE]`: draws the objectives' value and weight against p̄ = exp(m).

The format follows the file's ending (svg, png, pdf); the default is docs/objectives.svg. The same versions of the
libraries draw the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from convexlm.objectives import Objective, get_objective

DEFAULT_FILE = Path("docs/objectives.svg")

# Label, objective, colour (told apart by colour-blind readers too) and line style.
CURVES: list[tuple[str, Objective, str, str]] = [
    ("mle", get_objective("mle"), "#000000", "-"),
    ("convex, k = 0.5", get_objective("convex", k=0.5), "#56B4E9", "-"),
    ("convex, k = 1", get_objective("convex", k=1.0), "#0072B2", "-"),
    ("convex, k = 3", get_objective("convex", k=3.0), "#003F63", "-"),
    ("convex, k = 3, mle_mix = 0.1", get_objective("convex", k=3.0, mle_mix=0.1), "#003F63", ":"),
    ("power, k = 0.5", get_objective("power", k=0.5), "#D55E00", "--"),
]


def draw(path: Path, points: int = 400) -> None:
    """Write the plot to `path`; ValueError for an ending unknown to matplotlib, OSError if it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    p = torch.linspace(0.004, 0.9999, points, dtype=torch.float64)
    m = p.log()
    # A fixed salt and no date: the file changes only when the curves do.
    with plt.rc_context(
        {"svg.hashsalt": "convexlm", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        for label, objective, colour, style in CURVES:
            look = {"label": label, "color": colour, "linestyle": style}
            left.plot(p, objective.mixed_value(m), **look)
            right.plot(p, objective.mixed_weight(m), **look)
        left.set(title="value: what a sequence adds to the loss", ylim=(0, 5.5))
        right.set(title="weight: the factor on its gradient", ylim=(0, 2.5))
        for axes in (left, right):
            axes.set(xlabel="p̄, geometric-mean token probability of the target", xlim=(0, 1))
            axes.grid(alpha=0.25)
        left.legend(frameon=False, fontsize=8, loc="upper right")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 with one line on stderr if the file cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m convexlm.plot_objectives", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=DEFAULT_FILE, help=f"default: {DEFAULT_FILE}")
    path = parser.parse_args(argv).file
    try:
        draw(path)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{parser.prog}: error: cannot draw {path}: {error}\n")
        return 2
    sys.stderr.write(f"wrote {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
