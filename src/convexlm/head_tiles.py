"""The arithmetic of one chunk of the fused head: logits, their statistics, and what becomes of them.

A chunk's logits live in one buffer of the products' dtype. Rows are taken from it a few at a time into float32 (so
that on a CPU they stay in its cache), turned into log-probabilities and into `softmax - onehot`, and written back.
A token's coefficient never multiplies that matrix: it scales the rows of the two thin factors instead.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
_CPU_ROWS_BYTES, _GPU_ROWS_BYTES = 4 * 2**20, 256 * 2**20
_CPU_TILE = (
    512  # rows of a weight gradient that are formed at a time in half precision, so that they stay in the cache
)
_WORTH_IT = 1.3


@lru_cache(maxsize=8)
def products_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the matrix products for inputs of `dtype`: itself, but float32 for half precision on a slow CPU.

    Half precision needs instructions that many CPUs lack (AVX512-bf16, AMX), and names do not tell how fast they
    are. So both are timed, once per process, on a small product; half precision is kept if it is 1.3 times faster.
    """
    if device_type != "cpu" or dtype not in HALF:
        return dtype
    if dtype == torch.float16:
        return torch.float32  # its products leave a CPU rounded to float16, whose range their sums exceed
    ratio = _seconds_of_product(torch.float32) / _seconds_of_product(dtype)
    chosen = dtype if ratio >= _WORTH_IT else torch.float32
    logger.info("matrix products of the head: %s on this CPU runs at %.1f x float32; using %s", dtype, ratio, chosen)
    return chosen


def _seconds_of_product(dtype: torch.dtype) -> float:
    """Processor time of a small matrix product on one thread.

    Not the time on the clock and not on all threads: on a busy machine a thread waits for others, and that would
    sometimes decide for the slower dtype.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = (torch.ones(shape, dtype=dtype) for shape in ((128, 512), (512, 2048)))
        out = torch.empty(128, 2048, dtype=dtype)
        runs = []
        for _ in range(6):
            begin = time.thread_time()
            torch.mm(a, b, out=out)
            runs.append(time.thread_time() - begin)
        return max(min(runs), 1e-9)
    finally:
        torch.set_num_threads(threads)


class Workspace(threading.local):
    """Buffers that outlive a call, by name; one set a thread.

    On a CPU a large buffer that is freed is unmapped, and mapping it again at the next step costs as much as filling
    it. Elsewhere the device's own caching allocator does this better, so there buffers are fresh.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor of this shape; the next `take` of the same name may reuse its memory."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        size = 1
        for length in shape:
            size *= length
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            self._buffers.pop((name, dtype), None)
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside it
                buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)

    def clear(self) -> None:
        """Give this thread's buffers back."""
        self._buffers.clear()


workspace = Workspace()


@dataclass(frozen=True)
class Transform:
    """From the projection x to logits z: x + bias, times scale, then cap * tanh(z / cap)."""

    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @property
    def is_identity(self) -> bool:
        """Whether logits are the projection itself."""
        return self.bias is None and self.scale == 1.0 and self.cap is None

    def apply_(self, x: Tensor) -> Tensor:
        """In place, x (rows, V) in float32 or float64."""
        if self.bias is not None:
            x.add_(self.bias)
        if self.scale != 1.0:
            x.mul_(self.scale)
        if self.cap is not None:
            x.div_(self.cap).tanh_().mul_(self.cap)
        return x

    def chain_(self, gradient: Tensor, logits: Tensor) -> None:
        """From dL/dz to dL/dx but for the factor `scale`, in place in `gradient`; overwrites `logits`."""
        if self.cap is not None:
            gradient.mul_(logits.div_(self.cap).square_().neg_().add_(1))


