"""Whether a model keeps the records of one row apart: asked of the model itself, before it is trained on such rows.

Packed and padding-free batches say where a record begins in `position_ids` (and, for flash attention and layers with a
state, in `cu_seq_lens_q` and `seq_idx`). Families of models whose backbone does not hand them on to its mask let every
record attend to those before it, and nothing fails.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import logging
import re
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import torch

from convexlm.collator import ATTENTION_LAYERS, ROW
from convexlm.errors import first_line
from convexlm.probing import LENGTH, is_whole, two_records, untouched

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

# Of a state's norm. Records that are kept apart differ by the rounding of sums in another order.
TOLERANCE, HALF_TOLERANCE = 1e-3, 3e-2
POSITIONS = "position_ids"
MASK_FUNCTION = re.compile(r"create_\w*(causal|sliding|chunked)\w*mask|mask_function")


def refuse_mixing(trainer: Any, model: Any) -> None:
    """Refuse a model that does not keep the records of the trainer's packed or padding-free rows apart.

    Where the weights are spread over processes or not there yet (ZeRO-3, FSDP, meta), the backbone's source is asked
    in place of the model, and a log line says so.

    Args:
        trainer: after its `data_collator` is set.
        model: the causal model, not wrapped by PEFT.

    Raises:
        ValueError: records would see each other.
    """
    separates = separates_in_its_source(model)
    if is_whole(trainer, model):
        try:
            separates = separates_records(model, trainer.data_collator, trainer.accelerator.autocast)
        except Exception as error:  # of a model's own code; training will tell what is wrong with it
            if isinstance(error, ValueError) and "packed sequences apart" in str(error):
                # transformers' own word for a layer whose package is missing, which it would say at the first step.
                raise ValueError(f"{first_line(error)}; or use {_without(trainer.args)}") from None
            logger.warning(
                "could not run %s on packed records to see that they are kept apart (%s: %s); its source was read",
                *(type(model).__name__, type(error).__name__, str(error).split("\n")[0]),
            )
    elif trainer.accelerator.is_main_process:
        logger.warning(
            "the weights are spread over processes, so whether %s keeps packed records apart was read from its source",
            type(model).__name__,
        )
    if not separates:
        raise ValueError(
            f"this model's attention ({model.config.model_type}, {_attention(model)}) does not separate packed "
            f"records: each would see those before it in its row; use {_without(trainer.args)}"
        )


def _without(args: Any) -> str:
    return " and ".join(f"`{name}=False`" for name in ("packing", "padding_free") if getattr(args, name))


def separates_records(
    model: Any, collator: Any, autocast: Callable[[], Any] = contextlib.nullcontext, device: Any = None
) -> bool:
    """Whether a record's states do not depend on what stands before it in its row.

    One forward pass of the backbone, in evaluation mode and without gradients, over a row that holds the same record
    first and last. Random numbers, buffers, gradients and the modules' modes stay as they are.

    Args:
        model: a causal model of transformers.
        collator: the `ConvexCollator` that makes the rows.
        autocast: the context that training runs the model in.
        device: where inputs go; the embeddings' device if None.
    """
    record, between = two_records(model.config.get_text_config())
    sequences = [record, between, record]
    if collator.packed_rows:
        ids = [token for sequence in sequences for token in sequence]
        examples: list[dict[str, Any]] = [{"input_ids": ids, "labels": ids, "seq_lengths": [LENGTH] * 3}]
    else:
        examples = [{"input_ids": ids, "labels": ids} for ids in sequences]
    batch = collator(examples)
    device = device or model.get_input_embeddings().weight.device
    inputs = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key not in ("labels", ROW)
    }
    with untouched(model), torch.no_grad(), autocast():
        states = model.base_model(**inputs, use_cache=False).last_hidden_state[0]
        half = torch.is_autocast_enabled(states.device.type) or model.dtype in (torch.float16, torch.bfloat16)
    first, last = states[:LENGTH].double(), states[2 * LENGTH : 3 * LENGTH].double()
    error = ((first - last).norm(dim=-1) / first.norm(dim=-1).clamp(min=1e-30)).max()
    if half and TOLERANCE < error <= HALF_TOLERANCE:
        return separates_in_its_source(model)  # rounding, or a fresh model in which little is attended to
    return bool(error <= TOLERANCE)


def _attention(model: Any) -> str:
    return getattr(model.config.get_text_config(), "_attn_implementation", None) or "eager"


def separates_in_its_source(model: Any) -> bool:
    """Whether the code of a model's backbone hands on where records begin, as far as reading it tells.

    That is `position_ids` to each mask that it makes, and `seq_idx` or `cu_seq_lens_q` to layers other than attention.
    Flash attention takes `position_ids` in its layers.

    Args:
        model: a causal model of transformers.
    """
    module = sys.modules.get(type(model.base_model).__module__)
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    code = _source(module)
    if not kinds <= ATTENTION_LAYERS and "seq_idx" not in code and "cu_seq_lens" not in code:
        return False
    if "flash" in _attention(model):
        return True
    nodes = list(ast.walk(ast.parse(textwrap.dedent(_source(inspect.unwrap(type(model.base_model).forward))))))
    # What is shared between masks is one dictionary, handed on as `**mask_kwargs`.
    dictionaries = [node for node in nodes if isinstance(node, ast.Dict)]
    shared = any(isinstance(key, ast.Constant) and key.value == POSITIONS for one in dictionaries for key in one.keys)
    masks = [
        node
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and MASK_FUNCTION.fullmatch(node.func.id)
    ]
    names = [{keyword.arg for keyword in mask.keywords} for mask in masks]
    return bool(names) and all(POSITIONS in given or (None in given and shared) for given in names)


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""
