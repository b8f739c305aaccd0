"""Log-probabilities of target tokens from hidden states: the fused head's arithmetic with no objective or gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from convexlm.head_checks import check_batch, check_transform
from convexlm.head_chunks import default_chunk_tokens, pieces_of
from convexlm.head_products import products_dtype, project
from convexlm.head_tiles import TokenNumbers, Transform, score_rows, workspace

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What a model gives each target token; (N,) tensors in float32 (float64 for float64 input).

    Attributes:
        log_probs: log-probability of the label, in nats.
        logit_norms: length of the gradient of that log-probability with respect to the logits, from 0 (the token is
            certain) to below sqrt(2).
    """

    log_probs: Tensor
    logit_norms: Tensor


@torch.no_grad()
def token_scores(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> TokenScores:
    """Score labels without ever holding the logits of more than `chunk_tokens` of them.

    Logits, dtypes and the default of `chunk_tokens` are those of `fused_objective`.

    Args:
        hidden: (N, H) floating, the states that predict the labels.
        lm_head_weight: (V, H) floating.
        labels: (N,) integers in [0, V).
        bias: (V,) floating.
        logit_scale: factor on the projection.
        logit_softcap: cap on the logits' magnitude.
        chunk_tokens: targets whose logits may exist at a time.

    Raises:
        ValueError: shapes, dtypes, devices or numbers do not fit together.
    """
    check_batch(hidden, lm_head_weight, labels, labels, bias, None, chunk_tokens, None)
    check_transform(logit_scale, logit_softcap)
    tokens, vocabulary, device = len(labels), lm_head_weight.shape[0], hidden.device
    if tokens and not (int(labels.min()) >= 0 and int(labels.max()) < vocabulary):
        raise ValueError(f"labels must lie in [0, {vocabulary}); found {int(labels.min())}, {int(labels.max())}")
    products = products_dtype(device.type, hidden.dtype)
    high = torch.promote_types(products, torch.float32)
    limit = chunk_tokens or default_chunk_tokens(vocabulary, products.itemsize, device)
    weight = lm_head_weight
    if weight.dtype != products:
        weight = workspace.take("weight", tuple(weight.shape), products, device).copy_(weight)
    transform = Transform(None if bias is None else bias.to(high), float(logit_scale), logit_softcap)
    log_probs, norms = (torch.zeros(tokens, dtype=high, device=device) for _ in range(2))
    numbers = TokenNumbers(log_probs, logit_norms=norms)
    buffer = workspace.take("chunk", (min(limit, tokens), vocabulary), products, device)
    for start, stop in pieces_of(0, tokens, limit) if tokens else ():
        chunk = buffer[: stop - start]
        project(hidden[start:stop].to(products), weight, chunk)
        score_rows(chunk, labels[start:stop].long(), transform, numbers, start, gradient=False)
    return TokenScores(log_probs, norms)
