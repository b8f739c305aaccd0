"""A trainer's data: TRL's preparation, weights carried through packing, and rows that are packed already."""

from __future__ import annotations

import copy
import logging
import random
from dataclasses import replace
from typing import Any

from datasets import Dataset, IterableDataset
from trl import pack_dataset

from convexlm.attributes import changed
from convexlm.collator import RECORD, ConvexCollator, check_labels, weight_of
from convexlm.record_weights import check_record_weights, columns_of
from convexlm.refusals import refuse_lost_weights, refuse_packed_rows

logger = logging.getLogger(__name__)

PACKED = "seq_lengths"  # TRL's column of packed rows
WINDOW = 1000  # packed rows, at least those of the records that are packed together


class PreparedData:
    """Mixed into a Trainer before its class.

    Attributes:
        _lifted_max_length: the `max_length` that TRL is not told of; None: it is told.
    """

    _lifted_max_length: int | None = None

    def _prepare_dataset(
        self: Any,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """TRL's preparation, with the `weight` column carried through packing."""
        if self._lifted_max_length is not None:
            args = copy.copy(args)
            args.max_length = self._lifted_max_length
        check_record_weights(dataset, f"{dataset_name} dataset")
        columns = columns_of(dataset)
        if packing and isinstance(dataset, Dataset) and {"input_ids", "labels"} <= set(columns):
            _check_all_labels(dataset, f"{dataset_name} dataset")
        if PACKED in columns:
            # Packed already: by the user, from `evaluate(trainer.eval_dataset)`, or by TRL, which prepares each of a
            # dict twice. Its rows would be packed, or cut, as if they were records.
            return self._with_labels(dataset, processing_class, args, formatting_func, dataset_name)
        has_weights = "weight" in columns
        before = len(dataset) if isinstance(dataset, Dataset) else None
        # The training data come first; an evaluation set may have their name.
        named = isinstance(dataset, Dataset) and RECORD in columns and dataset_name == "train"
        named = named and self._record_names is None
        if packing and (has_weights or named):
            dataset = self._prepare_packed(dataset, processing_class, args, formatting_func, dataset_name, named)
        else:
            dataset = super()._prepare_dataset(  # type: ignore[misc]
                dataset, processing_class, args, packing, formatting_func, dataset_name
            )
        if packing and isinstance(dataset, IterableDataset) and dataset_name == "train":
            dataset = mixed(dataset, args.data_seed if args.data_seed is not None else args.seed)
        if before is not None and not packing and len(dataset) < before:
            logger.warning(
                "%s dataset: %d of %d records were dropped, for no target token of theirs lies within max_length=%s",
                *(dataset_name, before - len(dataset), before, args.max_length),
            )
            if len(dataset) == 0:
                raise ValueError(f"the {dataset_name} dataset is empty: give a larger `max_length`, or other records")
        return dataset

    def _with_labels(
        self: Any, dataset: Any, processing_class: Any, args: Any, formatting_func: Any, name: str
    ) -> Any:
        """A dataset whose rows stay as many and as long as they are, tokenized and with `labels` where it lacks them.

        Without, a collator would take every token for a target, whatever `completion_mask` says.
        """
        if "labels" in columns_of(dataset):
            return dataset
        args = copy.copy(args)
        args.max_length, args.shuffle_dataset = None, False
        return super()._prepare_dataset(  # type: ignore[misc]
            dataset, processing_class, args, False, formatting_func, name
        )

    def _prepare_packed(
        self: Any, dataset: Any, processing_class: Any, args: Any, formatting_func: Any, name: str, named: bool
    ) -> Any:
        # TRL's own packing keeps only token columns, so the weight becomes one: a number for every token. Of the
        # records' names it takes the numbers.
        if args.max_length is None:
            raise ValueError("`packing` needs a `max_length`: the length of a packed row")
        unpacked_args = copy.copy(args)
        unpacked_args.max_length = None  # packing itself cuts or splits what is too long
        dataset = super()._prepare_dataset(  # type: ignore[misc]
            dataset, processing_class, unpacked_args, False, formatting_func, name
        )
        map_kwargs = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        has_weights = "weight" in columns_of(dataset)
        spread = {"_weight": "weight"} if has_weights else {}
        if named:
            self._record_names = dataset[RECORD]
            spread["_record"] = RECORD

        def spell_out(example: dict[str, Any], number: int) -> dict[str, list[Any]]:
            length = len(example["input_ids"])
            made: dict[str, list[Any]] = {}
            if has_weights:
                weight = example["weight"]
                # A list: a row that is wrapped already, which comes out as it was.
                made["_weight"] = weight if isinstance(weight, list) else [weight_of(weight)] * length
            if named:
                made["_record"] = [number] * length
            return made

        dataset = dataset.map(spell_out, with_indices=True, **map_kwargs)
        dataset = dataset.select_columns(["input_ids", "labels", *spread]).rename_columns(spread)
        dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, map_kwargs)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def predict(
        self: Any, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> Any:
        """As in the Trainer, of records as `evaluate` takes them, one prediction a row.

        So rows are cut at `max_length` as in training, but neither packed, flattened nor left out.
        """
        collator = self.data_collator
        if not self._skip_prepare_dataset:
            check_record_weights(test_dataset, f"{metric_key_prefix} dataset")
            test_dataset = self._with_labels(
                test_dataset, self.processing_class, self.args, self._formatting_func, metric_key_prefix
            )
            limit, packed = self.args.max_length, PACKED in columns_of(test_dataset)
            if limit is not None and not packed:
                kept = slice(limit) if self.args.truncation_mode == "keep_start" else slice(-limit, None)
                test_dataset = test_dataset.map(
                    lambda row: {name: row[name][kept] for name in ("input_ids", "labels")}
                )
        if isinstance(collator, ConvexCollator) and collator.padding_free and PACKED not in columns_of(test_dataset):
            collator = replace(collator, padding_free=False)  # type: ignore[call-arg]
        with changed(self, data_collator=collator):
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)  # type: ignore[misc]

    def _set_signature_columns_if_needed(self: Any) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if "weight" not in self._signature_columns:
            self._signature_columns.append("weight")
        # A collator of the user's own would try to make a tensor of them; and where a stream is dealt out by one
        # process, only tensors travel.
        deals = isinstance(self.train_dataset, IterableDataset) and self.accelerator.dispatch_batches is not False
        own = isinstance(self.data_collator, ConvexCollator) and not (deals and self.accelerator.num_processes > 1)
        if own and RECORD not in self._signature_columns:
            self._signature_columns.append(RECORD)

    def _get_dataloader(
        self: Any,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in the Trainer; `evaluate` and `predict` take datasets that nobody has looked at yet.

        `dataloader_drop_last` is for training alone: an evaluation without some records would be of other data, the
        more so the larger its batches.
        """
        name = f"the {description.lower()} dataset"
        refuse_lost_weights(self.data_collator, {name: dataset})
        refuse_packed_rows(self.data_collator, {name: dataset})
        if dataset is not self.train_dataset:
            self._warn_of_a_stream(dataset, description.lower())
        with changed(self.args, dataloader_drop_last=self.args.dataloader_drop_last and is_training):
            return super()._get_dataloader(  # type: ignore[misc]
                dataset, description, batch_size, sampler_fn, is_training, **kwargs
            )


def mixed(packed: IterableDataset, seed: int) -> IterableDataset:
    """A stream of packed rows in a random order within each `WINDOW` of them.

    Packing fits together a window of 1,000 records, the longest first, so that training would go from long records to
    short ones and back again, whatever order they had before. What is not a stream is shuffled by its sampler.

    Args:
        packed: the rows.
        seed: of the order, which is the same in every process and after a resume.
    """

    def mix(rows: Any, places: list[int]) -> Any:
        order = random.Random(f"{seed}/{places[0]}").sample(range(len(rows)), len(rows))
        return rows.take(order)

    in_arrow = packed.with_format("arrow")
    return in_arrow.map(mix, with_indices=True, batched=True, batch_size=WINDOW).with_format(None)


def _check_all_labels(dataset: Dataset, name: str) -> None:
    """As `check_labels` of every record, before records are packed, which would hide it."""
    number = 0
    for table in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(10_000):
        lengths = [
            [length for chunk in table[column].chunks for length in chunk.value_lengths().to_pylist()]
            for column in ("input_ids", "labels")
        ]
        for tokens, labels in zip(*lengths, strict=True):
            try:
                check_labels(tokens, labels)
            except ValueError as error:
                raise ValueError(f"{name}, record {number}: {error}") from None
            number += 1
