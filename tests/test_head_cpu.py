"""What the fused head does on a CPU for speed alone: it must not change what comes out."""

from __future__ import annotations

import pytest
import torch

from convexlm import head_products, head_tiles
from convexlm.head_products import WeightGradient
from convexlm.head_tiles import TokenNumbers, Transform, score_rows_cpu, score_rows_torch


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("tokens", [24, 96], ids=["fewer tokens than states", "more"])
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("tile", [None, 100])
def test_the_weight_gradient_is_the_product_however_it_is_laid_out(tile, chunks, kept, tokens, turned, monkeypatch):
    monkeypatch.setattr(head_products, "turning_pays", lambda *_: turned)
    generator = torch.Generator().manual_seed(0)
    vocabulary, width = 1100, 40
    gradient = WeightGradient(torch.empty(vocabulary, width), kept, torch.bfloat16, chunks, tile, None)
    wanted = torch.zeros(vocabulary, width, dtype=torch.float64)
    for _ in range(chunks):
        chunk = torch.randn(tokens, vocabulary, generator=generator).bfloat16()
        hidden = torch.randn(tokens, width, generator=generator).bfloat16()
        factor = torch.rand(tokens, generator=generator)
        before = chunk.clone()
        gradient.add(chunk, hidden, factor)
        assert torch.equal(chunk, before)
        wanted += chunk.double().t() @ (hidden * factor[:, None]).bfloat16().double()
    found = gradient.finish()
    assert found.dtype == kept
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < 4e-3  # bfloat16 rounds to 2^-9


@pytest.mark.parametrize("vocabulary", [5, 2047, 6000], ids=str)
def test_logits_in_tiles_of_the_vocabulary(vocabulary, monkeypatch):
    monkeypatch.setattr(head_products, "_CPU_LOGITS_TILE", 2048)
    hidden, weight = torch.randn(7, 16).bfloat16(), torch.randn(vocabulary, 16).bfloat16()
    chunk = torch.full((7, vocabulary), torch.nan, dtype=torch.bfloat16)
    head_products.project(hidden, weight, chunk)
    torch.testing.assert_close(chunk.double(), hidden.double() @ weight.double().t(), rtol=2**-8, atol=1e-6)


TRANSFORMS = {
    "plain": Transform(),
    "bias": Transform(torch.linspace(-2, 2, 301)),
    "soft-cap": Transform(None, -0.7, 4.0),
}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("asked", [(), ("entropy",), ("correct",), ("logit_norms",), ("entropy", "correct")], ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_in_the_cache_give_what_whole_operations_give(dtype, name, asked, gradient, monkeypatch):
    monkeypatch.setattr(head_tiles, "_CPU_ROWS_BYTES", 4 * 301 * 8 // torch.get_num_threads())
    high = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(4)
    chunk = (6 * torch.randn(9, 301, generator=generator)).to(dtype)
    chunk[1] = 0.0  # all equal
    chunk[2, 150] = 400.0  # certain: the others' probabilities underflow
    chunk[3, 40:90] = float("-inf")
    chunk[4, 20] = chunk[4, 200] = 90.0  # two equal ones: the first is argmax
    labels = torch.tensor([300, 0, 150, 100, 200, 5, 6, 7, 8])

    def run(score):
        kinds = {"entropy": high, "correct": torch.bool, "logit_norms": high}
        numbers = TokenNumbers(
            torch.zeros(11, dtype=high), **{kind: torch.zeros(11, dtype=kinds[kind]) for kind in asked}
        )
        given = chunk.clone()
        score(given, labels, TRANSFORMS[name], numbers, 1, gradient=gradient)
        return numbers, given

    (got, ours), (wanted, theirs) = run(score_rows_cpu), run(score_rows_torch)
    exact = 1e-12 if high == torch.float64 else 3e-5
    for kind in ("log_probs", *asked):
        torch.testing.assert_close(getattr(got, kind), getattr(wanted, kind), rtol=exact, atol=exact, msg=kind)
    if not gradient:
        assert torch.equal(ours, chunk)
    rounding = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(ours, theirs, rtol=rounding, atol=1e-6 if high != torch.float64 else 1e-12)


def test_a_row_of_nan_says_so():
    chunk = torch.zeros(2, 40)
    chunk[1, 3] = torch.nan
    numbers = TokenNumbers(*(torch.zeros(2) for _ in range(2)), torch.zeros(2, dtype=torch.bool))
    score_rows_cpu(chunk, torch.tensor([1, 5]), Transform(), numbers, 0, gradient=True)
    assert bool(numbers.log_probs[0].isfinite()) and bool(numbers.log_probs[1].isnan()) and not numbers.correct[1]
