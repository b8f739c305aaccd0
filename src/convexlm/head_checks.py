"""What `fused_objective` takes. All functions raise ValueError, in one line, for what does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def check_transform(logit_scale: float, logit_softcap: float | None) -> None:
    """A finite factor other than 0, and a finite cap above 0 or none, or ValueError."""
    if not (isinstance(logit_scale, (int, float)) and 0 < abs(logit_scale) < float("inf")):
        raise ValueError(f"logit_scale must be a finite number other than 0, not {logit_scale!r}")
    if logit_softcap is not None and not 0 < logit_softcap < float("inf"):
        raise ValueError(f"logit_softcap must be a finite number above 0, not {logit_softcap!r}")


def check_batch(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    sample_weights: Tensor | None,
    chunk_tokens: int | None,
    vocab_chunk: int | None,
) -> None:
    """Shapes, dtypes, devices and sizes of `fused_objective`'s arguments, or ValueError."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be (N, H) and weight (V, H), not {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"hidden and weight must be floating, not {hidden.dtype} and {weight.dtype}")
    for name, x in (("labels", labels), ("sequence_ids", ids), ("sample_weights", sample_weights)):
        if x is None:
            continue
        if x.shape != hidden.shape[:1]:
            raise ValueError(f"{name} must be ({hidden.shape[0]},), not {tuple(x.shape)}")
        if name != "sample_weights" and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
            raise ValueError(f"{name} must be integers, not {x.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), not {tuple(bias.shape)}")
    devices = {x.device for x in (hidden, weight, labels, ids, bias, sample_weights) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, not on {sorted(map(str, devices))}")
    for name, number in (("chunk_tokens", chunk_tokens), ("vocab_chunk", vocab_chunk)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ValueError(f"{name} must be an integer of at least 1, not {number!r}")
