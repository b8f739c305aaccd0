"""The `weight` column of a dataset, looked at before a record of it is trained on."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, IterableDataset

from convexlm.collator import check_weight


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
    weights = list(dataset["weight"])
    if any(isinstance(weight, list) for weight in weights):
        return
    weights = [1.0 if weight is None else float(weight) for weight in weights]
    for number, weight in enumerate(weights):
        try:
            check_weight(weight)
        except ValueError as error:
            raise ValueError(f"{name}, record {number}: {error}") from None
    if weights and not any(weights):
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
