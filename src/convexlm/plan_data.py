"""What a dry run finds out about training data: how many records, and how long a sample of them is."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convexlm.dataset_names import dataset_path
from convexlm.errors import UserError

SAMPLED_RECORDS = 400


@dataclass(frozen=True)
class Data:
    """What is known of the training data: how many records, from where, and a sample of them."""

    records: int | None
    source: str
    sample: tuple[Any, ...] = ()


def count_records(dataset: str, template: str, limit: int | None = None) -> Data:
    """Read a local dataset through once, keeping a sample; a hub name is not asked for.

    Raises:
        UserError: it cannot be read.
    """
    from convexlm.instructions import iter_records

    if not dataset_path(dataset).exists():
        return Data(limit, "the hub was not asked")
    draw, count = random.Random(0), 0
    sample: list[Any] = []
    for record, _ in iter_records(dataset, template=template):
        count += 1
        if len(sample) < SAMPLED_RECORDS:
            sample.append(record)
        elif (place := draw.randrange(count)) < SAMPLED_RECORDS:
            sample[place] = record
        if limit is not None and count == limit:
            break
    if not count:
        raise UserError(f"{dataset}: there are no records in it")
    return Data(count, "counted; those whose prompt fills max_length will be dropped", tuple(sample))


def sample_lengths(
    data: Data, tokenizer_source: str | None, template: str, add_bos: bool | None, max_length: int | None
) -> dict[str, Any] | None:
    """Token lengths of the sample; None if there is none, or the tokenizer is not in a local folder.

    Returns:
        `sampled` records, their `mean` and `longest` row in tokens (cut to `max_length`), the share of `targets`, the
        tokenizer's `vocabulary`, and `in_all`, which is for the caller to fill in.

    Raises:
        UserError: the tokenizer cannot be loaded, or no record fits.
    """
    from convexlm.tokenization import PromptSettings, load_tokenizer, tokenize_records

    if not data.sample or not tokenizer_source or not Path(tokenizer_source).exists():
        return None
    tokenizer = load_tokenizer(tokenizer_source)
    settings = PromptSettings(template=template, add_bos=add_bos).resolve(tokenizer)
    rows = tokenize_records(list(data.sample), tokenizer, settings, max_length).rows
    lengths = [len(row["input_ids"]) for row in rows]
    targets = sum(label != -100 for row in rows for label in row["labels"])
    return {
        "sampled": len(rows),
        "mean": sum(lengths) / len(rows),
        "longest": max(lengths),
        "targets": targets / sum(lengths),
        "vocabulary": len(tokenizer),
        "in_all": None,
    }
