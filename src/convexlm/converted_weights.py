"""Checkpoints whose weights have other names than the model's: experts, which transformers writes one by one.

transformers saves a model in the format of the hub, and joins experts into one tensor as it loads. Its Trainer reads
the file's own names into the model instead (huggingface/transformers#48805): what has another name stays as it was.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def has_other_names(model: Any, folder: str | Path) -> bool:
    """Whether some of a model's weights are not in a checkpoint under their own names.

    Args:
        model: the model, as it is trained.
        folder: the checkpoint; one without safetensors of a whole model has no names that are known here.
    """
    single, index = Path(folder) / SAFE_WEIGHTS_NAME, Path(folder) / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file():
        with safe_open(single, "pt") as file:
            names = set(file.keys())
    elif index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    else:
        return False
    return bool(set(model.state_dict()) - set(_tied(model)) - names)


def load_as_transformers_does(model: Any, folder: str | Path) -> None:
    """Read a checkpoint into a model as `from_pretrained` reads it, by way of another model in the main memory.

    Args:
        model: a model of transformers, not wrapped by PEFT.
        folder: the checkpoint.

    Raises:
        ValueError: some of the model's weights are not in it.
    """
    # The widest, for a weight's number must not be rounded on its way.
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in model.parameters() if x.is_floating_point()))
    loaded, found = type(model).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if missing := sorted(set(found["missing_keys"]) - set(_tied(model))):
        raise ValueError(f"{folder}: {len(missing)} weights of the model are not in it, such as `{missing[0]}`")
    model.load_state_dict(loaded.state_dict())


def _tied(model: Any) -> dict[str, str]:
    return getattr(model, "all_tied_weights_keys", None) or {}
