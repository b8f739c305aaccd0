"""Whether a model is a causal one: asked of the model itself, before its first step.

In a model that sees the tokens after a position (an encoder-decoder fed with its own targets, an encoder with an
output layer) the next token's log-probability is no prediction. Its loss falls towards 0, and nothing fails.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import torch

from convexlm.probing import LENGTH, is_whole, two_records, untouched
from convexlm.record_separation import HALF_TOLERANCE, TOLERANCE

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)


def refuse_other_models(model: Any) -> None:
    """Refuse a model whose class or config says that it is no causal language model.

    Args:
        model: wrapped by PEFT or not.

    Raises:
        ValueError: it is none.
    """
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    if getattr(model, "generation_config", None) is None:
        raise ValueError(f"{kind} generates no text; give a causal language model, as AutoModelForCausalLM loads it")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{kind} is an encoder-decoder, which is not supported: the tokens of a row would go into its encoder "
            "too, whose states tell the targets; give a causal language model, as AutoModelForCausalLM loads it"
        )


def refuse_looking_ahead(trainer: Any, model: Any) -> None:
    """Refuse a model whose states depend on later tokens.

    Where the weights are spread over processes or not there yet (ZeRO-3, FSDP, meta) it cannot be asked.

    Args:
        trainer: any Trainer, after its `accelerator` is set.
        model: the causal model, not wrapped by PEFT.

    Raises:
        ValueError: they do.
    """
    if not is_whole(trainer, model):
        return
    try:
        ahead = looks_ahead(model, trainer.accelerator.autocast)
    except Exception as error:  # of a model's own code; training will tell what is wrong with it
        logger.warning(
            "could not run %s on two short rows to see that it is causal (%s: %s)",
            *(type(model).__name__, type(error).__name__, str(error).split("\n")[0]),
        )
        return
    if ahead:
        raise ValueError(
            f"this model ({model.config.model_type}, {type(model).__name__}) is not causal: its states depend on the "
            "tokens after them, the targets; take a causal language model (some are made one by `is_decoder=True` in "
            "their config)"
        )


def looks_ahead(
    model: Any, autocast: Callable[[], Any] = contextlib.nullcontext, device: torch.device | None = None
) -> bool:
    """Whether a model's states depend on the tokens after them.

    One forward pass of the backbone, in evaluation mode and without gradients, over two rows that begin alike. Random
    numbers, buffers, gradients and the modules' modes stay as they are.

    Args:
        model: a model of transformers with a backbone.
        autocast: the context that training runs the model in.
        device: where inputs go; the embeddings' device if None.
    """
    first, second = two_records(model.config.get_text_config())
    ids = torch.tensor([first + second, first + first], device=device or model.get_input_embeddings().weight.device)
    with untouched(model), torch.no_grad(), autocast():
        states = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        half = torch.is_autocast_enabled(ids.device.type) or model.dtype in (torch.float16, torch.bfloat16)
    one, other = states.last_hidden_state[:, :LENGTH].double()
    # What is usual: an expert chosen otherwise, for a near tie, changes single positions.
    apart = ((one - other).norm(dim=-1) / one.norm(dim=-1).clamp(min=1e-30)).median()
    return bool(apart > (HALF_TOLERANCE if half else TOLERANCE))
