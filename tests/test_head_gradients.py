"""The fused head's gradients within autograd: checked, scaled, asked for again, of tied weights, under autocast."""

from __future__ import annotations

import pytest
import torch

from convexlm import head_scaling
from convexlm.head import fused_objective
from head_helpers import OBJECTIVES, TOLERANCE, VOCABULARY, batch, error, reference


@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(recompute):
    tensors, labels, ids = batch(torch.float64, lengths=(3, 4), bias=True, hidden_size=3, vocabulary=5)

    def loss(hidden, weight, bias):
        return fused_objective(
            hidden,
            weight,
            labels,
            ids,
            OBJECTIVES["mixed"],
            bias=bias,
            logit_softcap=2.0,
            logit_scale=0.5,
            chunk_tokens=4,
            recompute=recompute,
        ).loss

    assert torch.autograd.gradcheck(loss, tuple(tensors.values()))
    with pytest.raises(RuntimeError, match="does not require grad"):
        (grad,) = torch.autograd.grad(loss(*tensors.values()), tensors["hidden"], create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_may_be_scaled_added_and_used_again(dtype):
    tensors, labels, ids = batch(dtype, bias=True)

    def run():
        return fused_objective(
            tensors["hidden"], tensors["weight"], labels, ids, OBJECTIVES["convex"], bias=tensors["bias"]
        ).loss

    def grads(loss, **kwargs):
        return torch.autograd.grad(loss, list(tensors.values()), **kwargs)

    once = grads(run())
    for loss in (run() * 3, run() + 2 * run(), (lambda x: x + x + x)(run())):
        for got, wanted in zip(grads(loss), once, strict=True):
            torch.testing.assert_close(
                got.float(), 3 * wanted.float(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
            )
    loss = run()
    first = [x.clone() for x in grads(loss, retain_graph=True)]
    run()  # another batch in between overwrites the working buffers, not what was saved
    for got, wanted in zip(grads(loss), first, strict=True):
        assert torch.equal(got, wanted)
    with pytest.raises(RuntimeError, match="second time"):
        grads(loss)


def test_whether_gradients_may_be_overwritten_is_what_backward_was_told():
    """On a GPU the factor is put into the formed gradients, but not where they can be asked for again."""
    seen = []

    class Asking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(head_scaling._graph_is_kept())
            return grad

    x = torch.ones(2, requires_grad=True)
    y = Asking.apply(x).sum()
    torch.autograd.grad(y, x, retain_graph=True)
    y.backward()
    assert seen == [True, False] and head_scaling._graph_is_kept()


def test_tied_embeddings_add_up():
    tensors, labels, ids = batch(torch.float64)
    weight, inputs = tensors["weight"], torch.arange(len(labels)) % VOCABULARY

    def through(weight, full):
        hidden = torch.tanh(weight[inputs])
        if not full:
            return fused_objective(hidden, weight, labels, ids, OBJECTIVES["convex"], chunk_tokens=18).loss
        log_probs = (hidden @ weight.T).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
        return OBJECTIVES["convex"](log_probs, torch.ones_like(labels, dtype=torch.bool), sequence_ids=ids).loss

    got, wanted = (torch.autograd.grad(through(weight, full), weight)[0] for full in (False, True))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_and_returns_the_parameters(dtype):
    tensors, labels, ids = batch(torch.float32)
    with torch.autocast("cpu", dtype):
        out = fused_objective(tensors["hidden"], tensors["weight"], labels, ids, OBJECTIVES["convex"])
    out.loss.backward()
    wanted, gradients, _ = reference(tensors, labels, ids, OBJECTIVES["convex"])
    torch.testing.assert_close(out.loss.double(), wanted.loss.detach(), rtol=2e-2, atol=0)
    for name, x in tensors.items():
        assert x.grad.dtype == torch.float32
        assert error(x.grad, gradients[name]) < TOLERANCE[dtype]


def test_parameters_in_another_dtype_than_the_states():
    tensors, labels, ids = batch(torch.float32)
    weight = tensors["weight"].detach().bfloat16().requires_grad_()
    exact = {"hidden": tensors["hidden"], "weight": weight}
    out = fused_objective(*exact.values(), labels, ids, OBJECTIVES["convex"])
    out.loss.backward()
    _, gradients, _ = reference(exact, labels, ids, OBJECTIVES["convex"])
    assert error(exact["hidden"].grad, gradients["hidden"]) < 1e-5
    assert error(weight.grad, gradients["weight"]) < 1e-2
    assert weight.grad.dtype == torch.bfloat16
