"""What a dry run finds out about training data: how many records and rows, and how long a sample of them is."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.dataset_names import dataset_path
from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convexlm.config import ConvexConfig

SAMPLED_RECORDS = 400
WINDOW = 1000  # records that TRL packs together: what `datasets` hands to a batched function


@dataclass(frozen=True)
class Data:
    """What is known of the training data: how many records, from where, and a sample of them."""

    records: int | None
    source: str
    sample: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Sample:
    """Sampled records as rows.

    Attributes:
        rows: as `tokenize_records` makes them, in the data's order where `whole`.
        records: how many were sampled; those without a row are dropped in training, too.
        whole: these are all the records that there are.
        tokenizer: theirs.
    """

    rows: list[dict[str, Any]]
    records: int
    whole: bool
    tokenizer: Any

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row["input_ids"]) for row in self.rows]

    @property
    def mean(self) -> float:
        """Tokens of a row."""
        return sum(self.lengths) / len(self.rows)

    @property
    def dropped(self) -> int:
        """Records whose prompt alone fills `max_length`."""
        return self.records - len(self.rows)

    def kept_of(self, records: int) -> int:
        """How many of so many records will be trained on; for certain, if this is all of them."""
        return max(1, round(records * len(self.rows) / self.records))

    def as_dict(self) -> dict[str, Any]:
        """What `plan_training` says of it: `in_all` is for the caller to fill in."""
        targets = sum(label != -100 for row in self.rows for label in row["labels"])
        return {
            "sampled": self.records,
            "dropped": self.dropped,
            "mean": self.mean,
            "longest": max(self.lengths),
            "targets": targets / sum(self.lengths),
            "vocabulary": len(self.tokenizer),
            "in_all": None,
        }


@dataclass(frozen=True)
class Rows:
    """The rows of one pass over the data.

    Attributes:
        count: how many; None if that cannot be told.
        about: whether it is from a sample.
        tokens: of each, on average; None if not known.
    """

    count: int | None
    about: bool = False
    tokens: float | None = None


def count_records(dataset: str, template: str, limit: int | None = None) -> Data:
    """Read a local dataset through once, keeping a sample; a hub name is not asked for.

    Raises:
        UserError: it cannot be read.
    """
    from convexlm.instructions import iter_records

    if not dataset_path(dataset).exists():
        if names_a_file(dataset):
            raise UserError(f"{dataset}: no such file")
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


def names_a_file(dataset: str) -> bool:
    """Whether a dataset's name can be meant as a local file or folder alone."""
    suffixes = (".json", ".jsonl", ".gz", ".parquet")
    return dataset_path(dataset).suffix in suffixes or dataset.startswith(("/", "./", "../"))


def tokenize_sample(
    data: Data, tokenizer_source: str | None, template: str, add_bos: bool | None, max_length: int | None
) -> Sample | None:
    """The sample as rows; None if there is none, the tokenizer is not in a local folder, or no sampled record fits.

    Raises:
        UserError: the tokenizer cannot be loaded, or no record of all fits.
    """
    from convexlm.tokenization import PromptSettings, load_tokenizer, nothing_left, tokenize_batch

    if not data.sample or not tokenizer_source or not Path(tokenizer_source).exists():
        return None
    tokenizer = load_tokenizer(tokenizer_source)
    settings = PromptSettings(template=template, add_bos=add_bos).resolve(tokenizer)
    done = tokenize_batch(data.sample, tokenizer, settings, max_length)
    whole = data.records == len(data.sample)
    if not done.rows:
        if whole:
            raise nothing_left(done.dropped, len(data.sample), max_length)
        return None
    return Sample(done.rows, len(data.sample), whole, tokenizer)


def rows_of_epoch(data: Data, sample: Sample | None, config: ConvexConfig) -> Rows:
    """How many rows training will have of the data: dropped records are none, and packed ones share one."""
    if data.records is None:
        return Rows(None, tokens=sample.mean if sample else None)
    if sample is None:
        return Rows(None if config.packing else data.records)
    kept = sample.kept_of(data.records)
    if config.packing:
        return _packed(sample, kept, config)
    return Rows(kept, not sample.whole and config.max_length is not None, sample.mean)


def _packed(sample: Sample, kept: int, config: ConvexConfig) -> Rows:
    """The sample packed as TRL will pack all: each worker its own part, in windows."""
    workers = min(config.dataset_num_proc or 1, kept)
    limit = int(config.max_length or 1024)
    lengths = sample.lengths
    if sample.whole:
        shares = [kept // workers + (number < kept % workers) for number in range(workers)]
        ends = [0, *itertools.accumulate(shares)]
        parts = [lengths[start:end] for start, end in itertools.pairwise(ends)]
        rows = sum(packed_rows(part, limit, config.packing_strategy) for part in parts)
        return Rows(rows, tokens=sum(lengths) / rows)
    # Fewer records fit together less well, so there are as many as training has in a window.
    window = list(itertools.islice(itertools.cycle(lengths), min(WINDOW, math.ceil(kept / workers))))
    rows = packed_rows(window, limit, config.packing_strategy)
    return Rows(math.ceil(rows * kept / len(window)), about=True, tokens=sum(window) / rows)


def packed_rows(lengths: Sequence[int], max_length: int, strategy: str) -> int:
    """How many rows TRL makes of records of these lengths."""
    import datasets
    from trl import pack_dataset

    records = datasets.Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return len(pack_dataset(records, max_length, strategy, {"keep_in_memory": True}))
    finally:
        if shown:
            datasets.enable_progress_bars()
