"""A look at a model before its first step: a short row of tokens, and a way to run it that leaves no trace."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

LENGTH = 6


def two_records(config: Any) -> tuple[list[int], list[int]]:
    """Two records of `LENGTH` different tokens from all over the vocabulary, none of them special.

    Args:
        config: the model's text config.
    """
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    special = {token for one in special for token in (one if isinstance(one, (list, tuple)) else [one])}
    step = max(1, config.vocab_size // (2 * LENGTH + 8))
    ids = [token for token in range(step, config.vocab_size, step) if token not in special]
    ids = (ids * LENGTH)[: 2 * LENGTH]
    return ids[:LENGTH], ids[LENGTH:]


@contextlib.contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Evaluation mode, after which modes, buffers and random numbers are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {buffer.device for buffer in model.parameters() if buffer.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def is_whole(trainer: Any, model: Any) -> bool:
    """Whether the model can be run by itself: its weights are not spread over processes, and there already."""
    spread = trainer.is_fsdp_enabled or any(
        hasattr(parameter, "ds_id") or hasattr(parameter, "placements") or parameter.device.type == "meta"
        for parameter in model.parameters()
    )
    return not spread
