"""The Triton kernel against the head's own operations; `test_head_triton.py` runs this file, see there."""

from __future__ import annotations

import pytest
import torch

from convexlm.head_tiles import TokenNumbers, Transform, score_rows_torch
from convexlm.head_triton import scale_, score_rows_triton

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of masked-out branches
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def numbers(n, *, entropy=True, correct=True, norms=True):
    return TokenNumbers(
        torch.zeros(n, device=DEVICE),
        torch.zeros(n, device=DEVICE) if entropy else None,
        torch.zeros(n, dtype=torch.bool, device=DEVICE) if correct else None,
        torch.zeros(n, device=DEVICE) if norms else None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("with_bias", "scale", "cap"), [(False, 1.0, None), (True, 0.5, None), (True, -1.5, 4.0), (False, 1.0, 30.0)]
)
@pytest.mark.parametrize("vocabulary", [5, 64, 8200])
def test_it_gives_what_torch_gives(vocabulary, with_bias, scale, cap, dtype):
    torch.manual_seed(vocabulary)
    chunk = (3 * torch.randn(6, vocabulary)).to(DEVICE, dtype)
    chunk[1] = 0.0  # all equal: of equals the first is argmax
    chunk[2, vocabulary // 2] = 60.0  # certain
    labels = torch.randint(vocabulary, (6,), device=DEVICE)
    labels[1], labels[2] = 0, vocabulary // 2
    bias = torch.randn(vocabulary, device=DEVICE) if with_bias else None
    transform = Transform(bias, scale, cap)
    wanted, got = numbers(8), numbers(8)
    theirs, ours = chunk.clone(), chunk.clone()
    score_rows_torch(theirs, labels, transform, wanted, 1, gradient=True)
    score_rows_triton(ours, labels, transform, got, 1, gradient=True)
    for name in ("log_probs", "entropy", "logit_norms"):
        torch.testing.assert_close(getattr(got, name), getattr(wanted, name), rtol=2e-5, atol=2e-5, msg=name)
    assert torch.equal(got.correct, wanted.correct)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert got.log_probs[0] == got.log_probs[7] == 0  # only its own places


def test_logits_that_are_minus_infinity_take_no_part():
    chunk = torch.randn(3, 40, device=DEVICE)
    chunk[:, 10:30] = float("-inf")
    labels = torch.tensor([1, 5, 35], device=DEVICE)
    wanted, got = numbers(3), numbers(3)
    theirs, ours = chunk.clone(), chunk.clone()
    score_rows_torch(theirs, labels, Transform(), wanted, 0, gradient=True)
    score_rows_triton(ours, labels, Transform(), got, 0, gradient=True)
    torch.testing.assert_close(got.entropy, wanted.entropy)
    torch.testing.assert_close(ours, theirs)
    assert bool(got.entropy.isfinite().all())


def test_only_what_is_asked_for_is_written():
    chunk = torch.randn(3, 40, device=DEVICE)
    before, got = chunk.clone(), numbers(3, entropy=False, correct=False, norms=False)
    score_rows_triton(chunk, torch.tensor([1, 5, 35], device=DEVICE), Transform(), got, 0, gradient=False)
    assert torch.equal(chunk, before)
    torch.testing.assert_close(got.log_probs, before.log_softmax(-1)[torch.arange(3), [1, 5, 35]])


def test_a_row_of_nan_says_so():
    chunk = torch.randn(2, 40, device=DEVICE)
    chunk[1, 3] = float("nan")
    got = numbers(2)
    score_rows_triton(chunk, torch.tensor([1, 5], device=DEVICE), Transform(), got, 0, gradient=True)
    assert bool(got.log_probs[0].isfinite()) and bool(got.log_probs[1].isnan())


def test_float64_statistics_are_refused():
    double = TokenNumbers(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="float32"):
        score_rows_triton(torch.zeros(2, 4), torch.tensor([0, 1]), Transform(), double, 0, gradient=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (3, 4096), (4097,)])
@pytest.mark.parametrize("factor", [1.0, 0.0, -2.5, 1 / 3, float("nan")])
def test_scaling_rounds_once(factor, shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape).to(DEVICE, dtype)
    wanted = (x.float() * factor).to(dtype)
    beside = torch.cat([x.flatten(), x.new_full((8,), 7.0)])  # nothing behind it is touched
    got = scale_(beside[: x.numel()].view(shape), torch.tensor(factor, device=DEVICE))
    truncates = DEVICE == "cpu" and dtype == torch.bfloat16  # the interpreter, where a GPU rounds
    torch.testing.assert_close(got, wanted, rtol=2**-7 if truncates else 0, atol=0, equal_nan=True)
    assert (beside[x.numel() :] == 7.0).all()
