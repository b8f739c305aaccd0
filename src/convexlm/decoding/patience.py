"""When a batch stops waiting for its last sentences."""

from __future__ import annotations

FEW = 8
"""Sentences are few when they are at most one in so many of a batch (and one of any batch)."""


LEAST_STEPS = 16
"""Nothing is put off before so many tokens: filling prompts in again would cost more than it saves."""


class Patience:
    """Tells a search loop when to put off the sentences that are still open.

    A step costs about as much for a few sentences as for a whole batch, so a batch does not wait for one that runs to
    `max_new_tokens`: once only a few are open it waits for as long again as it has taken so far, and then they are
    put off, to be decoded from the start together with those of other batches. Waiting costs at most what the batch
    itself took; starting again costs no more than was waited, shared among as many sentences as fill a batch.

    Args:
        rows: sentences of the batch.
        max_new_tokens: the longest answer. Nothing is put off when less than what was done so far can be left to do.
    """

    def __init__(self, rows: int, max_new_tokens: int) -> None:
        self._few = max(1, rows // FEW) if rows > 1 else 0
        self._most = max_new_tokens
        self._since = 0

    def over(self, still: int, steps: int) -> bool:
        """Whether the `still` open sentences are put off after `steps` tokens; to be asked at each step."""
        if still > self._few:
            return False
        self._since = self._since or steps
        return steps >= max(LEAST_STEPS, 2 * self._since) and self._most - steps >= steps
