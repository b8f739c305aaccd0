"""The layout of a batch for an objective: which sequence a token belongs to, its sample weight, the denominator.

Only torch is needed here. All functions raise ValueError for what cannot be a batch.
"""

from __future__ import annotations

import math
import sys
from numbers import Real
from typing import Any

import torch
from torch import Tensor

_LARGEST = sys.float_info.max


def check_number(name: str, value: Any, low: float, high: float = math.inf, hint: str = "") -> float:
    """The value, if it is a finite number in [low, high]; else ValueError."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= min(high, _LARGEST):
        bounds = f"in [{low:g}, {high:g}]" if high < math.inf else f"of at least {low:g}"
        raise ValueError(f"{name} must be a finite number {bounds}, not {value!r}{hint}")
    return float(value)


def check_inputs(log_probs: Tensor, mask: Tensor, sequence_ids: Tensor | None) -> None:
    """The shapes and dtypes that `Objective.__call__` takes, or ValueError."""
    if log_probs.dim() not in (1, 2) or not log_probs.is_floating_point():
        raise ValueError(
            f"log_probs must be floating, (batch, length) or (N,), not {log_probs.dtype} {tuple(log_probs.shape)}"
        )
    if mask.shape != log_probs.shape or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool {tuple(log_probs.shape)}, not {mask.dtype} {tuple(mask.shape)}")
    if sequence_ids is None:
        return
    if sequence_ids.shape != log_probs.shape:
        raise ValueError(f"sequence_ids must be {tuple(log_probs.shape)}, not {tuple(sequence_ids.shape)}")
    if sequence_ids.is_floating_point() or sequence_ids.is_complex() or sequence_ids.dtype == torch.bool:
        raise ValueError(f"sequence_ids must be integers, not {sequence_ids.dtype}")


def number_sequences(mask: Tensor, sequence_ids: Tensor | None) -> tuple[Tensor, int]:
    """The sequence number of every token, flat, in order of first appearance, and how many there are (S).

    Masked tokens get the number S, the slot of what is thrown away.
    """
    flat_mask = mask.flatten()
    batch = mask.shape[0] if mask.dim() == 2 else 1
    rows = torch.arange(batch, device=mask.device)[:, None].expand(mask.shape if mask.dim() == 2 else (1, len(mask)))
    rows = rows.flatten()
    if sequence_ids is None:
        return torch.where(flat_mask, rows, batch), batch
    places = flat_mask.nonzero().squeeze(-1)
    ids = sequence_ids.flatten()[places].long()
    ids = ids.unique(return_inverse=True)[1]  # small and not negative, so that (row, id) fits one integer
    keys, numbers = (rows[places] * (len(places) + 1) + ids).unique(return_inverse=True)
    positions = torch.arange(len(places), device=mask.device)
    first = positions.new_full((len(keys),), len(places)).scatter_reduce(0, numbers, positions, "amin")
    rank = torch.empty_like(first)
    rank[first.argsort()] = torch.arange(len(keys), device=mask.device)
    segments = rows.new_full(flat_mask.shape, len(keys))
    segments[places] = rank[numbers]
    return segments, len(keys)


def spread_sample_weights(
    sample_weights: Tensor, mask: Tensor, segments: Tensor, count: int, has_ids: bool, dtype: torch.dtype
) -> Tensor:
    """The sample weight of every token, flat; anything at masked places. ValueError if they are no such weights."""
    given = torch.as_tensor(sample_weights, device=mask.device).detach().to(dtype)
    if given.shape == mask.shape:
        flat = given.flatten()
        relevant = flat[mask.flatten()]
    elif not has_ids and given.shape == (count,):
        flat = (given[:, None] if mask.dim() == 2 else given).expand(mask.shape).flatten()
        relevant = given
    else:
        wanted = str(tuple(mask.shape)) if has_ids else f"({count},) or {tuple(mask.shape)}"
        raise ValueError(f"sample_weights must be {wanted}, not {tuple(given.shape)}")
    if not bool((relevant.isfinite() & (relevant >= 0)).all()):
        raise ValueError("sample_weights must be finite and not negative")
    low = flat.new_full((count + 1,), math.inf).scatter_reduce(0, segments, flat, "amin")[:count]
    high = flat.new_full((count + 1,), -math.inf).scatter_reduce(0, segments, flat, "amax")[:count]
    if bool((low < high).any()):
        raise ValueError("sample_weights differ within a sequence; a weight belongs to a whole sequence")
    return flat


def denominator(normalizer: float | Tensor | None, own: Tensor) -> Tensor:
    """What the sum is divided by. Nothing over nothing is 0; 0 for a batch with targets shows as an infinite loss."""
    number = own
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must have one element, not shape {tuple(normalizer.shape)}")
        if normalizer.device.type == "cpu":  # elsewhere looking at it would stall the device
            check_number("normalizer", normalizer.item(), 0)
        number = normalizer.detach().to(own).reshape(())
    elif normalizer is not None:
        number = own.new_tensor(check_number("normalizer", normalizer, 0))
    return torch.where((number == 0) & (own == 0), 1.0, number)
