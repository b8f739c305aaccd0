"""Base weights that bitsandbytes quantized, while an adapter is trained on them and after."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from convexlm.checkpoints import read_marker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn


def bits_trained_on(checkpoint: Path) -> int | None:
    """In how many bits (4 or 8) the base weights were that a checkpoint's adapter was trained on; None: unquantized.

    Decoding, merging and scoring put the adapter on the base's own weights, which are slightly others.
    """
    training = read_marker(checkpoint).get("training")
    given = training if isinstance(training, dict) else {}
    return next((bits for bits in (4, 8) if given.get(f"load_in_{bits}bit") is True), None)


def keep_gradients(model: Any) -> None:
    """Have 4-bit weights on a CPU stay in the form that passes gradients on.

    On a CPU with AVX512-BF16, bitsandbytes (0.50) packs them in the first forward pass in evaluation mode, for a
    kernel without a backward pass. Training after an evaluation would then leave every layer below without a gradient
    until the next checkpoint is saved, and say nothing but a warning of torch's.

    Args:
        model: any model, quantized or not.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def kept_dtypes(model: nn.Module) -> Iterator[None]:
    """What is trained has the dtype afterwards that it had before.

    TRL trains adapters on quantized weights in bfloat16; PEFT loads them from a checkpoint as new ones, in float32.
    """
    before = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != before.get(name, parameter.dtype):
            parameter.data = parameter.data.to(before[name])