@dataclass
class TokenNumbers:
    """What is kept of each token: (N,) tensors; all but `log_probs` only if asked for.

    `logit_norms` is the length of `softmax - onehot`, the gradient of -log p with respect to the logits.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    correct: Tensor | None = None
    logit_norms: Tensor | None = None


def project(hidden: Tensor, weight: Tensor, chunk: Tensor) -> None:
    """Logits before the transform: hidden (n, H) @ weight (V, H)^T into chunk (n, V)."""
    torch.mm(hidden, weight.t(), out=chunk)


def score_rows(
    chunk: Tensor, labels: Tensor, transform: Transform, numbers: TokenNumbers, start: int, *, gradient: bool
) -> None:
    """`score_rows_torch`, or the same by one Triton kernel on a GPU where that is faster."""
    if chunk.device.type == "cuda" and numbers.log_probs.dtype == torch.float32 and triton_is_installed():
        from convexlm.head_triton import kernel_pays, score_rows_triton

        if kernel_pays(chunk.device, chunk.dtype, chunk.shape[1]):
            score_rows_triton(chunk, labels, transform, numbers, start, gradient=gradient)
            return
    score_rows_torch(chunk, labels, transform, numbers, start, gradient=gradient)


@lru_cache(maxsize=1)
def triton_is_installed() -> bool:
    """Whether there is a Triton package; torch's wheels for CUDA bring it along."""
    return importlib.util.find_spec("triton") is not None


