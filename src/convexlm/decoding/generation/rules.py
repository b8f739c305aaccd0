"""What a search forbids: repeated n-grams and an early EOS."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convexlm.decoding.search import Search


class Rules:
    """A search's rules over a batch of rows, kept up to date token by token.

    For n-grams each place of a row has the length of the match that ends there with the row's own end; a new token
    lengthens the matches it goes on with and ends all others, so a step costs one comparison a place, whatever n is.

    Args:
        search: its `no_repeat_ngram_size` (over prompt and answer) and `min_new_tokens`.
        prompts: token ids of each row.
        eos_ids: the tokens that end an answer.
        device: where the scores are.
    """

    def __init__(
        self, search: Search, prompts: Sequence[list[int]], eos_ids: Sequence[int], device: torch.device
    ) -> None:
        self._size = search.no_repeat_ngram_size
        self._wait = search.min_new_tokens
        self._eos = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
        if self._size:
            most = max(map(len, prompts))
            # -1 is no token: padding matches nothing.
            rows = [[-1] * (most - len(prompt)) + prompt for prompt in prompts]
            self._tokens = torch.tensor(rows, device=device)
            self._matches = self._match_ends()

    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores (rows, V), in a copy, with those of forbidden tokens at minus infinity."""
        infinity = float("inf")
        if self._wait and len(self._eos):
            scores = scores.index_fill(1, self._eos, -infinity)
        if self._size:
            # A token is forbidden if it follows a place where the last n - 1 tokens stand already.
            following = self._tokens[:, 1:] if self._size > 1 else self._tokens
            ends = self._matches[:, :-1] >= self._size - 1 if self._size > 1 else following >= 0
            bound = torch.where(ends, -infinity, infinity).to(scores.dtype)
            scores = scores.scatter_reduce(1, following.clamp(min=0), bound, "amin")
        return scores

    def append(self, tokens: torch.Tensor) -> None:
        """Tell of the tokens (rows,) that were chosen."""
        self._wait = max(0, self._wait - 1)
        if self._size:
            longer = torch.nn.functional.pad(self._matches[:, :-1], (1, 0)) + 1
            longer.masked_fill_(self._tokens != tokens[:, None], 0)
            self._matches = torch.nn.functional.pad(longer, (0, 1))
            self._tokens = torch.cat((self._tokens, tokens[:, None]), dim=1)

    def take(self, rows: torch.Tensor) -> None:
        """Make row i what was `rows[i]`."""
        if self._size:
            self._tokens, self._matches = self._tokens[rows], self._matches[rows]

    def _match_ends(self) -> torch.Tensor:
        """Lengths (rows, places) of the matches with each row's end, up to n - 1; 0 at the end itself."""
        tokens, places = self._tokens, self._tokens.shape[1]
        lengths = torch.zeros_like(tokens)
        going_on = tokens >= 0
        for back in range(min(self._size - 1, places)):
            shifted = torch.full_like(tokens, -2)
            shifted[:, back:] = tokens[:, : places - back]
            going_on = going_on & (shifted == tokens[:, places - 1 - back, None]) & (shifted >= 0)
            lengths += going_on
        lengths[:, -1] = 0
        return lengths
