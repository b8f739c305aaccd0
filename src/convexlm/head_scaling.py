"""The upstream gradient's factor on the gradients that the fused head has formed.

In training that factor is nearly always 1, but on a GPU nobody can look at it without waiting for the device. So a
kernel looks there and leaves the memory alone; a product by 1 reads and writes all of it, and takes as much again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from convexlm.head_tiles import triton_is_installed

if TYPE_CHECKING:
    from torch import Tensor


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Scale x by factor, a 0-d tensor; on a GPU in the memory of x, in a backward pass whose graph is freed after it.

    Args:
        x: floating, any shape; not to be used afterwards.
        factor: on the device of x.
    """
    if x.device.type == "cuda" and not _graph_is_kept() and triton_is_installed():
        from convexlm.head_triton import can_scale, scale_

        if can_scale(x.device) and x.is_contiguous() and x.dtype != torch.float64:
            return scale_(x, factor)
    return x * factor.to(x.dtype)


def _graph_is_kept() -> bool:
    """Whether the gradients may be asked for again (`retain_graph=True`); True where torch does not tell."""
    asked: Any = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    try:
        return True if asked is None else bool(asked())
    except RuntimeError:  # outside a backward pass
        return True