def score_rows_torch(
    chunk: Tensor, labels: Tensor, transform: Transform, numbers: TokenNumbers, start: int, *, gradient: bool
) -> None:
    """Log-probabilities (and what else is kept) of a chunk's tokens, and `softmax - onehot` in the logits' place.

    Args:
        chunk: (n, V), projections; with `gradient` overwritten by d(-log p)/d projection, without `transform.scale`.
        labels: (n,) int64.
        transform: from projections to logits.
        numbers: where the numbers of tokens start ... start + n go.
        start: position of the chunk's first token in `numbers`.
        gradient: whether to overwrite the chunk.
    """
    n, vocabulary = chunk.shape
    dtype = numbers.log_probs.dtype
    on_cpu = chunk.device.type == "cpu"
    rows = max(1, (_CPU_ROWS_BYTES if on_cpu else _GPU_ROWS_BYTES) // (vocabulary * dtype.itemsize))
    rows = min(n, rows)
    logits_buffer = workspace.take("logit rows", (rows, vocabulary), dtype, chunk.device)
    softmax_buffer = workspace.take("softmax rows", (rows, vocabulary), dtype, chunk.device)
    for first in range(0, n, rows):
        last = min(n, first + rows)
        logits, p = logits_buffer[: last - first], softmax_buffer[: last - first]
        source, y = chunk[first:last], labels[first:last, None]
        place = slice(start + first, start + last)
        transform.apply_(logits.copy_(source))
        torch.softmax(logits, -1, out=p)
        top, chosen = logits.amax(-1), logits.gather(-1, y).squeeze(-1)
        # The largest probability is 1 / sum(exp(z - max)): its logarithm is max - logsumexp, without a second pass.
        top_log_p = p.amax(-1).log_()
        numbers.log_probs[place] = chosen - top + top_log_p
        if numbers.correct is not None:
            numbers.correct[place] = _is_first_maximum(logits, chosen, top, y.squeeze(-1), on_cpu)
        if numbers.entropy is not None:
            # A logit of -inf has probability 0 and no part in the entropy, but 0 * inf is NaN.
            expectation = torch.linalg.vecdot(p, logits.clamp_(min=torch.finfo(dtype).min))
            numbers.entropy[place] = top - top_log_p - expectation
        if gradient or numbers.logit_norms is not None:
            p.scatter_add_(-1, y, p.new_full(y.shape, -1.0))
        if numbers.logit_norms is not None:
            numbers.logit_norms[place] = torch.linalg.vector_norm(p, dim=-1)
        if gradient:
            transform.chain_(p, logits)
            source.copy_(p)


def _is_first_maximum(logits: Tensor, chosen: Tensor, top: Tensor, labels: Tensor, on_cpu: bool) -> Tensor:
    """Whether the label is what argmax gives: among equals (common in bf16) the first."""
    if not on_cpu:
        return logits.argmax(-1) == labels
    hit = chosen >= top
    rows = hit.nonzero().squeeze(-1)
    if len(rows):  # argmax costs four times amax, and only these rows need it
        hit[rows] = logits[rows].argmax(-1) == labels[rows]
    return hit


def hidden_gradient(chunk: Tensor, weight: Tensor, factor: Tensor, out: Tensor) -> None:
    """Write factor (n,) * (chunk (n, V) @ weight (V, H)) to out (n, H); products accumulate in float32 or better."""
    if chunk.dtype in HALF and chunk.device.type == "cuda":
        product = torch.mm(chunk, weight, out_dtype=torch.float32)
    else:
        product = workspace.take("hidden product", tuple(out.shape), chunk.dtype, chunk.device)
        torch.mm(chunk, weight, out=product)
    torch.mul(product, factor[:, None], out=out) if product.dtype == factor.dtype == out.dtype else out.copy_(
        product * factor[:, None]
    )


def add_bias_gradient(chunk: Tensor, factor: Tensor, total: Tensor) -> None:
    """Add chunk (n, V)^T @ factor (n,) to total (V,), in the dtype of `total`."""
    n, vocabulary = chunk.shape
    rows = max(1, min(n, _CPU_ROWS_BYTES // (vocabulary * total.dtype.itemsize)))
    for first in range(0, n, rows):
        part = chunk[first : first + rows].to(total.dtype)
        total.addmv_(part.t(), factor[first : first + rows])


class WeightGradient:
    """The sum over chunks of chunk^T @ (factor * hidden): (V, H), summed in float32 or better.

    Where the only chunk's product has the result's dtype, it is written straight to the result. On a CPU a half
    precision product leaves the matrix unit rounded to its own dtype (torch offers no other there); the sum over
    chunks is in float32 all the same.

    Args:
        weight: (V, H), for the shape and device of the result.
        dtype: of the result.
        products: dtype of the products.
        chunks: how many chunks will be added.
        tile: rows that are formed at a time; None for a default.
        unit: a positive 0-d tensor that the factors are divided by while in half precision, against underflow.
    """

    def __init__(
        self,
        weight: Tensor,
        dtype: torch.dtype,
        products: torch.dtype,
        chunks: int,
        tile: int | None,
        unit: Tensor | None,
    ) -> None:
        self._products, self._unit, self._empty = products, unit, True
        shape, device = (weight.shape[0], weight.shape[1]), weight.device
        self._direct = chunks == 1 and products == dtype and products != torch.float16
        self._sum_dtype = products if self._direct else torch.promote_types(products, torch.float32)
        self._tile = tile or (_CPU_TILE if products in HALF and not self._direct else shape[0])
        self.result = torch.empty(shape, dtype=dtype, device=device)
        self._sum = (
            self.result
            if self._sum_dtype == dtype
            else workspace.take("weight gradient", shape, self._sum_dtype, device)
        )

    def add(self, chunk: Tensor, hidden: Tensor, factor: Tensor) -> None:
        """One more chunk (n, V), with hidden (n, H) in any dtype and factor (n,) in float32 or float64."""
        if self._unit is not None:
            factor = factor / self._unit
        thin = (hidden * factor[:, None]).to(self._products)
        on_gpu = chunk.device.type == "cuda"
        for first in range(0, self._sum.shape[0], self._tile):
            total, part = self._sum[first : first + self._tile], chunk[:, first : first + self._tile].t()
            if self._sum_dtype == self._products:
                torch.mm(part, thin, out=total) if self._empty else total.addmm_(part, thin)
            elif on_gpu and self._empty:
                torch.mm(part, thin, out_dtype=torch.float32, out=total)
            elif on_gpu:
                torch.addmm(total, part, thin, out_dtype=torch.float32, out=total)
            else:
                tile = workspace.take("weight tile", tuple(total.shape), self._products, chunk.device)
                torch.mm(part, thin, out=tile)
                total.copy_(tile) if self._empty else total.add_(tile)
        self._empty = False

    def finish(self) -> Tensor:
        """The sum; zeros if nothing was added."""
        if self._empty:
            return self.result.zero_()
        if self._unit is not None:
            self._sum.mul_(self._unit)
        return self.result if self._sum is self.result else self.result.copy_(self._sum)
