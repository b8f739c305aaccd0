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
        for sampler in (getattr(layer, "sampler", None), layer):  # that of `batch_rebalance` is a layer itself
            if sampler is not None and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        layer = getattr(layer, "batch_sampler", None)


def note_fillers(sampler: Any) -> None:
    """Have transformers' sampler of `batch_rebalance` note with which records it fills up an epoch's last step.

    Where fewer are left than processes times accumulated micro-batches, it repeats some of the epoch's first ones, so
    that no micro-batch is empty. Its `fillers` are then, for each micro-batch of this process's last step, True where
    a record is one of these.

    Args:
        sampler: a `BatchRebalanceSampler`.

    Raises:
        RuntimeError: it is made otherwise than that of transformers 5.23, which is known.
    """
    if not all(hasattr(sampler, name) for name in ("_yield_global_batch", "_assign", "has_tail", "remainder")):
        raise RuntimeError(
            "the sampler of `batch_rebalance` in this release of transformers is not one that convexlm knows, so "
            "records that it repeats would count twice: use another train_sampling_strategy"
        )
    whole = sampler._yield_global_batch
    sampler.fillers = []

    def deal(indices: list[int]) -> Iterator[list[int]]:
        real = sampler.remainder
        if not (sampler.has_tail and real < len(indices) == sampler.dp_size * sampler.grad_accum):
            yield from whole(indices)
            return
        places = sampler._assign(range(len(indices)), [sampler.lengths[index] for index in indices])[sampler.rank]
        sampler.fillers = [[place >= real for place in batch] for batch in places]
        yield from ([indices[place] for place in batch] for batch in places)

    sampler._yield_global_batch = deal


class SamplingOrder:
    """Mixed into a Trainer before its class."""

    def _get_train_sampler(self: Any, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        if type(sampler) is LengthGroupedSampler:
            seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
            # Of the global batch, for the order of a batch that is split otherwise would be another.
            return EpochLengthGroupedSampler(sampler.batch_size * self.args.world_size, sampler.lengths, seed)
        if self.args.train_sampling_strategy == "batch_rebalance" and sampler is not None:
            note_fillers(sampler)
            self._dealer = sampler
        return sampler

    def _run_epoch(self: Any, *, epoch: int, train_dataloader: Any, **kwargs: Any) -> Any:
        set_epoch(train_dataloader, epoch)
        return super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)  # type: ignore[misc]
