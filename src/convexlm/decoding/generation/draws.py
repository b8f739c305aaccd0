"""Our draws inside transformers' `generate`, for the models that our loops cannot run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import LogitsProcessor

from convexlm.decoding.generation.sampling import Sampler, stream_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from convexlm.decoding.search import Search


class Draws(LogitsProcessor):
    """Leaves greedy search nothing but the token that was drawn; the last of the processors.

    Args:
        search: with `do_sample`.
        prompts: token ids of each row; the samples of a prompt stand one after the other.
        width: positions of the padded prompts.
    """

    def __init__(self, search: Search, prompts: Sequence[list[int]], width: int) -> None:
        count = search.num_return_sequences
        self._keys = [stream_key(search, prompt, row % count) for row, prompt in enumerate(prompts)]
        self._search = search
        self._width = width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Set all scores (rows, V) but the drawn tokens' to minus infinity, given the rows so far (rows, length)."""
        drawn = Sampler(self._search, self._keys, scores.device).choose(scores, input_ids.shape[1] - self._width)
        return scores.new_full(scores.shape, float("-inf")).scatter_(1, drawn[:, None], 0.0)
