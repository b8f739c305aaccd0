"""A batch of prompts in a model: filled in once, then one token a row at a time; rows can leave it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

from convexlm.decoding.batching import common_head
from convexlm.decoding.generation.cache import RowCache

if TYPE_CHECKING:
    from collections.abc import Sequence

_NEEDED = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")

# Their angles depend on the length of the whole prompt, so its head computed alone would be another.
_ROPE_BY_LENGTH = ("dynamic", "longrope", "su", "yarn_dynamic")


def why_not(model: Any) -> str:
    """Why a model cannot be run by `Rows`, so that `generate` has to; empty if it can.

    It can be where every layer keeps plain keys and values of all positions, attention is causal, and the model takes
    positions and masks as they are given and prepares nothing else for a step.
    """
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder or getattr(config, "is_causal", True) is False:
        return "it is not a causal decoder"
    if getattr(config, "use_bidirectional_attention", False):
        return "it attends in both directions"
    if type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:
        return "it prepares the inputs of a step itself"
    known = inspect.signature(model.forward).parameters
    if lacking := [name for name in _NEEDED if name not in known]:
        return f"its forward takes no {lacking[0]}"
    layers = DynamicCache(config=model.config).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return "its layers keep more, or less, than the keys and values of all positions"
    if _rope_types(getattr(config, "rope_parameters", None)) & set(_ROPE_BY_LENGTH):
        return "its position angles depend on the prompt's length"
    return ""


def _rope_types(parameters: Any) -> set[str]:
    if not isinstance(parameters, dict):
        return set()
    own = {parameters[key] for key in ("rope_type", "type") if isinstance(parameters.get(key), str)}
    return own.union(*(_rope_types(value) for value in parameters.values()))


class Prefix:
    """The head that all prompts of a job share, run through the model once.

    Args:
        model: a model that `why_not` has nothing against.
        prompts: all prompts of the job, as token ids. At least the last token of each stays out of the prefix.

    Attributes:
        ids: the shared token ids; none if the prompts have no head in common.
    """

    def __init__(self, model: Any, prompts: Sequence[list[int]]) -> None:
        self.ids = common_head(prompts)
        self.cache: RowCache | None = None
        if self.ids:
            self.cache = _new_cache(model)
            ids = torch.tensor([self.ids], device=model.device)
            model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)


def _new_cache(model: Any) -> RowCache:
    return RowCache(len(DynamicCache(config=model.config).layers))


class Rows:
    """Prompts in a model, left-padded, and what was generated after each so far.

    Args:
        model: a model that `why_not` has nothing against.
        prompts: token ids, each beginning with `prefix.ids` and going on after them.
        pad_id: the token that fills the rows of shorter prompts; it is masked.
        prefix: the prompts' shared head.

    Attributes:
        logits: (rows, V) float32, of the token to come.
        width: the positions that prefix, padding and prompts take.
    """

    def __init__(self, model: Any, prompts: Sequence[list[int]], pad_id: int, prefix: Prefix) -> None:
        self._model = model
        self._cache = _new_cache(model)
        head = len(prefix.ids)
        own = [prompt[head:] for prompt in prompts]
        most = max(map(len, own))
        if prefix.cache is not None:
            self._cache.fill(prefix.cache, len(prompts))
        ids = torch.tensor([[pad_id] * (most - len(row)) + row for row in own], device=model.device)
        lengths = torch.tensor([len(row) for row in own], device=model.device)
        places = torch.arange(most, device=model.device) - (most - lengths)[:, None]
        self._mask: torch.Tensor | None = None
        if int(lengths.min()) < most:
            whole = torch.ones((len(own), head), dtype=torch.bool, device=model.device)
            self._mask = torch.cat((whole, places >= 0), dim=1)
        self._positions = head + lengths
        self.width = head + most
        self.logits = self._forward(ids, head + places.clamp(min=0))

    def step(self, tokens: torch.Tensor) -> None:
        """Append a token to each row: tokens (rows,) int64; `logits` are then those of the next."""
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=True)
        self.logits = self._forward(tokens[:, None], self._positions[:, None])
        self._positions = self._positions + 1

    def take(self, rows: torch.Tensor) -> None:
        """Make row i what was `rows[i]`, in the cache too: drops rows, or repeats them."""
        self._cache.take(rows)
        self._positions = self._positions[rows]
        self.logits = self.logits[rows]
        if self._mask is not None:
            self._mask = self._mask[rows]

    def reorder(self, rows: torch.Tensor) -> None:
        """Make row i's generated part what was that of `rows[i]`, a row of the same prompt."""
        self._cache.reorder(rows, self.width)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return (
            self._model(
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
        )
