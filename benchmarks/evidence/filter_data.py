r"""Drop the records that a model finds least likely, by p̄ of the whole answer: the usual way to clean by a model.

    python benchmarks/evidence/filter_data.py --checkpoint BASE --dataset OUT/train.jsonl \
        --share 0.3 --output OUT/train.filter.jsonl

Prints one JSON object: how many were dropped, and, where records say whether they are `clean`, how many of the dropped
ones were not (precision), how many of the spoilt ones were dropped (recall), and how well p̄ parts the two (AUC).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np


def mean_log_probs(checkpoint: Path, dataset: Path, max_length: int) -> dict[str, float]:
    """Every record's mean log-probability m under the checkpoint, by the record's id."""
    import torch

    from convexlm.decoding.loading import load_model
    from convexlm.diagnosis.measure import measure
    from convexlm.instructions import load_records
    from convexlm.tokenization import PromptSettings, load_tokenizer, tokenize_records

    settings = PromptSettings.load(checkpoint)
    tokenizer = load_tokenizer(str(checkpoint))
    records = load_records(str(dataset), template=settings.template)
    tokenized = tokenize_records(records, tokenizer, settings, max_length)
    model = load_model(checkpoint, "cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    measured = measure(model, tokenized.rows, eos_token_id=tokenizer.eos_token_id)
    return {row["record_id"]: float(m) for row, m in zip(tokenized.rows, measured.m, strict=True)}


def keep_likely(rows: list[dict[str, Any]], scores: np.ndarray, share: float) -> tuple[list[dict[str, Any]], dict]:
    """Drop the `share` of the rows with the lowest scores; says what was dropped.

    Args:
        rows: records.
        scores: (n,) one a record.
        share: from 0 to 1; the number is rounded. Of equal scores the earlier records go first.
    """
    order = np.argsort(scores, kind="stable")
    dropped = set(order[: round(share * len(rows))].tolist())
    about: dict[str, Any] = {"records": len(rows), "dropped": len(dropped)}
    if all("clean" in row for row in rows):
        clean = np.array([row["clean"] for row in rows], dtype=bool)
        spoilt = {int(place) for place in np.flatnonzero(~clean)}
        about |= {"spoilt": len(spoilt)}
        if spoilt and dropped:
            hit = len(spoilt & dropped)
            about |= {"precision": hit / len(dropped), "recall": hit / len(spoilt)}
            about |= {"auc": auc(scores[clean], scores[~clean])}
    return [row for place, row in enumerate(rows) if place not in dropped], about


def auc(high: np.ndarray, low: np.ndarray) -> float:
    """The share of (high, low) couples in which the one from `high` is larger; equal ones count half."""
    everything = np.sort(low)
    below = np.searchsorted(everything, high, side="left")
    upto = np.searchsorted(everything, high, side="right")
    return float((below + upto).sum() / (2 * len(high) * len(low)))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--max_length", type=int, default=96, help="as in training")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.dataset.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    found = mean_log_probs(args.checkpoint, args.dataset, args.max_length)
    # Ids end in the line's number; a record without a target token has none, and goes first.
    by_line = {int(identity.rsplit(":", 1)[1]): m for identity, m in found.items()}
    scores = np.array([by_line.get(number, -np.inf) for number in range(1, len(rows) + 1)])
    kept, about = keep_likely(rows, scores, args.share)
    args.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    print(json.dumps(about))


if __name__ == "__main__":
    main()
