"""Adapters of PEFT that `ConvexTrainer` cannot train to what they promise, and what of them needs a word.

They were told by comparing with PEFT's own forward pass (0.21.2) on tiny models in one process on a CPU. Not compared:
LoftQ, Arrow, quantized bases.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from convexlm.adapters import adapter_configs

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

_CHECKPOINTED = "recomputes the forward pass without {}; use `gradient_checkpointing=False`"
_OTHER_FORWARD = {
    "XLORA": "calls the model a second time for the states of its layers",
    "CPT": "needs the logits for a loss of its own",
    "POLY": "needs a `task_ids` with every batch",
    "MULTITASK_PROMPT_TUNING": "needs a `task_ids` with every batch",
}


def refuse_adapters(model: Any, *, flat: bool, left: bool, checkpointing: bool, router_loss: bool, best: bool) -> None:
    """Refuse adapters whose training would not be what they promise, and say what of them PEFT leaves to the user.

    Args:
        model: the model, wrapped by PEFT or not.
        flat: batches are packed or padding-free.
        left: batches are padded on the left.
        checkpointing: activations are computed anew in the backward pass.
        router_loss: the model's experts have a loss of their own.
        best: the best checkpoint is loaded in the end.

    Raises:
        ValueError: there is such an adapter; one line with the reason and what to do instead.
    """
    if type(model).__name__ == "PeftMixedModel":
        raise ValueError("a PeftMixedModel (adapters of several kinds) is not supported; train adapters of one kind")
    for config in adapter_configs(model):
        kind = kind_of(config)
        for reason in _reasons(config, kind, flat, left, checkpointing, router_loss):
            raise ValueError(f"adapters of the kind {kind}: PEFT {reason}")
        if best and (other := other_when_loaded(config)):
            raise ValueError(f"`load_best_model_at_end` would give another model: {other}")
        for said in _left_to_the_user(config, kind):
            logger.warning("adapters of the kind %s: %s", kind, said)


def _reasons(config: Any, kind: str, flat: bool, left: bool, checkpointing: bool, router_loss: bool) -> Iterator[str]:
    if kind in _OTHER_FORWARD:
        yield f"{_OTHER_FORWARD[kind]}, which is not supported here"
    if config.is_prompt_learning and (flat or left):
        mended = "`packing=False` and `padding_free=False`" if flat else "`padding_side='right'`"
        yield f"drops the `position_ids` that say where a record begins, for its virtual tokens; use {mended}"
    if kind in ("PREFIX_TUNING", "CARTRIDGE") and checkpointing:
        yield _CHECKPOINTED.format("the keys and values that it puts before the tokens")
    if kind in ("PREFIX_TUNING", "CARTRIDGE") and router_loss:
        yield "counts its virtual tokens in the attention mask, which the router's loss takes; leave that loss out"
    if getattr(config, "alora_invocation_tokens", None) and flat:
        yield (
            "looks for `alora_invocation_tokens` once a row, so of several records in a row all but one are trained "
            "as the base model; use `packing=False` and `padding_free=False`"
        )
    if kind == "LILY":
        yield (
            "averages over all tokens of a batch to choose its experts, so a token would see those after it and the "
            "other records; take another adapter"
        )
    if kind == "SHADOW" and config.auxiliary_loss_weight:
        yield (
            "adds a loss of its own to every micro-batch, whatever its size, so the gradient would depend on how the "
            "batch is split; use `auxiliary_loss_weight=0`"
        )
    if (getattr(config, "monteclora_config", None) or getattr(config, "generator_seed", None)) and checkpointing:
        yield _CHECKPOINTED.format("rewinding the adapter's own random numbers")
    if reason := not_to_be_repeated(config):
        yield f"{reason}; use another `init_lora_weights`, such as `pissa` or `true`"


def kind_of(config: Any) -> str:
    """`LORA`, ..."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def not_to_be_repeated(config: Any) -> str | None:
    """Why a checkpoint of this adapter would be loaded onto another base than it was trained on; None if it is not.

    Its beginning is taken out of the base's weights, and comes out otherwise when that is done again.
    """
    started = getattr(config, "init_lora_weights", None)
    if started == "lora_ga" or str(started).startswith("pissa_niter"):
        return (
            f"takes the beginning of `init_lora_weights={started!r}` out of the base model, otherwise at every loading"
        )
    return None


def other_when_loaded(config: Any) -> str | None:
    """Why the adapter of a checkpoint, put back into the model in training, is another than was saved; None if not."""
    if kind_of(config) == "P_TUNING":
        return "PEFT saves what the encoder of P-tuning gives out, and puts it back as what goes in"
    if getattr(config, "prefix_projection", False):
        return "PEFT saves what the projection of the prefix gives out, and has no place for it in training"
    return None


def other_when_resumed(model: Any) -> str | None:
    """Why a resumed training would not be the undisturbed one; None if nothing is known."""
    for config in adapter_configs(model):
        if reason := other_when_loaded(config):
            return reason
        if getattr(config, "monteclora_config", None):
            return "PEFT does not save the random numbers that MonteCLoRA keeps"
        velora = getattr(config, "velora_config", None)
        if velora is not None and getattr(velora, "init_type", None) == "batch_average_once":
            return "PEFT does not save the projection that VeLoRA takes from the first batch"
    return None


def _left_to_the_user(config: Any, kind: str) -> Iterator[str]:
    if kind == "ADALORA":
        yield (
            "nobody calls `update_and_allocate`, so every rank stays `init_r` unless a callback of yours does; what "
            "it sums up is not saved, so do not resume then"
        )
    if kind == "ADAMSS" and getattr(config, "use_asa", False):
        yield "nobody calls `update_and_allocate`, so `use_asa` does nothing unless a callback of yours does"
    if getattr(config, "kasa_config", None):
        yield "KaSA's own loss (`_get_kasa_loss`) is not added, as in TRL"
    if getattr(config, "monteclora_config", None):
        yield "MonteCLoRA's own loss (`_get_monteclora_loss`) is not added, as in TRL"
