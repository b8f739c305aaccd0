r"""Hold the outputs of the experiment on ambiguity against the truth, and append what is found to the rows.

    python benchmarks/evidence/judge_ambiguity.py WORK/tinyworld-choices-3 --rows results/evidence.jsonl

Of every final run, arm and search, at the checkpoint that validation chose: `mode_share` (outputs that are the one
most probable translation, in percent), `valid_share` (that are a translation at all) and `mean_probability` (100 times
the mean true probability of the outputs). And what theory says of greedy search, `predicted_mode_share`: of greedy
search by tokens in each objective's exact optimum (`convexlm.theory.optimum`, with their lengths in tokens).
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
PREDICTED = "predicted_mode_share"
PREDICTED_SENTENCES = 200


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


def greedy(rows: list[list[int]], probabilities: list[float]) -> int:
    """Which of the token sequences greedy search finds in a distribution over them.

    Args:
        rows: token ids with EOS, so that none is the beginning of another.
        probabilities: of each.
    """
    alive, place = list(range(len(rows))), 0
    while len(alive) > 1:
        mass: dict[int, float] = {}
        for index in alive:
            token = rows[index][place]
            mass[token] = mass.get(token, 0.0) + probabilities[index]
        best = max(mass, key=lambda token: mass[token])
        alive, place = [index for index in alive if rows[index][place] == best], place + 1
    return alive[0]


def predicted_mode_share(truths: list[dict[str, float]], tokenizer: Any, objective: str, k: float | None) -> float:
    """How often greedy search in the objective's optimum finds the most probable translation, in percent."""
    from convexlm.theory import optimum

    hits = 0
    for truth in truths:
        rows = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in truth]
        d = list(truth.values())
        best = optimum(d, [len(row) for row in rows], objective, **({} if k is None else {"k": k}))
        hits += greedy(rows, list(best.probabilities)) == d.index(max(d))
    return 100 * hits / len(truths)


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
    if out:
        from convexlm.tokenization import load_tokenizer

        tokenizer, few = load_tokenizer(str(folder / "data" / "tokenizer")), truths[:PREDICTED_SENTENCES]
        for arm in dict.fromkeys(row["arm"] for row in out):
            row = next(row for row in out if row["arm"] == arm)
            score = predicted_mode_share(few, tokenizer, row["objective"], row["k"])
            about = {"metric": PREDICTED, "score": score, "search": "greedy", "stage": "theory", "role": "theory"}
            dropped = ("seed", "step", "learning_rate", "minutes")
            out.append({key: value for key, value in (row | about).items() if key not in dropped})
            out[-1]["num_sentences"] = len(few)
    return out


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="WORK/NAME of finished experiments")
    parser.add_argument("--rows", type=Path, required=True, help="file that has their rows")
    args = parser.parse_args()
    rows = [row for row in read_jsonl(args.rows) if row["metric"] not in (*METRICS, PREDICTED)]
    new = []
    for folder in args.folders:
        mine = judged(folder, [row for row in rows if row["experiment"] == folder.name])
        print(json.dumps({"experiment": folder.name, "rows": len(mine)}))
        new += mine
    write_jsonl(args.rows, rows + new)


if __name__ == "__main__":
    main()
