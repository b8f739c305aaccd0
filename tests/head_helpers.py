"""Batches for the fused head, and what full logits in float64 give for them, by torch's own log_softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from convexlm.head import fused_objective
from convexlm.objectives import Objective, get_objective, register_objective

HIDDEN, VOCABULARY = 12, 41
LENGTHS = (5, 1, 17, 8, 3)


@register_objective("test-reciprocal")
@dataclass(frozen=True, kw_only=True)
class Reciprocal(Objective):
    def value(self, m):
        return m / (m - 1)

    def weight(self, m):
        return 1 / (m - 1) ** 2


OBJECTIVES = {
    "mle": get_objective("mle"),
    "mle by sequence": get_objective("mle", length_weighting="sequence"),
    "convex": get_objective("convex", k=0.7),
    "convex by sequence": get_objective("convex", k=2.0, length_weighting="sequence"),
    "dft": get_objective("dft"),
    "token level by sequence": get_objective("convex", level="token", length_weighting="sequence"),
    "power": get_objective("power", k=0.4),
    "mixed": get_objective("convex", k=3.0, mle_mix=0.2),
    "registered": get_objective("test-reciprocal"),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def batch(dtype, lengths=LENGTHS, bias=False, seed=0, hidden_size=HIDDEN, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    tensors = {
        "hidden": torch.randn(n, hidden_size, generator=generator),
        "weight": torch.randn(vocabulary, hidden_size, generator=generator) * 0.5,
    }
    if bias:
        tensors["bias"] = torch.randn(vocabulary, generator=generator)
    tensors = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
    labels = torch.randint(0, vocabulary, (n,), generator=generator)
    # Ids need not count up, nor start at 0.
    names = torch.tensor([7, 3, 100, -2, 50, 8, 9])[: len(lengths)]
    return tensors, labels, names.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))


def reference(tensors, labels, ids, objective, normalizer=None, sample_weights=None, scale=1.0, cap=None):
    """Loss, gradients and statistics from full logits in float64."""
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    logits = exact["hidden"] @ exact["weight"].T
    if "bias" in exact:
        logits = logits + exact["bias"]
    logits = logits * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    mask = labels != -100
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
    out = objective(chosen, mask, sequence_ids=ids, normalizer=normalizer, sample_weights=sample_weights)
    gradients = torch.autograd.grad(out.loss, list(exact.values()))
    p = logits.detach().softmax(-1)
    repeats = mask.double() if sample_weights is None else sample_weights * mask
    extra = {
        "correct": ((logits.argmax(-1) == labels) * repeats).sum(),
        "entropy_sum": (torch.special.entr(p).sum(-1) * repeats).sum(),
    }
    return out, dict(zip(exact, gradients, strict=True)), extra


def error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-300)).item()


def check(dtype, objective, lengths=LENGTHS, frozen=(), labels=None, sample_weights=None, normalizer=None, **kwargs):
    transform = {"scale": kwargs.get("logit_scale", 1.0), "cap": kwargs.get("logit_softcap")}
    tensors, own_labels, ids = batch(dtype, lengths, bias=kwargs.pop("bias", False))
    labels = own_labels if labels is None else labels
    for name in frozen:
        tensors[name].requires_grad_(False)
    out = fused_objective(
        tensors["hidden"],
        tensors["weight"],
        labels,
        ids,
        objective,
        normalizer,
        bias=tensors.get("bias"),
        sample_weights=sample_weights,
        need_entropy=True,
        **kwargs,
    )
    wanted, gradients, extra = reference(tensors, labels, ids, objective, normalizer, sample_weights, **transform)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.loss.double(), wanted.loss.detach(), rtol=tolerance, atol=tolerance)
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    up = 2.0**12 if dtype == torch.float16 else 1.0  # float16 gradients need the loss scaled up, as a GradScaler does
    if out.loss.requires_grad:
        (out.loss * up).backward()
    for name, x in tensors.items():
        if name in frozen:
            assert x.grad is None
        else:
            assert x.grad.dtype == dtype
            assert error(x.grad.double() / up, gradients[name]) < tolerance, name
    statistics = {**wanted.statistics(), **extra}
    assert set(out.statistics()) == set(statistics)
    for name, value in statistics.items():
        if name == "correct" and dtype in (torch.bfloat16, torch.float16):
            continue  # rounding the logits makes and breaks ties
        torch.testing.assert_close(
            out.statistics()[name].double(), value.detach().double(), rtol=3 * tolerance, atol=3 * tolerance, msg=name
        )
    torch.testing.assert_close(out.mean_log_probs.double(), wanted.mean_log_probs, rtol=tolerance, atol=3 * tolerance)
    torch.testing.assert_close(out.weights.double(), wanted.weights, rtol=3 * tolerance, atol=3 * tolerance)
    return out
