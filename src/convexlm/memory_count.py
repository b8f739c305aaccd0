"""Parameters and bytes of a model that is not loaded, an adapter on it and quantization included."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from convexlm.memory_step import empty_model

if TYPE_CHECKING:
    from collections.abc import Callable


class Adapter:
    """Puts an adapter on a model without storage; equal to another of the same config, so that traces are kept."""

    def __init__(self, peft_config: Any, quantized: str | None) -> None:
        self.config, self.quantized = peft_config, quantized
        self.key = None if peft_config is None else repr(sorted(map(str, peft_config.to_dict().items())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adapter) and (self.key, self.quantized) == (other.key, other.quantized)

    def __hash__(self) -> int:
        return hash((self.key, self.quantized))

    def __call__(self, model: Any) -> Any:
        """The model with the adapter on it."""
        if self.config is None:
            return model
        import copy

        from peft import get_peft_model

        # As in training: PEFT keeps adapters of 16-bit models in float32, TRL those of quantized ones in bfloat16.
        model = get_peft_model(model, copy.deepcopy(self.config), low_cpu_mem_usage=True)
        if self.quantized:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        return model


def config_from_json(text: str) -> Any:
    """A model config of transformers from its JSON."""
    import json

    from transformers import AutoConfig

    values = json.loads(text)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def count_parameters(config: Any) -> int:
    """Parameters of a bare model of this config, counted on the meta device."""
    return count_model(config.to_json_string(), torch.float32, Adapter(None, None), None, False).parameters


@lru_cache(maxsize=32)
def count_model(
    config_json: str, dtype: torch.dtype, adapter: Adapter, quantized: str | None, double: bool
) -> ModelCount:
    """`ModelCount.of`, remembered."""
    return ModelCount.of(config_from_json(config_json), dtype, adapter, quantized, double)


@dataclass(frozen=True)
class ModelCount:
    """What is counted on the meta device: numbers of parameters, and bytes of the weights as they are loaded."""

    parameters: int
    trainable: int
    weights: int
    trainable_bytes: int
    largest_quantized: int

    @classmethod
    def of(
        cls, config: Any, dtype: torch.dtype, adapter: Callable[[Any], Any], quantized: str | None, double: bool
    ) -> ModelCount:
        """Count a model of this config.

        Args:
            config: a model config of transformers.
            dtype: of the loaded weights.
            adapter: from the bare model to the one that is trained.
            quantized: "4bit", "8bit" or None.
            double: whether quantization constants are quantized, too.

        Raises:
            ValueError: nothing would be trained.
        """
        model = empty_model(config, dtype)
        head = model.get_output_embeddings()
        small = {
            id(module.weight): module.weight.numel()
            for module in model.modules()
            if quantized and isinstance(module, torch.nn.Linear) and module is not head
        }
        model = adapter(model)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("no parameter gets a gradient")
        weights = 0.0
        for parameter in [*model.parameters(), *model.buffers()]:
            each = _quantized_bytes(quantized, double) if id(parameter) in small else parameter.element_size()
            weights += parameter.numel() * each
        trained = [p for p in model.parameters() if p.requires_grad]
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            trainable=sum(p.numel() for p in trained),
            weights=int(weights),
            trainable_bytes=sum(p.numel() * p.element_size() for p in trained),
            largest_quantized=max(small.values(), default=0),
        )


def _quantized_bytes(quantized: str | None, double: bool) -> float:
    """Bytes of a weight as bitsandbytes keeps it: codes, and a constant for each block of 64 (a row, for 8 bits)."""
    if quantized == "8bit":
        return 1.0
    # Nested constants are 8-bit themselves, with a float32 for each 256 of them.
    return 0.5 + ((1 + 4 / 256) / 64 if double else 4 / 64)
