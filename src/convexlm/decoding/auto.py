"""`--backend auto`: which backend, and why."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any

from convexlm.decoding.checkpoint import is_adapter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from convexlm.decoding.search import Search

CONVERTED = ("llama",)
"""Model types whose conversion to CTranslate2 our tests hold to the same hypotheses."""


def choose_backend(
    checkpoint: Path, searches: Sequence[Search], device: str, dtype: str | None, compute_type: str | None
) -> tuple[str, str]:
    """The backend that is likely to be the faster one and does exactly what is asked for.

    On the CPU that is `ctranslate2` (mostly: `results/decoding.md` has a model for which `hf` is), else
    `hf`. `vllm` is never chosen: it was not run on a GPU by us.

    Args:
        checkpoint: a folder that `check_checkpoint` accepts.
        searches: all searches that it will do.
        device: a torch device name.
        dtype: what the user asked for, if anything.
        compute_type: what the user asked for, if anything.

    Returns:
        The backend's name, and the reason as the end of a sentence.
    """
    if compute_type is not None:
        return "ctranslate2", f"only it has a compute_type ({compute_type})"
    if device != "cpu":
        return "hf", f"the device is {device}"
    if dtype not in (None, "auto", "float32"):
        return "hf", f"on the CPU, ctranslate2 does not compute in {dtype}"
    if is_adapter(checkpoint):
        return "hf", "the checkpoint is an adapter, which ctranslate2 would have to merge into its base model"
    config = _config(checkpoint)
    kind = config.get("model_type", "unknown")
    if kind not in CONVERTED:
        return "hf", f"ctranslate2 was tested with {', '.join(CONVERTED)}, and this model is of type {kind}"
    if setting := _not_converted(config):
        return "hf", f"ctranslate2 computes another model of one with the {setting}"
    if importlib.util.find_spec("ctranslate2") is None:
        return (
            "hf",
            "ctranslate2, which is often faster on a CPU, is not installed (pip install 'convexlm[ctranslate2]')",
        )
    from convexlm.decoding.backends.ctranslate2 import why_not

    for search in searches:
        if reason := why_not(search):
            return "hf", f"ctranslate2, which is often faster on a CPU, {reason}"
    return (
        "ctranslate2",
        "on a CPU it is often the faster one, which depends on model and processor, and can do all that is asked",
    )


def _config(checkpoint: Path) -> dict[str, Any]:
    try:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _not_converted(config: dict[str, Any]) -> str:
    """The setting of a Llama that CTranslate2 4.8 does otherwise (it would be refused); empty if none."""
    from convexlm.decoding.backends.ctranslate2 import ROPE_TYPES

    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        return f"position angles {kind}"
    if config.get("hidden_act", "silu") != "silu":
        return f"activation {config['hidden_act']}"
    size, heads, own = (config.get(name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    return f"head_dim {own}" if size and heads and own and own * heads != size else ""
