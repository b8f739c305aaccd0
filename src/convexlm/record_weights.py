"""The `weight` column of a dataset, looked at before a record of it is trained on."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, IterableDataset

from convexlm.collator import weight_of

_BATCH = 10_000


def check_record_weights(dataset: Any, name: str) -> None:
    """See that a dataset's weights are numbers that weigh, and that some record has one above 0.

    Streams, whose records are not there yet, and rows that are packed already (a list of numbers each) pass.

    Args:
        dataset: with or without a column `weight`.
        name: what it is called in the message.

    Raises:
        ValueError: a weight is negative or not finite, or all are 0.
    """
    if not isinstance(dataset, Dataset) or "weight" not in dataset.column_names:
        return
    number, any_weighs = 0, False
    # In pieces, so that memory does not grow with the dataset.
    for batch in dataset.select_columns("weight").with_format(None).iter(_BATCH):
        for weight in batch["weight"]:
            if isinstance(weight, list):
                return
            try:
                value = weight_of(weight)
            except ValueError as error:
                raise ValueError(f"{name}, record {number}: {error}") from None
            number, any_weighs = number + 1, any_weighs or value > 0
    if number and not any_weighs:
        raise ValueError(
            f"{name}: every record has the weight 0, so none of it counts; leave the dataset out, or its "
            "column `weight`"
        )


def columns_of(dataset: Any) -> list[str]:
    """The columns of a dataset or stream, from its first record where a stream does not say."""
    names = getattr(dataset, "column_names", None)
    if not names and isinstance(dataset, IterableDataset):
        names = list(next(iter(dataset), {}))
    return list(names or ())
