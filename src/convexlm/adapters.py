"""What PEFT adds to a loss; and merging an adapter into its base model.

The merged model computes what the two did together.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator


def adapter_configs(model: Any) -> list[Any]:
    """The configs of a model's adapters; empty without any."""
    configs = getattr(model, "peft_config", None)
    return list(configs.values()) if isinstance(configs, dict) else []


@contextlib.contextmanager
def regularised_in_parts(model: Any, parts: int) -> Iterator[None]:
    """AdaLoRA adds its regulariser to the loss of every forward pass: in here one part of it, so that all add it once.

    Args:
        model: the model, wrapped by PEFT or not.
        parts: how many passes make a step, those of other processes included.
    """
    weights = [(one, one.orth_reg_weight) for one in adapter_configs(model) if hasattr(one, "orth_reg_weight")]
    try:
        for config, weight in weights:
            config.orth_reg_weight = weight / parts
        yield
    finally:
        for config, weight in weights:
            config.orth_reg_weight = weight


def show_forward(wrapped: Any, base: Any) -> None:
    """Let an adapter that kept the forward pass of its model's class go through the model's own (AdaptionPrompt).

    Args:
        wrapped: the model, wrapped by PEFT or not.
        base: what is wrapped, whose `forward` has been changed since.
    """
    inner = getattr(wrapped, "base_model", None)
    if inner is not None and inner is not base and "forward" in vars(inner):
        inner.forward = base.forward


def merge_adapter(model: Any) -> Any:
    """The base model with the adapter's weights added to its own.

    PEFT adds an update to a weight in place. Where input and output embeddings are one tensor and one of them is
    adapted, that would change the other, too; so each gets a tensor of its own, and the config says so.

    Args:
        model: a `PeftModel`; it is used up.

    Raises:
        UserError: an adapted layer shares its weight with a layer that no config can untie it from, or the adapter is
            made of virtual tokens.
        ValueError: the adapter holds numbers that are not finite.
    """
    if model.active_peft_config.is_prompt_learning:
        raise UserError(f"the adapter cannot be merged: {model.active_peft_config.peft_type} has no weights to add")
    _untie(model.get_base_model())
    merged = model.merge_and_unload(safe_merge=True)
    inner, outer = embeddings_of(merged)
    # An embedding that was trained as a whole (`modules_to_save`) has left its twin, too.
    if inner is not None and outer is not None and inner.weight is not outer.weight:
        say_untied(merged)
    return merged


def _untie(base: Any) -> None:
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    holders: dict[int, list[tuple[str, Any]]] = defaultdict(list)
    for name, module in base.named_modules():
        if (weight := module._parameters.get("weight")) is not None:
            holders[id(weight)].append((name, module))
    embeddings = [layer for layer in embeddings_of(base) if layer is not None]
    # Tokens that are trained for both sides at once replace rows of the tied tensor for both, in training as well.
    both = [one for one in base.modules() if isinstance(one, TrainableTokensLayer) and one.tied_adapter is not None]
    shared = {id(one) for one in both} | {id(one.tied_adapter) for one in both}
    for name, layer in base.named_modules():
        if not isinstance(layer, BaseTunerLayer) or id(layer) in shared:
            continue
        own: Any = layer.get_base_layer()
        if (weight := own._parameters.get("weight")) is None:
            continue
        others = [(twin, module) for twin, module in holders[id(weight)] if module is not own]
        if not others:
            continue
        if any(module not in embeddings for module in (own, *(module for _, module in others))):
            raise UserError(
                f"the adapter cannot be merged: `{name}` shares its weight with `{others[0][0]}`, which would change, "
                "too; keep the adapter beside its base model"
            )
        say_untied(base)
        holders[id(weight)] = others
        own.weight = type(weight)(weight.detach().clone(), requires_grad=weight.requires_grad)


def embeddings_of(model: Any) -> tuple[Any, Any]:
    """The modules of the input and the output embedding, without what PEFT puts around them; None if there is none."""
    found = []
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            layer = get()
        except (NotImplementedError, AttributeError):
            layer = None
        while layer is not None and (inside := _inside(layer)) is not None:
            layer = inside
        found.append(layer)
    return found[0], found[1]


def _inside(layer: Any) -> Any:
    return next(
        (
            layer._modules[name]
            for name in ("base_layer", "original_module", "token_adapter")
            if layer._modules.get(name) is not None
        ),
        None,
    )


def say_untied(model: Any) -> None:
    """Have the config say that input and output embedding are two tensors."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
