"""Sampling whose every draw follows from the seed, the prompt, the sample's number, the position and the token alone.

A generator that the rows of a batch took turns with would make a sentence's sample depend on its neighbours, and on
what an earlier run had done. Here the noise is counted, not drawn: SplitMix64 (Steele, Lea and Flood, 2014,
doi:10.1145/2660193.2660195) of a row's key, the position and the token id, the same on every device. It decides by the
Gumbel-max rule, so that two batches whose logits differ in the last bits nearly always give the same token.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import LogitsProcessor

    from convexlm.decoding.search import Search

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))

AT_ONCE = 1 << 17
"""Scores that are drawn from at a time on a CPU, so that what is made of them stays in its cache."""


def stream_key(search: Search, prompt: Sequence[int], sample: int = 0) -> int:
    """64 bits, as a signed number, that stand for seed, prompt (token ids) and number of the sample."""
    assert search.seed is not None
    words = " ".join(map(str, (search.seed, sample, *prompt)))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little", signed=True)


def uniforms(keys: torch.Tensor, position: int, count: int) -> torch.Tensor:
    """Numbers (rows, count) float64 strictly between 0 and 1, for the tokens 0 to `count - 1` at a position.

    Args:
        keys: (rows,) int64, a `stream_key` each.
        position: of the token to be drawn, from 0.
        count: tokens of the vocabulary.
    """
    starts = _mix(keys + torch.full_like(keys, position + 1) * _GOLDEN)
    bits = _mix(starts[:, None] + torch.arange(1, count + 1, device=keys.device) * _GOLDEN)
    bits.bitwise_right_shift_(12).bitwise_and_((1 << 52) - 1)
    return bits.double().add_(0.5).mul_(2.0**-52)


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer, in place: int64 wraps, and what a shift draws in of the sign is masked away."""
    for shift, factor in zip((30, 27, 31), (*_FACTORS, 1), strict=True):
        bits ^= (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        bits *= factor
    return bits


class Sampler:
    """Draws the next token of every row of a batch.

    Args:
        search: with `do_sample`.
        keys: a `stream_key` for each row.
        device: where the scores are.
    """

    def __init__(self, search: Search, keys: Sequence[int], device: torch.device) -> None:
        self._keys = torch.tensor(list(keys), dtype=torch.long, device=device)
        self._warpers = _warpers(search)

    def choose(self, scores: torch.Tensor, position: int) -> torch.Tensor:
        """Tokens (rows,) int64, drawn from the softmax of the scores (rows, V) after temperature, top-k and top-p."""
        count = scores.shape[1]
        rows = max(1, AT_ONCE // count) if scores.device.type == "cpu" else len(scores)
        chosen = []
        for some, keys in zip(scores.split(rows), self._keys.split(rows), strict=True):
            noise = uniforms(keys, position, count).log_().neg_().log_()
            chosen.append((self.warp(some) - noise).argmax(dim=1))
        return torch.cat(chosen)

    def warp(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores as float64, with temperature, top-k and top-p done to them, as transformers does."""
        scores = scores.double()
        scores = scores - scores.amax(dim=1, keepdim=True)  # so that no temperature takes the best one out of range
        for warper in self._warpers:
            scores = warper(None, scores)
        return scores

    def take(self, rows: torch.Tensor) -> None:
        """Make row i what was `rows[i]`."""
        self._keys = self._keys[rows]


def _warpers(search: Search) -> list[LogitsProcessor]:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    assert search.temperature is not None and search.top_k is not None and search.top_p is not None
    warpers: list[LogitsProcessor] = []
    if search.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(search.temperature))
    if search.top_k:
        warpers.append(TopKLogitsWarper(search.top_k))
    if search.top_p < 1.0:
        warpers.append(TopPLogitsWarper(search.top_p))
    return warpers
