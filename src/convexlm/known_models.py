"""Shapes of well-known models, so that a dry run knows their memory without asking the hub. No weights are here.

Only what decides sizes is listed. `find_config` prefers a model's own config, from a folder or the hub's cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convexlm.errors import UserError

_LLAMA = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-13b": {
        **_LLAMA,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    "llama-3.1-8b": {
        **_LLAMA,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}

NAMES = {
    "huggyllama/llama-7b": "llama-7b",
    "huggyllama/llama-13b": "llama-13b",
    "meta-llama/Llama-2-7b-hf": "llama-7b",
    "meta-llama/Llama-2-13b-hf": "llama-13b",
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-8B-Base": "qwen3-8b",
}
"""Hub names of models that have these shapes."""


def find_config(name: str | Path) -> tuple[Any, str]:
    """A model's config without asking the hub, and where it is from.

    Args:
        name: a folder, a hub name, or one of `SHAPES`.

    Returns:
        The config and "its config.json", "the hub's cache" or "a table of known shapes"; (None, reason) if the
        config is not at hand.

    Raises:
        UserError: there is a folder of that name whose config cannot be read.
    """
    from transformers import AutoConfig

    path = Path(name)
    if path.exists():
        try:
            return AutoConfig.from_pretrained(str(path)), "its config.json"
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{name}: its config cannot be read ({str(error).split(chr(10))[0]})") from None
    shape = SHAPES.get(NAMES.get(str(name), str(name)))
    try:
        return AutoConfig.from_pretrained(str(name), local_files_only=True), "the hub's cache"
    except (OSError, ValueError, KeyError):
        pass
    if shape is None:
        return None, "its config is not at hand, and a dry run does not ask the hub"
    values = dict(shape)
    return AutoConfig.for_model(values.pop("model_type"), **values), "a table of known shapes"
