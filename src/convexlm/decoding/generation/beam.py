"""Beam search as transformers does it for one prompt alone, over a batch from which finished prompts leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from convexlm.decoding.backends.base import Hypothesis
from convexlm.decoding.generation.greedy import DROPPED_AT_ONCE
from convexlm.decoding.generation.rows import Prefix, Rows
from convexlm.decoding.generation.rules import Rules
from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convexlm.decoding.patience import Patience
    from convexlm.decoding.search import Search

FAR = -1.0e9
"""A score below all others, with which transformers marks what cannot win; its size matters where scores meet it."""


class _Finished:
    """The best finished hypotheses of one prompt, at most `num_beams`, best first."""

    def __init__(self, num_beams: int) -> None:
        self.num_beams = num_beams
        self.entries: list[tuple[float, list[int], float]] = []

    def add(self, score: float, tokens: list[int], log_prob: float) -> None:
        self.entries.append((score, tokens, log_prob))
        self.entries.sort(key=lambda entry: -entry[0])  # stable: of equals the earlier stays first
        del self.entries[self.num_beams :]

    @property
    def full(self) -> bool:
        return len(self.entries) == self.num_beams

    @property
    def worst(self) -> float:
        """The score to beat: none while there is room."""
        return self.entries[-1][0] if self.full else FAR


def beam_search(
    model: Any,
    prompts: Sequence[list[int]],
    search: Search,
    eos_ids: Sequence[int],
    pad_id: int,
    prefix: Prefix,
    patience: Patience | None = None,
) -> list[list[Hypothesis] | None]:
    """The `num_beams` best hypotheses of each prompt, best first; None for prompts that `patience` put off.

    Candidates, scores in float32, length penalty, `early_stopping` and the order of ties of the best are those of
    transformers' beam search. Log-probabilities are the model's own: the rules only take tokens out.

    Raises:
        UserError: a search ends before anything has finished, where transformers returns what no search found.
    """
    beams = search.num_beams
    rows = Rows(model, prompts, pad_id, prefix, beams)
    device = rows.logits.device
    rules = Rules(search, [prompt for prompt in prompts for _ in range(beams)], eos_ids, device)
    eos = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
    width = max(2, 1 + len(eos_ids)) * beams  # so many candidates that `beams` of them do not end
    finished = [_Finished(beams) for _ in prompts]
    owners = list(range(len(prompts)))
    done = [False] * len(prompts)  # by prompt
    put_off: set[int] = set()
    # Before the first token the beams of a prompt are one; the others are put out of reach.
    scores = torch.full((len(prompts), beams), FAR, device=device)
    scores[:, 0] = 0.0
    sums = torch.zeros((len(prompts), beams), dtype=torch.float64, device=device)
    answers = torch.empty((len(prompts), beams, 0), dtype=torch.long, device=device)
    for length in range(1, search.max_new_tokens + 1):
        log_probs = rules.apply(rows.logits.log_softmax(dim=1)).view(len(owners), beams, -1)
        vocabulary = log_probs.shape[2]
        best, places = (log_probs + scores[:, :, None]).flatten(1).topk(width)
        parents, tokens = places // vocabulary, places % vocabulary
        steps = log_probs.flatten(1).gather(1, places).double()
        candidate_sums = sums.gather(1, parents) + steps
        ends = torch.isin(tokens, eos) if length < search.max_new_tokens else torch.ones_like(tokens, dtype=torch.bool)

        if bool(ends[:, :beams].any()):
            where = ends[:, :beams].nonzero()
            row_of, column = where.unbind(1)
            divided = (best / length**search.length_penalty)[row_of, column].tolist()
            stems = answers[row_of, parents[row_of, column]].tolist()
            lasts, totals = tokens[row_of, column].tolist(), candidate_sums[row_of, column].tolist()
            for row, score, stem, last, total in zip(row_of.tolist(), divided, stems, lasts, totals, strict=True):
                if not done[owners[row]]:
                    finished[owners[row]].add(score, [*stem, last], total)
        if length == search.max_new_tokens:
            break

        scores, kept = (best + ends * FAR).topk(beams)
        parents, tokens = parents.gather(1, kept), tokens.gather(1, kept)
        sums = candidate_sums.gather(1, kept)
        answers = torch.cat((answers.gather(1, parents[:, :, None].expand(-1, -1, length - 1)), tokens[:, :, None]), 2)

        for row, over in enumerate(_over(scores, [finished[owner] for owner in owners], search, length)):
            done[owners[row]] = done[owners[row]] or over
        left = [row for row, owner in enumerate(owners) if not done[owner]]
        if not left:
            break
        if patience is not None and patience.over(len(left), length):
            put_off = {owners[row] for row in left}
            break
        source = parents + torch.arange(len(owners), device=device)[:, None] * beams
        if (len(owners) - len(left)) * DROPPED_AT_ONCE >= len(owners):
            index = torch.tensor(left, device=device)
            scores, sums, answers, tokens = scores[index], sums[index], answers[index], tokens[index]
            parents, source = parents[index], source[index]
            owners = [owners[row] for row in left]
            rows.take(index)
        rules.take(source.flatten())
        rules.append(tokens.flatten())
        rows.step(tokens, parents)
    if any(not own.entries and owner not in put_off for owner, own in enumerate(finished)):
        raise UserError(
            f"a beam search ended with nothing finished: its rules leave no token, or length_penalty "
            f"{search.length_penalty} takes the scores out of range"
        )
    ending = set(eos_ids)
    return [
        None
        if owner in put_off
        else [Hypothesis(tokens, log_prob, tokens[-1] in ending) for _, tokens, log_prob in own.entries]
        for owner, own in enumerate(finished)
    ]


def _over(scores: torch.Tensor, finished: list[_Finished], search: Search, length: int) -> list[bool]:
    """Which prompts are done, given the running scores (prompts, beams) after `length` tokens."""
    if search.early_stopping is True:
        over = torch.tensor([own.full for own in finished], device=scores.device)
    else:
        over = torch.zeros(len(finished), dtype=torch.bool, device=scores.device)
    if search.early_stopping == "never" and search.length_penalty > 0:
        length = search.max_new_tokens
    best = scores[:, 0] / length**search.length_penalty
    worst = torch.tensor([own.worst for own in finished], dtype=scores.dtype, device=scores.device)
    return (over | ~(best > worst)).tolist()
