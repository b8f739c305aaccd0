"""How the fused head walks a batch: whole sequences to a chunk, and how many tokens fit one. No tensor mathematics."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_MEBI = 2**20
_LARGEST_BYTES = {"cpu": 256 * _MEBI, "other": 1024 * _MEBI}
_SHARE_OF_MEMORY = 64
_FEWEST_TOKENS = 64


@dataclass(frozen=True)
class Group:
    """Tokens whose gradient coefficients are formed together: whole sequences, in one piece or in several.

    Attributes:
        pieces: (start, stop) token ranges, one after the other. With a single piece its logits are still at hand when
            the coefficients are known; with several they are computed a second time.
    """

    pieces: tuple[tuple[int, int], ...]

    @property
    def start(self) -> int:
        """The first token."""
        return self.pieces[0][0]

    @property
    def stop(self) -> int:
        """One after the last token."""
        return self.pieces[-1][1]


@lru_cache(maxsize=64)
def default_chunk_tokens(vocabulary: int, element_size: int, device: torch.device) -> int:
    """Tokens whose logits (`element_size` bytes each) fill 1/64 of the device's memory, or 256 MB (1 GB on a GPU).

    Total memory and not what happens to be free, so that the same run on the same machine gives the same bits.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 8 * 2**30
    budget = min(total // _SHARE_OF_MEMORY, _LARGEST_BYTES["cpu" if device.type == "cpu" else "other"])
    tokens = int(budget // max(1, vocabulary * element_size))
    return max(_FEWEST_TOKENS, tokens - tokens % _FEWEST_TOKENS)


def chunk_limit(tokens: int, vocabulary: int, element_size: int, device: torch.device, sum_bytes: int) -> int:
    """The default chunk for a batch of so many target tokens: `default_chunk_tokens`, or on a GPU all of them.

    Where the weight's gradient is narrower than float32, several chunks need a float32 sum beside it, and every one
    reads and writes that sum once more. So the batch is one chunk if its logits take no more than the sum would.

    Args:
        tokens: targets of the batch.
        vocabulary: logits a target.
        element_size: bytes a logit.
        device: where.
        sum_bytes: of the float32 sum that several chunks would need and one would not.
    """
    limit = default_chunk_tokens(vocabulary, element_size, device)
    return limit if device.type == "cpu" else widened(limit, tokens, vocabulary * element_size, sum_bytes)


def widened(limit: int, tokens: int, token_bytes: int, sum_bytes: int) -> int:
    """All tokens where their logits, `token_bytes` each, exceed a chunk's by no more than the sum; else the limit."""
    return tokens if limit < tokens and (tokens - limit) * token_bytes <= sum_bytes else limit


def pieces_of(start: int, stop: int, chunk_tokens: int) -> tuple[tuple[int, int], ...]:
    """The range cut into as few pieces of at most `chunk_tokens` as possible, of nearly equal size."""
    count = max(1, -(-(stop - start) // chunk_tokens))
    bounds = [start + (stop - start) * i // count for i in range(count + 1)]
    return tuple(zip(bounds, bounds[1:], strict=False))


def plan_groups(lengths: list[int], chunk_tokens: int) -> list[Group]:
    """Whole sequences of these lengths, in order, filled into chunks; a longer one is a group of several pieces."""
    groups: list[Group] = []
    start = stop = 0
    for length in lengths:
        if stop > start and stop + length - start > chunk_tokens:
            groups.append(Group(pieces_of(start, stop, chunk_tokens)))
            start = stop
        stop += length
    if stop > start:
        groups.append(Group(pieces_of(start, stop, chunk_tokens)))
    return groups


def run_lengths(sequence_ids: Tensor) -> tuple[list[int], bool]:
    """Lengths of the runs of equal ids, and whether every sequence is one run (its tokens side by side)."""
    if not len(sequence_ids):
        return [], True
    ids, counts = sequence_ids.cpu().unique_consecutive(return_counts=True)
    return counts.tolist(), len(ids.unique()) == len(ids)


def number_runs(sequence_ids: Tensor) -> Tensor:
    """The number of every token's run of equal ids, from 0: (N,) int64, without looking at the device's numbers."""
    numbers = torch.zeros(len(sequence_ids), dtype=torch.long, device=sequence_ids.device)
    if len(sequence_ids) > 1:
        torch.cumsum(sequence_ids[1:] != sequence_ids[:-1], 0, out=numbers[1:])
    return numbers
