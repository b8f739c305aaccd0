"""The elementwise arithmetic of one chunk of the fused head: logits, their statistics, and what becomes of them.

A chunk's logits live in one buffer of the products' dtype. Rows are taken from it a few at a time into float32 (so
that on a CPU they stay in its cache), turned into log-probabilities and into `softmax - onehot`, and written back.
A token's coefficient never multiplies that matrix: it scales the rows of the two thin factors instead.
"""

from __future__ import annotations

import importlib.util
import threading
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
_CPU_ROWS_BYTES, GPU_ROWS_BYTES = 2**20, 256 * 2**20
# exp(-70) adds nothing to any float32 sum of probabilities. Below -87 the results are denormal, which many CPUs
# compute a hundred times slower; and -inf would give NaN in the entropy.
_LEAST_LOG = -70.0


def cpu_rows_bytes() -> int:
    """Size of the float32 rows that are worked on at a time: what fits a core's cache, for every thread."""
    return _CPU_ROWS_BYTES * torch.get_num_threads()


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


def score_rows(
    chunk: Tensor, labels: Tensor, transform: Transform, numbers: TokenNumbers, start: int, *, gradient: bool
) -> None:
    """`score_rows_torch`; on a CPU `score_rows_cpu`, on a GPU one Triton kernel where that is faster: the same."""
    if chunk.device.type == "cpu":
        score_rows_cpu(chunk, labels, transform, numbers, start, gradient=gradient)
        return
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
    rows = min(n, max(1, GPU_ROWS_BYTES // (vocabulary * dtype.itemsize)))
    for first in range(0, n, rows):
        source, y = chunk[first : first + rows], labels[first : first + rows, None]
        place = slice(start + first, start + first + len(source))
        logits = transform.apply_(source.to(dtype, copy=True))
        p = torch.softmax(logits, -1)
        top, chosen = logits.amax(-1), logits.gather(-1, y).squeeze(-1)
        # The largest probability is 1 / sum(exp(z - max)): its logarithm is max - logsumexp, without a second pass.
        top_log_p = p.amax(-1).log_()
        numbers.log_probs[place] = chosen - top + top_log_p
        if numbers.correct is not None:
            numbers.correct[place] = logits.argmax(-1) == y.squeeze(-1)
        if numbers.entropy is not None:
            # A logit of -inf has probability 0 and no part in the entropy, but 0 * inf is NaN.
            expectation = torch.linalg.vecdot(p, logits.clamp_(min=torch.finfo(dtype).min))
            numbers.entropy[place] = top - top_log_p - expectation
        _gradient_of(p, y, logits, transform, numbers, place, source if gradient else None)


def score_rows_cpu(
    chunk: Tensor, labels: Tensor, transform: Transform, numbers: TokenNumbers, start: int, *, gradient: bool
) -> None:
    """As `score_rows_torch`, in steps that each pass once over rows in the cache, and in buffers that stay."""
    n, vocabulary = chunk.shape
    dtype = numbers.log_probs.dtype
    rows = min(n, max(1, cpu_rows_bytes() // (vocabulary * dtype.itemsize)))
    buffer = workspace.take("logit rows", (rows, vocabulary), dtype, chunk.device)
    # What is needed beside the probabilities: z - max for the entropy, z for the soft cap's slope.
    both = numbers.entropy is not None or transform.cap is not None
    # Capped logits z lie within twice the cap of each other, and the cap's slope is taken from them: none is raised.
    least = _LEAST_LOG if transform.cap is None else min(_LEAST_LOG, -2.0 * transform.cap - 1.0)
    p_buffer = workspace.take("softmax rows", (rows, vocabulary), dtype, chunk.device) if both else buffer
    for first in range(0, n, rows):
        source, y = chunk[first : first + rows], labels[first : first + rows, None]
        place = slice(start + first, start + first + len(source))
        shifted, p = buffer[: len(source)], p_buffer[: len(source)]
        transform.apply_(shifted.copy_(source))
        top = shifted.amax(-1, keepdim=True)
        shifted.sub_(top)
        chosen = shifted.gather(-1, y).squeeze(-1)
        if numbers.correct is not None:
            numbers.correct[place] = _is_first_maximum(shifted, chosen, y.squeeze(-1))
        torch.exp(shifted.clamp_(min=least), out=p)
        total = p.sum(-1, keepdim=True)
        log_total = total.log().squeeze(-1)
        numbers.log_probs[place] = chosen - log_total
        if not (gradient or both or numbers.logit_norms is not None):
            continue
        p.mul_(total.reciprocal_())
        if numbers.entropy is not None:
            numbers.entropy[place] = log_total - torch.linalg.vecdot(p, shifted)
        logits = shifted.add_(top) if transform.cap is not None else shifted
        _gradient_of(p, y, logits, transform, numbers, place, source if gradient else None)


def _gradient_of(
    p: Tensor,
    labels: Tensor,
    logits: Tensor,
    transform: Transform,
    numbers: TokenNumbers,
    place: slice,
    out: Tensor | None,
) -> None:
    """From probabilities p (rows, V) to `softmax - onehot`, its norms and, in `out`, d(-log p)/d projection."""
    if out is None and numbers.logit_norms is None:
        return
    p.scatter_add_(-1, labels, p.new_full(labels.shape, -1.0))
    if numbers.logit_norms is not None:
        numbers.logit_norms[place] = torch.linalg.vector_norm(p, dim=-1)
    if out is not None:
        transform.chain_(p, logits)
        out.copy_(p)


def _is_first_maximum(shifted: Tensor, chosen: Tensor, labels: Tensor) -> Tensor:
    """Whether the label is what argmax gives, from z - max: among equals (common in bf16) the first.

    A look at what stands before the label costs a tenth of an argmax, and only rows that may be hits need it.
    """
    hit = chosen == 0
    for row in hit.nonzero().flatten().tolist():
        label = int(labels[row])
        hit[row] = label == 0 or bool(shifted[row, :label].amax() < 0)
    return hit
