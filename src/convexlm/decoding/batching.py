"""Which sentences are decoded together, and what happens when memory runs out."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

TOKEN_BUDGET = 32768
"""Tokens of a batch whose keys and values are held, where nothing says better. The longest answers count."""

MAX_SENTENCES, MAX_SENTENCES_ON_GPU = 128, 512
"""A batch's results are written when all of it is done, so a batch is also what a crash can lose."""

_SHARE_FOR_CACHE = 0.4
"""Of a GPU's memory beside the weights; the rest is for the step itself, and for caches that are copied to grow."""

Item = TypeVar("Item")


def plan_batches(
    positions: Iterable[int],
    lengths: Sequence[int],
    held: Sequence[int],
    batch_size: int | None = None,
    token_budget: int = TOKEN_BUDGET,
    most: int = MAX_SENTENCES,
) -> list[tuple[int, ...]]:
    """Positions of sentences in batches, those with the longest prompts first.

    The plan depends on the whole job alone and not on what is done of it, so a run that was stopped decodes the rest
    in the very batches an uninterrupted run would have: equal to the last bit of the log-probabilities.

    Args:
        positions: which sentences of the job.
        lengths: the prompts' lengths in tokens, of all sentences of the job.
        held: the tokens that each sentence takes of the budget, likewise.
        batch_size: sentences a batch; None: as many as the token budget allows.
        token_budget: most tokens a batch.
        most: most sentences a batch that the token budget makes.
    """
    order = sorted(positions, key=lambda position: (-lengths[position], position))
    batches: list[tuple[int, ...]] = []
    while order:
        size = batch_size
        if size is None:  # the first has the longest prompt, and so takes most
            size = max(1, min(most, token_budget // held[order[0]]))
        batches.append(tuple(order[:size]))
        order = order[size:]
    return batches


def tokens_that_fit(memory: int, weights: int, a_token: int) -> int:
    """The token budget of a GPU: as many tokens as keys and values fit beside the weights, with room to spare.

    All of its memory and not what happens to be free, so that the same job on the same kind of GPU has the same
    batches; where that is too much, because others use the GPU too, batches are halved.

    Args:
        memory: bytes that the GPU has.
        weights: bytes of the model.
        a_token: bytes of the keys and values of one token in all layers.
    """
    return max(1024, int(_SHARE_FOR_CACHE * max(0, memory - weights)) // max(1, a_token))


def common_head(prompts: Sequence[list[int]]) -> list[int]:
    """The tokens that all prompts begin with; at least the last token of each is left out."""
    first, last = min(prompts), max(prompts)  # all share what the first and the last in order share
    most = min(map(len, prompts)) - 1
    length = 0
    while length < most and first[length] == last[length]:
        length += 1
    return first[:length]


class Splitter:
    """Runs batches, in halves from the moment memory runs out, and remembers the size that fitted.

    Attributes:
        largest: sentences a batch at most; None until memory has run out.
    """

    def __init__(self) -> None:
        self.largest: int | None = None

    def run(
        self, batch: Sequence[int], generate: Callable[[Sequence[int]], Sequence[Item]]
    ) -> Iterator[tuple[Sequence[int], Sequence[Item]]]:
        """Yield (part of the batch, its results) until all of it is done.

        Raises:
            UserError: memory does not suffice for a single sentence.
        """
        rest = list(batch)
        while rest:
            part = rest[: self.largest or len(rest)]
            results = _unless_out_of_memory(part, generate)
            if results is None:
                if len(part) == 1:
                    raise UserError(
                        "out of memory with one sentence at a time; use fewer beams, fewer max_new_tokens or a "
                        "smaller dtype"
                    )
                self.largest = len(part) // 2
                continue
            yield part, results
            rest = rest[len(part) :]


def _unless_out_of_memory(
    part: Sequence[int], generate: Callable[[Sequence[int]], Sequence[Item]]
) -> Sequence[Item] | None:
    try:
        return generate(part)
    except (RuntimeError, MemoryError) as error:
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
    # Out of the except block, where the error no longer holds the failed batch's tensors.
    clear_device_cache(garbage_collection=True)
    return None
