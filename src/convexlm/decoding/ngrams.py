"""The rule that no n-gram occurs twice, blind to padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import LogitsProcessor

if TYPE_CHECKING:
    import torch


class NoRepeatNgrams(LogitsProcessor):
    """Forbid every token that would complete an n-gram for the second time, in prompt and answer together.

    The same rule as transformers' `no_repeat_ngram_size` has for a single prompt. In a padded batch that one takes
    padding for text: with n = 1 and EOS as padding, no shorter prompt of a batch could ever end.

    Args:
        size: n.
        mask: (batch, width) int, 0 where the left-padded prompts have padding.
        num_beams: rows a prompt takes in the search, one after the other.
    """

    def __init__(self, size: int, mask: torch.Tensor, num_beams: int) -> None:
        self.size = size
        self.padding = (mask.shape[1] - mask.sum(1)).repeat_interleave(num_beams)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Set the scores (rows, V) of forbidden tokens, given the rows so far (rows, length), to minus infinity."""
        import torch

        if input_ids.shape[1] < self.size:
            return scores
        windows = input_ids.unfold(1, self.size, 1)
        ending = input_ids[:, input_ids.shape[1] - self.size + 1 :]
        repeats = (windows[..., :-1] == ending[:, None]).all(-1)
        self.padding = self.padding.to(input_ids.device)
        repeats &= torch.arange(windows.shape[1], device=input_ids.device) >= self.padding[:, None]
        row, window = repeats.nonzero(as_tuple=True)
        scores = scores.clone()
        scores[row, windows[row, window, -1]] = float("-inf")
        return scores
