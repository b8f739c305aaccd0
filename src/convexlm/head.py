"""The fused head: hidden states, LM head and labels to loss and gradients, without the logits of the batch.

The loss is separable over sequences. So the target tokens are walked in chunks of whole sequences; once a chunk's
logits are there, so are its log-probabilities, its sequences' means and every token's coefficient dL/d log p, and the
exact gradient is formed while the logits are at hand: three matrix products (logits, hidden gradient, weight gradient;
two if the head is frozen), where a head that recomputes the logits in the backward pass needs four. The backward pass
only hands out what the forward pass has formed.

The coefficients are the gradient of the objective's own `__call__`, so any registered objective works and no formula
is repeated here. A sequence longer than a chunk has its logits computed twice (four products), with the same result.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from convexlm.head_checks import check_batch, check_transform
from convexlm.head_chunks import Group, chunk_limit, number_runs, pieces_of, plan_groups, run_lengths
from convexlm.head_products import (
    WeightGradient,
    add_bias_gradient,
    bytes_of_sum,
    hidden_gradient,
    kept_dtype,
    products_dtype,
    project,
)
from convexlm.head_scaling import scaled
from convexlm.head_tiles import TokenNumbers, Transform, score_rows, workspace
from convexlm.objectives import IGNORE_INDEX, Mle, Objective, ObjectiveOutput

__all__ = ["FusedOutput", "fused_objective", "workspace"]

logger = logging.getLogger(__name__)
_said: set[str] = set()


@dataclass(frozen=True, eq=False)
class FusedOutput(ObjectiveOutput):
    """An `ObjectiveOutput`, whose statistics have three more sums, and how it was computed.

    `statistics()` also holds `correct` (targets that are the most probable token; the first of equals) and
    `entropy_sum` (of the next-token distributions, nats), both sample-weighted as `tokens` is, by which they divide to
    means; without `need_accuracy`, or `need_entropy`, that sum is absent. Token-level `weights` are one a label.

    Attributes:
        log_probs: (N,) float32 (float64 for float64 input), detached; 0 where the label is -100.
        path: "one-pass", or "recompute" if the logits of any sequence were computed twice.
        reason: why that path.
        recomputed_tokens: targets whose logits were computed twice.
        chunk_tokens: most targets whose logits existed at a time.
    """

    log_probs: Tensor
    path: str
    reason: str
    recomputed_tokens: int
    chunk_tokens: int


@torch.compiler.disable
def fused_objective(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    sequence_ids: Tensor,
    objective: Objective,
    normalizer: float | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    sample_weights: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_tokens: int | None = None,
    vocab_chunk: int | None = None,
    need_entropy: bool = False,
    need_accuracy: bool = True,
    recompute: bool = False,
) -> FusedOutput:
    """Loss and statistics of target tokens under `objective`, with gradients to `hidden`, the weight and the bias.

    Logits are `softcap * tanh(logit_scale * (hidden @ weight^T + bias) / softcap)`. Matrix products run in the dtype
    of `hidden` (autocast's inside autocast; float32 on a CPU whose half precision is slow), all else in float32 or
    better. Under `torch.no_grad()`, or if nothing needs a gradient, none is formed.

    Args:
        hidden: (N, H) floating, the states that predict the labels: target positions only, sequence by sequence.
        lm_head_weight: (V, H) floating.
        labels: (N,) integers in [0, V); positions with -100 take no part.
        sequence_ids: (N,) integers: which sequence a token belongs to.
        objective: from `get_objective`.
        normalizer: the denominator of the global batch, as `Objective.__call__` takes it; this batch's own if None.
        bias: (V,) floating.
        sample_weights: (N,) as `Objective.__call__` takes them: constant within a sequence.
        logit_scale: factor on the projection.
        logit_softcap: cap on the logits' magnitude.
        chunk_tokens: targets whose logits may exist at a time; by default from the vocabulary and the memory.
        vocab_chunk: rows of the weight gradient formed at a time.
        need_entropy: also sum the entropies of the predictions.
        need_accuracy: also count the predictions that are right.
        recompute: take the recomputing path throughout.

    Raises:
        ValueError: shapes, dtypes, devices or numbers do not fit together.
    """
    check_batch(hidden, lm_head_weight, labels, sequence_ids, bias, sample_weights, chunk_tokens, vocab_chunk)
    check_transform(logit_scale, logit_softcap)
    # One look at the device's numbers for all that is asked of them: every other one would stall it.
    here = torch.stack((labels.long(), sequence_ids.long())).cpu() if labels.device.type != "cpu" else None
    labels_here, ids_here = (labels, sequence_ids) if here is None else here
    mask = labels_here != IGNORE_INDEX
    places_here = None if bool(mask.all()) else mask.nonzero().squeeze(-1)
    places = None if places_here is None else places_here.to(labels.device)

    def take(x: Tensor, places: Tensor | None = places) -> Tensor:
        return x if places is None else x[places]

    kept, vocabulary = take(labels_here, places_here), lm_head_weight.shape[0]
    if len(kept) and not (int(kept.min()) >= 0 and int(kept.max()) < vocabulary):
        raise ValueError(
            f"labels must lie in [0, {vocabulary}) or be -100; found {int(kept.min())}, {int(kept.max())}"
        )
    pass_ = _Pass(
        take(labels).long(),
        take(sequence_ids),
        run_lengths(take(ids_here, places_here)),
        objective,
        normalizer,
        None if sample_weights is None else take(sample_weights),
        (float(logit_scale), None if logit_softcap is None else float(logit_softcap)),
        chunk_tokens,
        vocab_chunk,
        (need_entropy, need_accuracy),
        recompute,
    )
    loss = _fused(take(hidden), lm_head_weight, bias, pass_)
    return pass_.output(loss, mask, places)


def _fused(hidden: Tensor, weight: Tensor, bias: Tensor | None, pass_: _Pass) -> Tensor:
    tensors = (hidden, weight, bias)
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors)
    if any(needs):
        return _FusedFunction.apply(hidden, weight, bias, pass_, needs)
    with torch.no_grad():
        return pass_.run(hidden, weight, bias, (False, False, False))[0]


class _FusedFunction(torch.autograd.Function):
    """The pass as one differentiable step: gradients are formed in the forward pass and handed out in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, pass_: _Pass, needs: Any) -> Tensor:
        loss, gradients = pass_.run(hidden, weight, bias, needs)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.save_for_backward(*gradients)  # freed with the graph, so that a parameter can take them over uncopied
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        gradients = ctx.saved_tensors
        # Looking at the number is free on a CPU, where a copy of the weight gradient is not; elsewhere it would stall.
        if not (grad.device.type == "cpu" and grad.item() == 1.0):
            gradients = tuple(None if x is None else scaled(x, grad) for x in gradients)
        cast = (None if x is None else x.to(dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True))
        return (*cast, None, None)


