"""The matrix products of the fused head: logits, the states' gradient and the weight's, and in which dtype and layout.

On a CPU what a half precision product costs depends on its layout: with AMX, one whose left factor is transposed
(which `chunk^T @ states` is) ran at a third to a half of the speed of the others. So its tiles are laid out first.
"""

from __future__ import annotations

import logging
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from convexlm.head_tiles import HALF, cpu_rows_bytes, workspace

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

# Rows of the weight in a product that are worked on at a time on a CPU in half precision, so that they stay in its
# cache: of the weight's gradient, and of the logits.
CPU_TILE, _CPU_LOGITS_TILE = 512, 2048
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


def turning_pays(device_type: str, products: torch.dtype) -> bool:
    """Whether the weight's gradient is formed faster from factors that are laid out for it: half precision with AMX.

    By the CPU's capabilities and not by timing both: either way's sums are rounded in another order now and then, and
    a run that goes on after a stop has to give the same bits. Measured in results/training.md.
    """
    return device_type == "cpu" and products in HALF and _has_amx()


@lru_cache(maxsize=1)
def _has_amx() -> bool:
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)  # not in every torch that is allowed
    return bool(capabilities().get("amx_bf16"))


def project(hidden: Tensor, weight: Tensor, chunk: Tensor) -> None:
    """Logits before the transform: hidden (n, H) @ weight (V, H)^T into chunk (n, V)."""
    vocabulary = len(weight)
    tile = _CPU_LOGITS_TILE if chunk.device.type == "cpu" and chunk.dtype in HALF else vocabulary
    for first in range(0, vocabulary, tile):
        torch.mm(hidden, weight[first : first + tile].t(), out=chunk[:, first : first + tile])


def hidden_gradient(chunk: Tensor, weight: Tensor, factor: Tensor, out: Tensor) -> None:
    """Write factor (n,) * (chunk (n, V) @ weight (V, H)) to out (n, H); products accumulate in float32 or better."""
    if chunk.dtype in HALF and chunk.device.type == "cuda":
        product = torch.mm(chunk, weight, out_dtype=torch.float32)
    else:
        product = workspace.take("hidden product", tuple(out.shape), chunk.dtype, chunk.device)
        torch.mm(chunk, weight, out=product)
    torch.mul(product, factor[:, None], out=out)  # in the wider of their dtypes, whatever `out` has


def add_bias_gradient(chunk: Tensor, factor: Tensor, total: Tensor) -> None:
    """Add chunk (n, V)^T @ factor (n,) to total (V,), in the dtype of `total`."""
    n, vocabulary = chunk.shape
    rows = max(1, min(n, cpu_rows_bytes() // (vocabulary * total.dtype.itemsize)))
    for first in range(0, n, rows):
        part = chunk[first : first + rows].to(total.dtype)
        total.addmv_(part.t(), factor[first : first + rows])


def kept_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the gradient of x waits for the backward pass.

    Where x is float16 the loss will be scaled up for the sake of its range, and only the backward pass knows by what.
    """
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def bytes_of_sum(weight: Tensor, products: torch.dtype) -> int:
    """Size of the float32 sum beside the weight's gradient that several chunks need and a single one does not."""
    dtype = kept_dtype(weight)
    one_needs_none = products == dtype and products != torch.float16
    return weight.numel() * 4 if one_needs_none and dtype.itemsize < 4 else 0


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
        self._turned = turning_pays(device.type, products)
        self._direct = chunks == 1 and products == dtype and products != torch.float16
        self._sum_dtype = products if self._direct else torch.promote_types(products, torch.float32)
        # Tiles are for a CPU's cache; a GPU would only get hundreds of small products for them.
        tiled = self._turned or (device.type == "cpu" and products in HALF and not self._direct)
        self._tile = tile or (CPU_TILE if tiled else shape[0])
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
        thin = torch.empty(hidden.shape, dtype=self._products, device=hidden.device)
        torch.mul(hidden, factor[:, None], out=thin)
        # Of the two ways to lay a product out, the one that turns the smaller matrix.
        wide = thin.t().contiguous() if self._turned and thin.shape[0] >= thin.shape[1] else None
        on_gpu = chunk.device.type == "cuda"
        for first in range(0, self._sum.shape[0], self._tile):
            total, part = self._sum[first : first + self._tile], chunk[:, first : first + self._tile]
            if self._turned and self._direct:
                _turned_product(part, thin, wide, total)
            elif self._sum_dtype == self._products:
                torch.mm(part.t(), thin, out=total) if self._empty else total.addmm_(part.t(), thin)
            elif on_gpu and self._empty:
                torch.mm(part.t(), thin, out_dtype=torch.float32, out=total)
            elif on_gpu:
                torch.addmm(total, part.t(), thin, out_dtype=torch.float32, out=total)
            else:
                tile = workspace.take("weight tile", tuple(total.shape), self._products, chunk.device)
                if self._turned:
                    _turned_product(part, thin, wide, tile)
                else:
                    torch.mm(part.t(), thin, out=tile)
                total.copy_(tile) if self._empty else total.add_(tile)
        self._empty = False

    def finish(self) -> Tensor:
        """The sum; zeros if nothing was added."""
        if self._empty:
            return self.result.zero_()
        if self._unit is not None:
            self._sum.mul_(self._unit)
        return self.result if self._sum is self.result else self.result.copy_(self._sum)


def _turned_product(part: Tensor, thin: Tensor, wide: Tensor | None, out: Tensor) -> None:
    """Write part (n, T)^T @ thin (n, H) to out (T, H), by a product of two matrices that are not transposed.

    With wide, which is thin^T in a layout of its own, the product is turned; without, part is.
    """
    (n, width), device = part.shape, part.device
    if wide is None:
        # By way of a copy without gaps: torch turns those blockwise.
        flat = workspace.take("tile to turn", (n, width), part.dtype, device).copy_(part)
        left = workspace.take("turned tile", (width, n), part.dtype, device).copy_(flat.t())
        torch.mm(left, thin, out=out)
    else:
        across = workspace.take("tile to turn", (len(wide), width), part.dtype, device)
        torch.mm(wide, part, out=across)
        out.copy_(across.t())
