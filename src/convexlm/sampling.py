"""The order of the training data: one of seed and epoch alone, so that a run that is resumed has it again."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

if TYPE_CHECKING:
    from collections.abc import Iterator


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """transformers' sampler for `group_by_length`, with an order that depends on seed and epoch.

    Without a generator of its own it takes the global random numbers, which after a resume are others.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which pass over the data, counted from 0, the next iteration is."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """The indices of one pass."""
        self.generator = torch.Generator()
        # torch's generator on the CPU takes the low 32 bits alone.
        digest = hashlib.sha256(f"{self.seed} {self.epoch}".encode()).digest()
        self.generator.manual_seed(int.from_bytes(digest[:4], "little"))
        return iter(super().__iter__())


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the sampler at the bottom of a data loader the epoch, through whatever skips and deals out its batches.

    accelerate's own `set_epoch` does not reach it where batches are both skipped and dealt out to processes.
    """
    layer = getattr(loader, "batch_sampler", None)
    while layer is not None:
        sampler: Any = getattr(layer, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        layer = getattr(layer, "batch_sampler", None)


class SamplingOrder:
    """Mixed into a Trainer before its class."""

    def _get_train_sampler(self: Any, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        if type(sampler) is LengthGroupedSampler:
            seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
            # Of the global batch, for the order of a batch that is split otherwise would be another.
            return EpochLengthGroupedSampler(sampler.batch_size * self.args.world_size, sampler.lengths, seed)
        return sampler

    def _run_epoch(self: Any, *, epoch: int, train_dataloader: Any, **kwargs: Any) -> Any:
        set_epoch(train_dataloader, epoch)
        return super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)  # type: ignore[misc]
