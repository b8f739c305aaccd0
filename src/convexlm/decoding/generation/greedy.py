"""One token after the other, the most probable one or a drawn one; a finished row leaves the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from convexlm.decoding.backends.base import Hypothesis
from convexlm.decoding.generation.rows import Prefix, Rows
from convexlm.decoding.generation.rules import Rules
from convexlm.decoding.generation.sampling import Sampler, stream_key

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
    found = _grow(model, prompts, search, eos_ids, pad_id, prefix, patience)
    return [None if answers is None else answers[0] for answers in found]


def sample(
    model: Any,
    prompts: Sequence[list[int]],
    search: Search,
    eos_ids: Sequence[int],
    pad_id: int,
    prefix: Prefix,
    patience: Patience | None = None,
) -> list[list[Hypothesis] | None]:
    """`num_return_sequences` drawn answers of each prompt, in the order of their numbers.

    Log-probabilities are the model's own, before rules and temperature. None for prompts that `patience` put off.
    """
    return _grow(model, prompts, search, eos_ids, pad_id, prefix, patience)


def _grow(
    model: Any,
    prompts: Sequence[list[int]],
    search: Search,
    eos_ids: Sequence[int],
    pad_id: int,
    prefix: Prefix,
    patience: Patience | None,
) -> list[list[Hypothesis] | None]:
    rows = Rows(model, prompts, pad_id, prefix)
    device = rows.logits.device
    count = search.rows
    answers = [(prompt, number) for prompt in range(len(prompts)) for number in range(count)]
    if count > 1:  # a prompt is computed once, then there is a row for each of its answers
        rows.spread(count)
    rules = Rules(search, [prompts[prompt] for prompt, _ in answers], eos_ids, device)
    sampler = None
    if search.do_sample:
        sampler = Sampler(search, [stream_key(search, prompts[prompt], number) for prompt, number in answers], device)
    eos = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
    tokens: list[list[int]] = [[] for _ in answers]
    sums = [0.0] * len(answers)
    owners = list(range(len(answers)))  # the answer of each row
    open_ = [True] * len(answers)  # by answer
    put_off: set[int] = set()  # prompts
    for number in range(search.max_new_tokens):
        scores = rules.apply(rows.logits)
        chosen = sampler.choose(scores, number) if sampler else scores.argmax(dim=1)
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
            put_off = {answers[owners[row]][0] for row in left}
            break
        rules.append(chosen)
        if (len(owners) - len(left)) * DROPPED_AT_ONCE >= len(owners):
            index = torch.tensor(left, device=device)
            rows.take(index)
            rules.take(index)
            if sampler:
                sampler.take(index)
            chosen = chosen[index]
            owners = [owners[row] for row in left]
        rows.step(chosen[:, None])
    return [
        None
        if prompt in put_off
        else [
            Hypothesis(tokens[answer], sums[answer], not open_[answer])
            for answer in range(prompt * count, (prompt + 1) * count)
        ]
        for prompt in range(len(prompts))
    ]
