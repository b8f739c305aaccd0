"""The config of a new model that a recipe spells out, and whether transformers can make a model of it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.options import did_you_mean

if TYPE_CHECKING:
    from convexlm.recipe import Recipe


def spelled_config(recipe: Recipe) -> Any:
    """The config of a new model that a recipe spells out; None where it starts from one that there is.

    Raises:
        UserError: transformers can make no config of it, or no causal language model of the config.
    """
    spelled = recipe.model.get("config")
    if not spelled:
        return None
    from huggingface_hub.errors import StrictDataclassError
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    values = copy.deepcopy(dict(spelled))  # transformers writes into nested ones
    model_type = str(values.pop("model_type", None))
    try:
        config = AutoConfig.for_model(model_type, **copy.deepcopy(values))
    except (KeyError, ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.config: {' '.join(str(error).split())[:200]}") from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"model.config: transformers has no causal language model of the type `{config.model_type}`")
    _refuse_unknown_keys(model_type, values, config)
    return config


def _refuse_unknown_keys(model_type: str, values: dict[str, Any], config: Any) -> None:
    """See that every key makes a difference: transformers keeps one that it does not know, and takes its default.

    Raises:
        UserError: a key is neither the config's nor an older name of another.
    """
    from transformers import AutoConfig

    plain = AutoConfig.for_model(model_type)
    known = {*plain.to_dict(), *plain.attribute_map}
    for name in sorted(values.keys() - known):
        rest = copy.deepcopy({key: value for key, value in values.items() if key != name})
        without = AutoConfig.for_model(model_type, **rest).to_dict()
        if all(value == without.get(key) for key, value in config.to_dict().items() if key != name):
            meant = did_you_mean(name, known)
            raise UserError(f"model.config: a config of the type `{model_type}` has no `{name}`{meant}")


def check_model_of(config: Any) -> None:
    """See that transformers can make a model of a config, without storage for it.

    Raises:
        UserError: a value that it divides by, looks up or checks is none.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except (ZeroDivisionError, LookupError, ValueError, TypeError, AssertionError) as error:
        said = " ".join(str(error).split())[:160]
        raise UserError(f"model.config: no model can be made of it ({type(error).__name__}: {said})") from None
    except Exception:  # not every model can be made on this device
        return
