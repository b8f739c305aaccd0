"""Records that stand in a batch a second time: several processes get batches alike, so the last ones are filled up."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from datasets import IterableDataset
from transformers.trainer_utils import has_length

from convexlm.collator import ROW
from convexlm.objectives import IGNORE_INDEX

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


class NoRepeats:
    """Mixed into a Trainer before its class."""

    _told_of_streams: tuple[str, ...] = ()
    _dealer: Any = None  # the sampler of `batch_rebalance`

    def _without_repeats(self: Any, batch: dict[str, Any], *, training: bool) -> tuple[dict[str, Any], Tensor]:
        """The batch with records masked that fill up the last batch of several processes, and its number of tokens.

        Args:
            batch: of the collator.
            training: whether it comes from the training data. The model's own mode does not say so: after an
                evaluation it changes back only when the next step begins.
        """
        labels, attention, rows = batch.get("labels"), batch.get("attention_mask"), batch.get(ROW)
        if labels is None:
            raise ValueError(
                f"the batch has no `labels` (it has {', '.join(batch)}); your `data_collator` has to give them, with "
                "-100 where a token is no target"
            )
        seen = attention if attention is not None else torch.ones_like(labels) if rows is None else (rows >= 0).long()
        state = self.accelerator.gradient_state
        # The sampler of `batch_rebalance` deals records to the processes itself: see `_without_fillers`.
        deals = training and self.args.train_sampling_strategy == "batch_rebalance"
        several = self.accelerator.num_processes > 1 and state.end_of_dataloader
        real = self._real_in_last_batch(training) if several else 0
        if real > 0 and not deals:
            if rows is None:
                rows = torch.arange(labels.shape[0], device=labels.device)[:, None]
            # Positions in the last batch of all processes together.
            first = self.accelerator.process_index * (rows.max() + 1)
            repeated = first + rows >= real
            batch = {**batch, "labels": labels.masked_fill(repeated, IGNORE_INDEX)}
            seen = seen.masked_fill(repeated, 0)
        return batch, seen.sum()

    def _without_fillers(self: Any, batches: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Any]:
        """The micro-batches of a step with records masked by which `batch_rebalance` fills up an epoch's last one.

        Returns:
            The micro-batches, and how many tokens these records have.
        """
        fillers = getattr(self._dealer, "fillers", None)
        if not fillers or not self.accelerator.gradient_state.end_of_dataloader:
            return batches, 0
        made: list[dict[str, Any]] = []
        tokens: Any = 0
        for batch, repeats in zip(batches, fillers, strict=True):
            labels, attention, rows = batch["labels"], batch.get("attention_mask"), batch.get(ROW)
            if rows is None:
                rows = torch.arange(labels.shape[0], device=labels.device)[:, None]
            numbers = torch.tensor([row for row, repeat in enumerate(repeats) if repeat], device=labels.device)
            repeated = torch.isin(rows, numbers).expand(labels.shape)
            tokens += (repeated if attention is None else repeated & attention.bool()).sum()
            made.append({**batch, "labels": labels.masked_fill(repeated, IGNORE_INDEX)})
        return made, tokens

    def _real_in_last_batch(self: Any, training: bool) -> int:
        """How many records of the last batch of all processes are no repetitions; not above 0: all, or unknown."""
        remainder: int = self.accelerator.gradient_state.remainder
        known = remainder >= 0 or not training or self.args.dataloader_drop_last
        if known or not has_length(self.train_dataset):
            return remainder
        # accelerate does not know it in an epoch that is gone on with after a resume.
        split = self.accelerator.split_batches
        return len(self.train_dataset) % (self._train_batch_size * (1 if split else self.accelerator.num_processes))

    def _warn_of_a_stream(self: Any, dataset: Any, kind: str) -> None:
        """Say once that where a stream ends, nobody can tell repetitions."""
        if not isinstance(dataset, IterableDataset) or self.accelerator.num_processes == 1:
            return
        if kind in self._told_of_streams:
            return
        self._told_of_streams += (kind,)
        logger.warning(
            "The %s data are a stream, whose length is unknown: where it ends within a batch, that batch is "
            "filled up over the %d processes with records from its beginning, which then count twice.",
            *(kind, self.accelerator.num_processes),
        )
