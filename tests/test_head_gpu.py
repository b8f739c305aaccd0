"""The fused head on a GPU: against full logits in float64, with the Triton kernel and without, and on either path."""

from __future__ import annotations

import pytest
import torch

from convexlm import head_tiles, head_triton
from convexlm.head import fused_objective
from head_helpers import LENGTHS, OBJECTIVES, TOLERANCE, batch, error, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")]


@pytest.mark.parametrize("kernel", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize("chunk_tokens", [None, 18, 9])
@pytest.mark.parametrize("name", ["mle", "convex", "dft", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradients_are_those_of_full_logits(dtype, name, chunk_tokens, kernel, monkeypatch):
    if kernel and not head_tiles.triton_is_installed():
        pytest.skip("triton is not installed")
    monkeypatch.setattr(head_triton, "kernel_pays", lambda *_: kernel)
    monkeypatch.setattr(head_tiles, "triton_is_installed", lambda: kernel)
    tensors, labels, ids = batch(dtype, LENGTHS, bias=True, hidden_size=64, vocabulary=1000)
    objective, settings = OBJECTIVES[name], {"logit_scale": 0.3, "logit_softcap": 5.0}
    wanted, gradients, extra = reference(tensors, labels, ids, objective, scale=0.3, cap=5.0)
    there = {key: x.detach().cuda().requires_grad_() for key, x in tensors.items()}
    out = fused_objective(
        there["hidden"],
        there["weight"],
        labels.cuda(),
        ids.cuda(),
        objective,
        bias=there["bias"],
        need_entropy=True,
        chunk_tokens=chunk_tokens,
        **settings,
    )
    out.loss.backward()
    tolerance = max(TOLERANCE[dtype], 2e-5)
    torch.testing.assert_close(out.loss.cpu().double(), wanted.loss.detach(), rtol=tolerance, atol=tolerance)
    for key, x in there.items():
        assert error(x.grad.cpu(), gradients[key]) < tolerance, key
    entropy = out.statistics()["entropy_sum"].cpu().double()
    torch.testing.assert_close(entropy, extra["entropy_sum"], rtol=tolerance, atol=tolerance)


def test_a_frozen_head_never_holds_a_weight_gradient():
    peaks = []
    for frozen in (False, True):
        weight = torch.randn(32_000, 1024, device="cuda", dtype=torch.bfloat16).requires_grad_(not frozen)
        hidden = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        ids = torch.arange(512, device="cuda") // 64
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fused_objective(hidden, weight, ids, ids, OBJECTIVES["convex"]).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert (weight.grad is None) == frozen
    assert peaks[0] - peaks[1] >= 0.9 * 32_000 * 1024 * 2  # the gradient itself was never there


def _small(factor_dtype=torch.bfloat16):
    weight = torch.randn(1000, 64, device="cuda", dtype=factor_dtype, requires_grad=True)
    hidden = torch.randn(96, 64, device="cuda", dtype=factor_dtype, requires_grad=True)
    ids = torch.arange(96, device="cuda") // 16
    return hidden, weight, lambda: fused_objective(hidden, weight, ids, ids, OBJECTIVES["convex"]).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_upstream_gradient_is_a_factor_on_all_gradients(dtype):
    torch.manual_seed(0)
    hidden, weight, loss = _small(dtype)
    once = torch.autograd.grad(loss(), [hidden, weight])
    kept = loss()
    for _ in range(2):  # the graph is kept, so nothing of it may be overwritten
        for got, wanted in zip(torch.autograd.grad(kept * 3, [hidden, weight], retain_graph=True), once, strict=True):
            torch.testing.assert_close(got, 3 * wanted, rtol=1e-2, atol=1e-6)
    for factor in (3, 1):
        for got, wanted in zip(torch.autograd.grad(loss() * factor, [hidden, weight]), once, strict=True):
            torch.testing.assert_close(got, factor * wanted, rtol=1e-2, atol=1e-6)


def test_an_upstream_gradient_of_one_takes_no_memory():
    weight = torch.randn(32_000, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.arange(64, device="cuda") // 16
    fused_objective(hidden, weight, ids, ids, OBJECTIVES["convex"]).loss.backward()
    hidden.grad = weight.grad = None
    loss = fused_objective(hidden, weight, ids, ids, OBJECTIVES["convex"]).loss
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 2**20, "the gradients are handed out, not copied"


def test_a_batch_is_one_chunk_where_that_takes_no_more_memory():
    """Several chunks need a float32 sum of the weight's gradient; a chunk of all tokens may be as large instead."""
    peaks = {}
    for chunk_tokens in (None, 4096):
        weight = torch.randn(151_936, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        hidden = torch.randn(4400, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        ids = torch.arange(4400, device="cuda") // 50
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = fused_objective(hidden, weight, ids, ids, OBJECTIVES["convex"], chunk_tokens=chunk_tokens)
        out.loss.backward()
        peaks[out.chunk_tokens] = torch.cuda.max_memory_allocated() - before
    assert peaks[4400] <= peaks[4096]
