"""The fused head against full logits in float64, written out with torch's own log_softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from convexlm import head as head_module
from convexlm import head_products
from convexlm.head import fused_objective
from convexlm.head_products import products_dtype
from convexlm.objectives import Objective, get_objective
from head_helpers import LENGTHS, OBJECTIVES, TOLERANCE, VOCABULARY, batch, check, error, reference

VARIANTS = {
    "plain": {},
    "bias": {"bias": True},
    "soft-cap": {"logit_softcap": 3.0},
    "scale": {"logit_scale": 0.3},
    "all three": {"bias": True, "logit_softcap": 2.0, "logit_scale": -0.7},
}


# chunk_tokens: everything in one chunk; several, each of whole sequences; one sequence too long; pieces of two tokens
@pytest.mark.parametrize("chunk_tokens", [None, 18, 9, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_value_gradients_and_statistics_are_those_of_full_logits(dtype, name, chunk_tokens):
    out = check(dtype, OBJECTIVES[name], chunk_tokens=chunk_tokens)
    alone = name in ("mle", "dft")
    too_long = chunk_tokens is not None and chunk_tokens < max(LENGTHS) and not alone
    assert out.path == ("recompute" if too_long else "one-pass")
    assert out.recomputed_tokens == (0 if not too_long else 17 if chunk_tokens == 9 else sum(LENGTHS) - 1)
    if chunk_tokens is not None:
        assert out.chunk_tokens == chunk_tokens


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_logit_transform_and_frozen_part(dtype, variant, frozen, recompute):
    settings = VARIANTS[variant]
    if not settings.get("bias"):
        frozen = tuple(name for name in frozen if name != "bias")
    out = check(dtype, OBJECTIVES["convex"], frozen=frozen, recompute=recompute, chunk_tokens=18, **settings)
    assert out.path == ("recompute" if recompute else "one-pass")


def test_weighted_records_and_the_global_normalizer():
    weights = torch.tensor([2.0, 0.0, 0.5, 1.0, 3.0]).repeat_interleave(torch.tensor(LENGTHS))
    for objective in OBJECTIVES.values():
        for chunk_tokens in (None, 9):
            for normalizer in (None, 123.0, torch.tensor(50)):
                check(
                    torch.float64, objective, sample_weights=weights, normalizer=normalizer, chunk_tokens=chunk_tokens
                )


def test_ignored_labels_take_no_part():
    _, labels, _ = batch(torch.float64)
    labels[torch.tensor([0, 5, 9, 10, -1])] = -100  # among them a whole sequence
    for name in OBJECTIVES:
        for chunk_tokens in (None, 4):
            check(torch.float64, OBJECTIVES[name], labels=labels, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("lengths", [(), (4,)], ids=["no tokens", "all masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_to_learn_is_a_zero_with_a_graph(lengths, dtype):
    tensors, labels, ids = batch(dtype, lengths, bias=True)
    labels = torch.full_like(labels, -100)
    out = fused_objective(
        tensors["hidden"], tensors["weight"], labels, ids, OBJECTIVES["convex"], bias=tensors["bias"]
    )
    assert out.loss == 0
    out.loss.backward()
    for x in tensors.values():
        assert x.grad is not None
        assert not x.grad.any()
    assert out.statistics()["num_tokens"] == out.statistics()["correct"] == 0
    # And as one rank's or micro-batch's empty part of a batch that has targets elsewhere.
    assert fused_objective(tensors["hidden"], tensors["weight"], labels, ids, OBJECTIVES["convex"], 10.0).loss == 0


def test_tokens_of_a_sequence_that_are_not_side_by_side_are_recomputed():
    tensors, labels, ids = batch(torch.float64)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    shuffled = {"hidden": tensors["hidden"][order].detach().requires_grad_(), "weight": tensors["weight"]}
    objective = OBJECTIVES["convex by sequence"]
    out = fused_objective(*shuffled.values(), labels[order], ids[order], objective, chunk_tokens=10)
    assert (out.path, out.reason) == ("recompute", "the tokens of a sequence are not side by side")
    _, gradients, _ = reference(shuffled, labels[order], ids[order], objective)
    out.loss.backward()
    for name, x in shuffled.items():
        assert error(x.grad, gradients[name]) < 1e-12


@dataclass(frozen=True, kw_only=True)
class Coupled(Objective):
    """An objective whose loss is no sum over sequences: the mean of convex losses, squared."""

    def value(self, m):
        return -m

    def weight(self, m):
        return torch.ones_like(m)

    def __call__(self, *args, **kwargs):
        out = super().__call__(*args, **kwargs)
        object.__setattr__(out, "loss", out.loss**2)
        return out


def test_an_objective_that_couples_sequences_is_recomputed():
    out = check(torch.float64, Coupled(), chunk_tokens=18)
    assert out.path == "recompute"
    assert "__call__" in out.reason


def test_ties_count_for_the_first_token_as_in_argmax():
    hidden, weight = torch.ones(3, 2), torch.zeros(5, 2)
    weight[1] = weight[3] = 1.0
    ids = torch.zeros(3, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16):
        out = fused_objective(hidden.to(dtype), weight.to(dtype), torch.tensor([1, 3, 0]), ids, OBJECTIVES["mle"])
        assert out.statistics()["correct"] == 1


def test_extreme_logits_stay_finite():
    tensors, labels, ids = batch(torch.float32)
    hidden = (tensors["hidden"].detach() * 1e3).requires_grad_()
    out = fused_objective(
        hidden, tensors["weight"], labels, ids, OBJECTIVES["convex"], chunk_tokens=9, need_entropy=True
    )
    out.loss.backward()
    exact = (hidden.detach() @ tensors["weight"].detach().T).double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(out.log_probs.double(), exact, rtol=1e-5, atol=1e-4)
    assert all(math.isfinite(x) for x in map(float, out.statistics().values()))
    assert hidden.grad.isfinite().all()
    banned = torch.zeros(VOCABULARY)
    banned[VOCABULARY - 1] = -math.inf  # a padded vocabulary
    labels = labels.clamp(max=VOCABULARY - 2)
    out = fused_objective(
        tensors["hidden"], tensors["weight"], labels, ids, OBJECTIVES["convex"], bias=banned, need_entropy=True
    )
    out.loss.backward()
    assert math.isfinite(out.statistics()["entropy_sum"])
    assert tensors["weight"].grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, "hidden must be"),
        ({"hidden": torch.zeros(2, 4)}, "labels must be"),
        ({"labels": torch.tensor([0.0, 1.0, 2.0])}, "labels must be integers"),
        ({"labels": torch.tensor([0, 1, 6])}, r"labels must lie in \[0, 6\)"),
        ({"labels": torch.tensor([0, 1, -3])}, r"labels must lie in"),
        ({"sequence_ids": torch.zeros(2, dtype=torch.int64)}, "sequence_ids must be"),
        ({"bias": torch.zeros(5)}, "bias must be"),
        ({"chunk_tokens": 0}, "chunk_tokens must be"),
        ({"vocab_chunk": 1.5}, "vocab_chunk must be"),
        ({"logit_scale": 0.0}, "logit_scale must be"),
        ({"logit_softcap": -1.0}, "logit_softcap must be"),
        ({"normalizer": -1.0}, "normalizer must be"),
        ({"sample_weights": torch.tensor([1.0, -1.0, 1.0])}, "sample_weights must be finite"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, "must be floating"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "hidden": torch.zeros(3, 4),
        "lm_head_weight": torch.zeros(6, 4),
        "labels": torch.tensor([0, 1, -100]),
        "sequence_ids": torch.zeros(3, dtype=torch.int64),
        "objective": OBJECTIVES["convex"],
    }
    with pytest.raises(ValueError, match=message):
        fused_objective(**{**arguments, **change})


def test_products_run_in_the_inputs_dtype_unless_that_is_slow(monkeypatch):
    threads = torch.get_num_threads()
    assert products_dtype("cpu", torch.float32) == torch.float32
    assert products_dtype("cpu", torch.float64) == torch.float64
    assert products_dtype("cpu", torch.float16) == torch.float32
    assert products_dtype("cpu", torch.bfloat16) in (torch.bfloat16, torch.float32)
    assert products_dtype("cuda", torch.float16) == torch.float16
    assert torch.get_num_threads() == threads
    for bf16_seconds, wanted in ((0.25, torch.bfloat16), (0.9, torch.float32), (4.0, torch.float32)):
        seconds = {torch.float32: 1.0, torch.bfloat16: bf16_seconds}
        monkeypatch.setattr(head_products, "_seconds_of_product", seconds.get)
        assert products_dtype.__wrapped__("cpu", torch.bfloat16) == wanted


@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32], ids=str)
def test_both_choices_of_products_give_the_same_numbers(products, monkeypatch):
    monkeypatch.setattr(head_module, "products_dtype", lambda *args: products)
    for chunk_tokens in (None, 18, 9):
        check(torch.bfloat16, OBJECTIVES["convex"], chunk_tokens=chunk_tokens, bias=True, logit_softcap=4.0)


@pytest.mark.parametrize("cap", [30.0, 50.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_far_below_the_best_token_are_exact(dtype, cap):
    # Differences of logits beyond 70 and 100, where exp() underflows in part: with mle nothing hides the gradient.
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(6, 4, generator=generator) * 3).to(dtype).requires_grad_()
    weight = (torch.randn(9, 4, generator=generator) * 20).to(dtype).requires_grad_()
    labels, ids = (hidden @ weight.T).argmin(-1), torch.tensor([0, 0, 0, 1, 1, 1])
    out = fused_objective(hidden, weight, labels, ids, get_objective("mle"), logit_softcap=cap)
    out.loss.backward()
    tensors = {"hidden": hidden, "weight": weight}
    wanted, gradients, _ = reference(tensors, labels, ids, get_objective("mle"), cap=cap)
    assert wanted.loss > 50
    torch.testing.assert_close(out.loss.double(), wanted.loss.detach(), rtol=1e-6, atol=0)
    for name, x in tensors.items():
        assert error(x.grad, gradients[name]) < 1e-5, name