class _Pass:
    """One batch on its way through the head: what it is, how it is walked, what was kept."""

    def __init__(
        self,
        labels: Tensor,
        sequence_ids: Tensor,
        runs: tuple[list[int], bool],
        objective: Objective,
        normalizer: float | Tensor | None,
        sample_weights: Tensor | None,
        scale_and_cap: tuple[float, float | None],
        chunk_tokens: int | None,
        vocab_chunk: int | None,
        need: tuple[bool, bool],
        recompute: bool,
    ) -> None:
        self.labels, self.sequence_ids, self.sample_weights = labels, sequence_ids, sample_weights
        self.lengths, self.in_runs = runs
        self.own_call = type(objective).__call__ is not Objective.__call__
        self.objective, self.normalizer = objective, normalizer
        self.scale, self.cap = scale_and_cap
        self.chunk_tokens, self.vocab_chunk, self.recompute = chunk_tokens, vocab_chunk, recompute
        self.need_entropy, self.need_accuracy = need
        self._runs: tuple[Tensor, list[int]] | None = None

    # -- the walk -----------------------------------------------------------------------------------------------------

    def plan(self, vocabulary: int, products: torch.dtype, sum_bytes: int) -> list[Group]:
        """The batch as groups of whole sequences; sets `path`, `reason` and `chunk_tokens`."""
        tokens = len(self.labels)
        device = self.labels.device
        limit = self.chunk_tokens or chunk_limit(tokens, vocabulary, products.itemsize, device, sum_bytes)
        self.chunk_tokens = limit
        lengths = self.lengths
        if self.recompute or self.own_call or not self.in_runs:
            reason = (
                "it was asked for"
                if self.recompute
                else "the objective defines its own `__call__`, so sequences may depend on each other"
                if self.own_call
                else "the tokens of a sequence are not side by side"
            )
            return self._planned(reason, [Group(pieces_of(0, tokens, limit))] if tokens else [])
        if self._tokens_stand_alone():
            groups = [Group((piece,)) for piece in pieces_of(0, tokens, limit)] if tokens else []
            return self._planned("a token's coefficient needs no other token", groups)
        longest = max(lengths, default=0)
        fits = f"every sequence fits a chunk of {limit} tokens"
        cut = f"a sequence has {longest} target tokens and a chunk takes {limit}"
        return self._planned(cut if longest > limit else fits, plan_groups(lengths, limit))

    def _planned(self, reason: str, groups: list[Group]) -> list[Group]:
        self.recomputed = sum(g.stop - g.start for g in groups if self.twice(g))
        self.path, self.reason = "recompute" if self.recomputed else "one-pass", reason
        # Told once per kind of reason: the numbers in it change with every batch.
        kind = self.path + "".join(c for c in reason if not c.isdigit())
        if kind not in _said:
            _said.add(kind)
            # What costs a product more and was not asked for is worth a line that is seen by default.
            level = logging.WARNING if self.recomputed and not self.recompute else logging.INFO
            logger.log(level, "fused head: %s path, because %s", self.path, reason)
        return groups

    def twice(self, group: Group) -> bool:
        """Whether the logits of a group are computed twice: not all at hand when its coefficients are known."""
        return len(group.pieces) > 1 or self.recompute

    def _tokens_stand_alone(self) -> bool:
        """Whether dL/d log p of a token does not depend on other tokens, so that sequences may be cut anywhere."""
        objective = self.objective
        return objective.length_weighting == "token" and (objective.level == "token" or type(objective) is Mle)

    def run(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """The loss and the gradients of hidden, weight and bias; what is not needed is None."""
        device_type = hidden.device.type
        wanted = hidden.dtype
        if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
            wanted = torch.get_autocast_dtype(device_type)
        products = products_dtype(device_type, wanted)
        with torch.autocast(device_type, enabled=False):
            return self._run(hidden.detach(), weight.detach(), bias, needs, products)

    def _run(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, bool, bool],
        products: torch.dtype,
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
        tokens, device = len(self.labels), hidden.device
        vocabulary = weight.shape[0]
        high = torch.promote_types(products, torch.float32)
        groups = self.plan(vocabulary, products, bytes_of_sum(weight, products) if needs[1] else 0)
        alone = len(groups) == 1 and any(needs)  # what gives the coefficients gives the loss too
        if self.normalizer is None and not (alone and products != torch.float16):
            self.normalizer = self._score(torch.zeros(tokens, dtype=high, device=device), slice(None)).normalizer
        self.numbers = TokenNumbers(
            torch.zeros(tokens, dtype=high, device=device),
            torch.zeros(tokens, dtype=high, device=device) if self.need_entropy else None,
            torch.zeros(tokens, dtype=torch.bool, device=device) if self.need_accuracy else None,
        )
        self.transform = Transform(None if bias is None else bias.detach().to(high), self.scale, self.cap)
        weight_in = weight
        if weight.dtype != products:
            weight_in = workspace.take("weight", tuple(weight.shape), products, device).copy_(weight)
        largest = max((stop - start for g in groups for start, stop in g.pieces), default=0)
        buffer = workspace.take("chunk", (largest, vocabulary), products, device)
        chunks = sum(len(g.pieces) for g in groups)
        d_hidden = torch.empty_like(hidden, dtype=kept_dtype(hidden)) if needs[0] else None
        unit = None
        if products == torch.float16:
            own = torch.as_tensor(self.normalizer, device=device).to(high).reshape(())
            unit = torch.where(own > 0, 1 / own, 1.0)
        d_weight = None
        if needs[1]:
            d_weight = WeightGradient(weight, kept_dtype(weight), products, chunks, self.vocab_chunk, unit)
        d_bias = torch.zeros(vocabulary, dtype=high, device=device) if needs[2] else None

        for group in groups:
            twice = self.twice(group)
            for start, stop in group.pieces:
                chunk = buffer[: stop - start]
                project(hidden[start:stop].to(products), weight_in, chunk)
                self._score_piece(chunk, start, stop, gradient=any(needs) and not twice)
            if not any(needs):
                continue
            factors = self._coefficients(slice(group.start, group.stop))
            for start, stop in group.pieces:
                chunk, inputs = buffer[: stop - start], hidden[start:stop]
                if twice:
                    project(inputs.to(products), weight_in, chunk)
                    self._score_piece(chunk, start, stop, gradient=True)
                factor = factors[start - group.start : stop - group.start]
                if d_hidden is not None:
                    hidden_gradient(chunk, weight_in, factor, d_hidden[start:stop])
                if d_weight is not None:
                    d_weight.add(chunk, inputs, factor)
                if d_bias is not None:
                    add_bias_gradient(chunk, factor, d_bias)

        if not alone:
            self.scored = self._score(self.numbers.log_probs, slice(None))
        gradients = (
            d_hidden,
            None if d_weight is None else d_weight.finish(),
            None if d_bias is None or bias is None else d_bias.to(kept_dtype(bias)),
        )
        return self.scored.loss.detach(), gradients

    def _score_piece(self, chunk: Tensor, start: int, stop: int, *, gradient: bool) -> None:
        score_rows(chunk, self.labels[start:stop], self.transform, self.numbers, start, gradient=gradient)

    # -- the objective ------------------------------------------------------------------------------------------------

    def _score(self, log_probs: Tensor, part: slice) -> ObjectiveOutput:
        mask = torch.ones(log_probs.shape, dtype=torch.bool, device=log_probs.device)
        weights = None if self.sample_weights is None else self.sample_weights[part]
        if self.own_call or not self.in_runs:
            ids = self.sequence_ids[part]
            return self.objective(log_probs, mask, ids, normalizer=self.normalizer, sample_weights=weights)
        segments, count = self._segments(part)
        return self.objective.over_segments(log_probs, mask, segments, count, self.normalizer, weights)

    def _segments(self, part: slice) -> tuple[Tensor, int]:
        """The numbers of these tokens' sequences, from 0, and how many there are."""
        start, stop, _ = part.indices(len(self.labels))
        if self._runs is None:
            self._runs = number_runs(self.sequence_ids), list(accumulate(self.lengths))
        numbers, ends = self._runs
        if stop == start:
            return numbers[part], 0
        first, last = bisect_right(ends, start), bisect_right(ends, stop - 1)
        return (numbers[part] - first if first else numbers[part]), last - first + 1

    def _coefficients(self, part: slice) -> Tensor:
        """-dL/d log p of these tokens (the factor on d(-log p)), times the logits' scale."""
        with torch.enable_grad():
            log_probs = self.numbers.log_probs[part].clone().requires_grad_()
            self.scored = self._score(log_probs, part)
            (slope,) = torch.autograd.grad(self.scored.loss, log_probs)
        return slope * -self.scale

    # -- the result ---------------------------------------------------------------------------------------------------

    def output(self, loss: Tensor, mask: Tensor, places: Tensor | None) -> FusedOutput:
        """All that was found out, in the places of the labels as they were given."""

        def spread(x: Tensor) -> Tensor:
            return x if places is None else x.new_zeros(mask.shape).index_copy_(0, places, x)

        parts = {f.name: getattr(self.scored, f.name) for f in fields(ObjectiveOutput)}
        parts["loss"] = loss
        if self.objective.level == "token":
            parts["weights"] = spread(self.scored.weights)
        statistics = self.scored.statistics()
        like = statistics["tokens"]
        for name, each in (("correct", self.numbers.correct), ("entropy_sum", self.numbers.entropy)):
            if each is not None:
                each = each.to(like)
                weights = self.sample_weights
                statistics[name] = each.sum() if weights is None else (each * weights.to(like)).sum()
        parts["_statistics"] = statistics
        return FusedOutput(
            **parts,
            log_probs=spread(self.numbers.log_probs),
            path=self.path,
            reason=self.reason,
            recomputed_tokens=self.recomputed,
            chunk_tokens=self.chunk_tokens or 0,
        )
