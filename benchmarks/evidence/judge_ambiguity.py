r"""Hold the outputs of the experiment on ambiguity against the truth, and append what is found to the rows.

    python benchmarks/evidence/judge_ambiguity.py WORK/tinyworld-choices-3 --rows results/evidence.jsonl

Of every final run, arm and search, at the checkpoint that validation chose: `mode_share` (outputs that are the one
most probable translation, in percent), `valid_share` (that are a translation at all) and `mean_probability` (100 times
the mean true probability of the outputs).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from rows import read_jsonl, write_jsonl  # noqa: E402

METRICS = ("mode_share", "valid_share", "mean_probability")


def measure(hypotheses: list[str], truths: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of one output file, in percent.

    Args:
        hypotheses: one a sentence.
        truths: for each, its translations with their probabilities.

    Raises:
        ValueError: their numbers differ.
    """
    n = len(truths)
    found = [truth.get(text, 0.0) for text, truth in zip(hypotheses, truths, strict=True)]
    modes = [text == max(truth, key=lambda one: truth[one]) for text, truth in zip(hypotheses, truths, strict=True)]
    return {
        "mode_share": 100 * sum(modes) / n,
        "valid_share": 100 * sum(p > 0 for p in found) / n,
        "mean_probability": 100 * sum(found) / n,
    }


def judged(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each metric in place of every BLEU row that stands for a chosen checkpoint on the test set."""
    truths, out = read_jsonl(folder / "data" / "truth.jsonl"), []
    for row in rows:
        if row["metric"] != "bleu" or row["role"] != "test" or not row["selected"]:
            continue
        run = folder / ("base" if row["stage"] == "base" else f"final-seed{row['seed']}")
        name = f"{row['test_set']}.{row['pair']}.{row['search']}.jsonl"
        lines = read_jsonl(run / "decode" / row["arm"] / f"checkpoint-{row['step']}" / name)
        found = measure([line["hypothesis"] for line in lines], truths)
        out += [row | {"metric": metric, "score": found[metric], "signature": "exact"} for metric in METRICS]
    return out


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="WORK/NAME of finished experiments")
    parser.add_argument("--rows", type=Path, required=True, help="file that has their rows")
    args = parser.parse_args()
    rows = [row for row in read_jsonl(args.rows) if row["metric"] not in METRICS]
    new = []
    for folder in args.folders:
        mine = judged(folder, [row for row in rows if row["experiment"] == folder.name])
        print(json.dumps({"experiment": folder.name, "rows": len(mine)}))
        new += mine
    write_jsonl(args.rows, rows + new)


if __name__ == "__main__":
    main()
