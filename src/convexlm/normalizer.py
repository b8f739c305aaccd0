"""What a batch counts in the objective's normaliser."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from convexlm.collator import WEIGHT, sequences_of
from convexlm.objectives import IGNORE_INDEX

if TYPE_CHECKING:
    from torch import Tensor


def count_targets(batch: dict[str, Tensor], by_length: bool) -> Tensor:
    """Target tokens, or sequences with a target token, of a batch, each counted with its weight: 0-d."""
    mask = batch["labels"][:, 1:] != IGNORE_INDEX
    weights = batch.get(WEIGHT)
    # float32 would lose count at 2^24 tokens.
    dtype = torch.float32 if mask.device.type == "mps" else torch.float64
    per_token = mask.to(dtype) if weights is None else weights[:, 1:].to(mask.device, dtype) * mask
    if by_length:
        return per_token.sum()
    ids = sequences_of(batch)
    if ids is None:
        return per_token.amax(dim=1).sum() if per_token.shape[1] else per_token.sum()
    ids = ids[:, 1:].to(mask.device).long()
    per_sequence = per_token.new_zeros(mask.shape[0], mask.shape[1] + 1)  # a row of n tokens has no more sequences
    return per_sequence.scatter_reduce(1, ids, per_token, "amax").sum()
