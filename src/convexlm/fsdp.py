"""What FSDP asks of a trainer: what it cannot train or save, and weights that it would tie, or leave gathered.

Told by runs of two processes on the CPU against runs of one (FSDP2; accelerate 1.15, torch 2.13).
"""

from __future__ import annotations

import os
from typing import Any

from convexlm.adapters import adapter_configs, embeddings_of, say_untied

# accelerate gives a built optimizer other parameters. What these have made by then stays with the old ones (Adagrad),
# or their step takes means over rows that no process has whole (Adafactor).
_NOT_SHARDED = ("adagrad", "adafactor")


def asks_for_fsdp(args: Any) -> bool:
    """Whether training options, or the launcher of this process, ask for FSDP."""
    if getattr(args, "fsdp", None):  # --fsdp, of transformers
        return True
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def saves_whole_states(args: Any) -> bool:
    """Whether FSDP, which is asked for, is to save whole states, and not every process its part."""
    told = getattr(args, "fsdp_plugin_args", None) or {}
    version = str(told.get("fsdp_version") or os.environ.get("FSDP_VERSION", "1"))
    usual = "FULL_STATE_DICT" if version == "1" else "SHARDED_STATE_DICT"  # accelerate's own
    kind = told.get("state_dict_type") or os.environ.get("FSDP_STATE_DICT_TYPE", usual)
    return "FULL_STATE_DICT" in str(kind).upper() or str(kind) == "1"


def optimizer_not_sharded(args: Any, *, under_fsdp: bool | None = None) -> str | None:
    """Why the optimizer of these options does not go with FSDP; None if it does, or there is no FSDP.

    Args:
        args: the training options.
        under_fsdp: whether there will be; by default, whether they or the launcher of this process ask for it.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if name in _NOT_SHARDED and (asks_for_fsdp(args) if under_fsdp is None else under_fsdp):
        return f"`optim` {name} does not go with FSDP, which shards its state; take adamw_torch, or leave FSDP out"
    return None


def refuse_adapters_under_fsdp(model: Any, *, whole_states: bool) -> None:
    """Refuse adapters that FSDP would train to another model, or save so that nothing can be made of it.

    Args:
        model: the model, wrapped by PEFT or not.
        whole_states: FSDP saves whole states (`FULL_STATE_DICT`).

    Raises:
        ValueError: there is such an adapter; one line with the reason and what to do instead.
    """
    for config in adapter_configs(model):
        if not whole_states:
            raise ValueError(
                "an adapter under FSDP with SHARDED_STATE_DICT: the checkpoints would hold neither its config nor its "
                "weights as PEFT reads them; set `fsdp_state_dict_type: FULL_STATE_DICT`, as in `fsdp2`"
            )
        inner, outer = embeddings_of(model.get_base_model())
        if inner is None or outer is None or inner.weight is not outer.weight:
            continue
        tokens = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None)
        for name, given in (
            ("ensure_weight_tying", getattr(config, "ensure_weight_tying", False)),
            ("trainable_token_indices", tokens),
        ):
            if given:
                raise ValueError(
                    f"`{name}` on a model whose input and output embedding are one tensor: FSDP shards what PEFT ties "
                    "to it apart; leave it out, or train in one process or under DDP"
                )


def untie_trained_copies(model: Any) -> None:
    """Give input and output embedding tensors of their own where an adapter trains a copy of one of them.

    PEFT then trains the copy, and the other stays as it was. accelerate ties the two anew while it shards
    (`fsdp2_prepare_model`), so the other would become the copy.

    Args:
        model: the model, wrapped by PEFT or not.
    """
    if not adapter_configs(model):
        return
    base = model.get_base_model()
    wrapped = [layer for layer in (base.get_input_embeddings(), base.get_output_embeddings()) if layer is not None]
    if all(layer._modules.get("original_module") is None for layer in wrapped):
        return
    inner, outer = embeddings_of(base)
    if inner is None or outer is None:
        return
    if inner.weight is outer.weight:
        weight = outer.weight
        outer.weight = type(weight)(weight.detach().clone(), requires_grad=weight.requires_grad)
    say_untied(base)
    base.all_tied_weights_keys = {}


def reshard(model: Any) -> None:
    """Have every part of a model that FSDP2 shards be sharded, as loading needs it.

    The last ones to run in a forward pass stay gathered, for a backward pass that does not come after an evaluation.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
