"""Greedy search in which a finished row leaves the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from convexlm.decoding.backends.base import Hypothesis
from convexlm.decoding.generation.rows import Prefix, Rows
from convexlm.decoding.generation.rules import Rules

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convexlm.decoding.patience import Patience
    from convexlm.decoding.search import Search

DROPPED_AT_ONCE = 8
"""Finished sentences are taken out as soon as they are one in so many: each time the cache of the others is copied."""


def greedy_search(
    model: Any,
    prompts: Sequence[list[int]],
    search: Search,
    eos_ids: Sequence[int],
    pad_id: int,
    prefix: Prefix,
    patience: Patience | None = None,
) -> list[Hypothesis | None]:
    """The most probable token at each step, until EOS.

    The same tokens as transformers' `generate` finds for each prompt alone; log-probabilities are the model's own,
    before the rules, taken from the very logits that the tokens were chosen by. None for prompts that `patience`
    put off.
    """
    rows = Rows(model, prompts, pad_id, prefix)
    device = rows.logits.device
    rules = Rules(search, prompts, eos_ids, device)
    eos = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
    tokens: list[list[int]] = [[] for _ in prompts]
    sums = [0.0] * len(prompts)
    owners = list(range(len(prompts)))  # the prompt of each row
    open_ = [True] * len(prompts)  # by prompt
    put_off: set[int] = set()
    for number in range(search.max_new_tokens):
        chosen = rules.apply(rows.logits).argmax(dim=1)
        log_probs = rows.logits.gather(1, chosen[:, None])[:, 0] - rows.logits.logsumexp(dim=1)
        ends = torch.isin(chosen, eos).tolist()
        for owner, token, log_prob, end in zip(owners, chosen.tolist(), log_probs.tolist(), ends, strict=True):
            if open_[owner]:
                tokens[owner].append(token)
                sums[owner] += log_prob
                open_[owner] = not end
        left = [row for row, owner in enumerate(owners) if open_[owner]]
        if not left or number + 1 == search.max_new_tokens:
            break
        if patience is not None and patience.over(len(left), number + 1):
            put_off = {owners[row] for row in left}
            break
        rules.append(chosen)
        if (len(owners) - len(left)) * DROPPED_AT_ONCE >= len(owners):
            index = torch.tensor(left, device=device)
            rows.take(index)
            rules.take(index)
            chosen = chosen[index]
            owners = [owners[row] for row in left]
        rows.step(chosen[:, None])
    return [
        None if owner in put_off else Hypothesis(tokens[owner], sums[owner], not open_[owner])
        for owner in range(len(prompts))
    ]
