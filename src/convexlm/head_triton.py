"""The elementwise part of the fused head as one Triton kernel: a chunk's logits are read twice and written once.

The same numbers as `head_tiles.score_rows`, which is a dozen operations over float32 copies of the chunk. Whether the
kernel is the faster one on a device is measured there, once (`kernel_pays`).
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from convexlm.head_tiles import TokenNumbers, Transform

logger = logging.getLogger(__name__)

_LOWEST = tl.constexpr(-3.0e38)  # a maximum to start from that leaves no inf - inf


@triton.jit
def _logits(x, bias_ptr, columns, inside, scale, cap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """From projections to logits, as `Transform.apply_`."""
    z = x.to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    z = z * scale
    if HAS_CAP:
        z = cap * (2.0 * tl.sigmoid(2.0 * z / cap) - 1.0)
    return tl.where(inside, z, float("-inf"))


@triton.jit
def _row_kernel(  # type: ignore[no-untyped-def]
    chunk_ptr,
    labels_ptr,
    bias_ptr,
    log_probs_ptr,
    entropy_ptr,
    correct_ptr,
    norms_ptr,
    stride,
    vocabulary,
    scale,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    CORRECT: tl.constexpr,
    NORMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of logits a program: statistics in one pass over blocks, `softmax - onehot` in a second."""
    row = tl.program_id(0).to(tl.int64)
    start = chunk_ptr + row * stride
    label = tl.load(labels_ptr + row)
    top = tl.full((), _LOWEST, tl.float32)
    best = tl.full((), 0, tl.int64)
    total = tl.full((), 0.0, tl.float32)
    moment = tl.full((), 0.0, tl.float32)  # sum of exp(z - top) (z - top)
    for first in range(0, vocabulary, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        x = tl.load(start + columns, mask=inside, other=0.0)
        z = _logits(x, bias_ptr, columns, inside, scale, cap, HAS_BIAS, HAS_CAP)
        largest = tl.max(z, 0)
        if CORRECT:  # of equals the first, as argmax
            place = tl.min(tl.where(z == largest, columns, vocabulary), 0).to(tl.int64)
            best = tl.where(largest > top, place, best)
        fresh = tl.maximum(top, largest)
        shrink = tl.exp(top - fresh)
        shifted = z - fresh
        share = tl.exp(shifted)
        if ENTROPY:
            # A logit of -inf has probability 0 and no part in the entropy, but 0 * inf is NaN.
            own = tl.sum(tl.where(share > 0, share * shifted, 0.0), 0)
            moment = tl.where(total > 0, shrink * (moment + (top - fresh) * total), 0.0) + own
        total = total * shrink + tl.sum(share, 0)
        top = fresh
    log_total = tl.log(total)
    # Names of their own: a compiled loop's variables keep their types.
    chosen = _logits(tl.load(start + label), bias_ptr, label, label < vocabulary, scale, cap, HAS_BIAS, HAS_CAP)
    tl.store(log_probs_ptr + row, chosen - top - log_total)
    if ENTROPY:
        tl.store(entropy_ptr + row, log_total - moment / total)
    if CORRECT:
        tl.store(correct_ptr + row, (best == label).to(tl.int8))
    if GRADIENT or NORMS:
        square = tl.full((), 0.0, tl.float32)
        for first in range(0, vocabulary, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            y = tl.load(start + columns, mask=inside, other=0.0)
            z = _logits(y, bias_ptr, columns, inside, scale, cap, HAS_BIAS, HAS_CAP)
            g = tl.exp(z - top) / total - tl.where(columns == label, 1.0, 0.0)
            g = tl.where(inside, g, 0.0)
            if NORMS:
                square += tl.sum(g * g, 0)
            if GRADIENT:
                if HAS_CAP:
                    g = tl.where(inside, g * (1.0 - (z / cap) * (z / cap)), 0.0)
                tl.store(start + columns, g.to(chunk_ptr.dtype.element_ty), mask=inside)
        if NORMS:
            tl.store(norms_ptr + row, tl.sqrt(square))


def score_rows_triton(
    chunk: Tensor, labels: Tensor, transform: Transform, numbers: TokenNumbers, start: int, *, gradient: bool
) -> None:
    """As `head_tiles.score_rows`, for chunks of float32, bfloat16 or float16 and statistics in float32.

    Raises:
        ValueError: statistics in float64, which the kernel does not have.
    """
    if numbers.log_probs.dtype != torch.float32:
        raise ValueError(f"the kernel's statistics are float32, not {numbers.log_probs.dtype}")
    n, vocabulary = chunk.shape
    if not n:
        return
    place = slice(start, start + n)
    log_probs, labels = numbers.log_probs[place], labels.contiguous()
    correct = None if numbers.correct is None else torch.empty(n, dtype=torch.int8, device=chunk.device)
    entropy = None if numbers.entropy is None else numbers.entropy[place]
    norms = None if numbers.logit_norms is None else numbers.logit_norms[place]
    bias = transform.bias
    block = min(triton.next_power_of_2(vocabulary), 8192)
    _row_kernel[(n,)](
        chunk,
        labels,
        log_probs if bias is None else bias.contiguous(),
        log_probs,
        log_probs if entropy is None else entropy,
        log_probs if correct is None else correct,
        log_probs if norms is None else norms,
        chunk.stride(0),
        vocabulary,
        transform.scale,
        1.0 if transform.cap is None else transform.cap,
        HAS_BIAS=bias is not None,
        HAS_CAP=transform.cap is not None,
        ENTROPY=entropy is not None,
        CORRECT=correct is not None,
        NORMS=norms is not None,
        GRADIENT=gradient,
        BLOCK=block,
        num_warps=8 if block >= 4096 else 4,
    )
    if correct is not None and numbers.correct is not None:
        numbers.correct[place] = correct.bool()


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scale x by factor in place; nothing is read or written if the factor is 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < count
        x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_ptr + places, (x * factor).to(x_ptr.dtype.element_ty), mask=inside)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x, contiguous and of 32 bits or fewer, times a 0-d factor, in place; the product is rounded once."""
    block = 4096
    if x.numel():
        _scale_kernel[(triton.cdiv(x.numel(), block),)](x, factor, x.numel(), BLOCK=block, num_warps=8)
    return x


@lru_cache(maxsize=8)
def can_scale(device: torch.device) -> bool:
    """Whether Triton can compile and run `scale_` on this device; tried once a process."""
    try:
        two = torch.full((), 2.0, device=device)
        return scale_(torch.ones(3, dtype=torch.bfloat16, device=device), two).tolist() == [2.0, 2.0, 2.0]
    except Exception as error:  # a compiler or driver that triton cannot work with: a product does it
        logger.warning("gradients of the head are scaled without Triton on %s (%s)", device, error)
        return False


@lru_cache(maxsize=32)
def kernel_pays(device: torch.device, dtype: torch.dtype, vocabulary: int) -> bool:
    """Whether the kernel beats torch's operations on this device: both are timed, once a process."""
    from convexlm.head_tiles import TokenNumbers, Transform, score_rows_torch

    rows = max(8, min(512, (1 << 25) // vocabulary))
    chunk = torch.zeros(rows, vocabulary, dtype=dtype, device=device)
    labels = torch.zeros(rows, dtype=torch.long, device=device)
    numbers = TokenNumbers(torch.zeros(rows, device=device), torch.zeros(rows, device=device))

    def seconds(score: Any) -> float:
        runs = []
        for _ in range(4):  # the first one compiles
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            score(chunk, labels, Transform(), numbers, 0, gradient=True)
            end.record()
            end.synchronize()
            runs.append(begin.elapsed_time(end))
        return min(runs[1:])

    try:
        ours, theirs = seconds(score_rows_triton), seconds(score_rows_torch)
    except Exception as error:  # a compiler or driver that triton cannot work with: torch's operations can
        logger.warning("the head's Triton kernel cannot run on %s (%s); using torch's operations", device, error)
        return False
    logger.info("elementwise part of the head on %s: Triton %.2f ms, torch %.2f ms", device, ours, theirs)
    return ours < theirs
