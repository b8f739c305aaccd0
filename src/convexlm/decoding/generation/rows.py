"""A batch of prompts in a model: filled in once, then one token a row at a time; rows can leave it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

from convexlm.decoding.batching import common_head
from convexlm.decoding.generation.cache import RowCache
from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

NOT_NUMBERS = (
    "the model's probabilities are no numbers (NaN): its training has diverged, or it overflows in this dtype; "
    "--dtype bfloat16 or float32 has the range"
)
_NEEDED = ("input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep")

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
    if not cache_option(model):
        return "its forward takes no cache"
    if getattr(config, "alibi", False):
        return "its attention goes by distance (ALiBi) and counts it from the mask"
    if "local" in getattr(config, "attention_layers", ()):
        return "its attention counts the places of its window itself"
    layers = DynamicCache(config=model.config).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return "its layers keep more, or less, than the keys and values of all positions"
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return f"its attention ({getattr(config, '_attn_implementation', None)}) takes no mask of ours"
    if angles_by_length(model):
        return "its position angles depend on the prompt's length"
    return ""


def cache_option(model: Any) -> str:
    """What a model's forward calls its cache (`past_key_values` before transformers 5.24); empty if it takes none."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in known), "")


def angles_by_length(model: Any) -> bool:
    """Whether a model's position angles depend on the length of the text, which is that of the longest in a batch."""
    return bool(rope_types(model.config) & set(_ROPE_BY_LENGTH))


def rope_types(config: Any) -> set[str]:
    """The kinds of position angles in a model, as its config names them."""
    return _rope_types(getattr(config.get_text_config(), "rope_parameters", None))


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
            model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_option(model): self.cache})


def _new_cache(model: Any) -> RowCache:
    return RowCache(len(DynamicCache(config=model.config).layers))


class Rows:
    """Prompts in a model, left-padded, and what was generated after each so far.

    The beams of a prompt share its keys and values: they are so many queries of one row, and a mask says which of the
    row's generated positions are whose. So nothing is copied when beams change places.

    Args:
        model: a model that `why_not` has nothing against.
        prompts: token ids, each beginning with `prefix.ids` and going on after them.
        pad_id: the token that fills the rows of shorter prompts; it is masked.
        prefix: the prompts' shared head.
        beams: beams of a prompt.

    Attributes:
        logits: (prompts * beams, V) float32, of the token to come; the beams of a prompt stand one after the other.

    Raises:
        UserError: logits are NaN.
    """

    def __init__(self, model: Any, prompts: Sequence[list[int]], pad_id: int, prefix: Prefix, beams: int = 1) -> None:
        self._model = model
        self._cache_option = cache_option(model)
        self._beams = beams
        self._cache = _new_cache(model)
        head = len(prefix.ids)
        own = [prompt[head:] for prompt in prompts]
        most = max(map(len, own))
        if prefix.cache is not None:
            self._cache.fill(prefix.cache, len(prompts))
        device = model.device
        ids = torch.tensor([[pad_id] * (most - len(row)) + row for row in own], device=device)
        lengths = torch.tensor([len(row) for row in own], device=device)
        places = torch.arange(most, device=device) - (most - lengths)[:, None]
        whole = torch.ones((len(own), head), dtype=torch.bool, device=device)
        self._prompt_mask = torch.cat((whole, places >= 0), dim=1)
        self._padded = int(lengths.min()) < most
        self._tail = torch.empty((len(own), beams, 0), dtype=torch.bool, device=device)
        self._positions = head + lengths
        mask = self._prompt_mask if self._padded else None
        self.logits = self._forward(ids, mask, head + places.clamp(min=0))[:, -1].repeat_interleave(beams, dim=0)
        if bool(self.logits.isnan().any()):
            raise UserError(NOT_NUMBERS)

    def step(self, tokens: torch.Tensor, parents: torch.Tensor | None = None) -> None:
        """Append a token to each beam; `logits` are then those of the next.

        Args:
            tokens: (prompts, beams) int64.
            parents: (prompts, beams) int64, which beam of the same prompt each one goes on from; None: itself.
        """
        rows, beams = tokens.shape
        itself = torch.eye(beams, dtype=torch.bool, device=tokens.device).expand(rows, -1, -1)
        if parents is not None:
            self._tail = self._tail.gather(1, parents[:, :, None].expand(-1, -1, self._tail.shape[2]))
        self._tail = torch.cat((self._tail, itself), dim=2)
        mask: torch.Tensor | None
        if beams > 1:
            prompt = self._prompt_mask[:, None].expand(-1, beams, -1)
            mask = self._for_attention(torch.cat((prompt, self._tail), dim=2)[:, None])
        elif self._padded:
            mask = torch.cat((self._prompt_mask, self._tail[:, 0]), dim=1)
        else:
            mask = None
        self.logits = self._forward(tokens, mask, self._positions[:, None].expand(-1, beams)).flatten(0, 1)
        self._positions = self._positions + 1

    def take(self, rows: torch.Tensor) -> None:
        """Keep the prompts `rows` (indices) only, in the cache too; `logits` are void until the next step."""
        self._cache.take(rows)
        self._positions = self._positions[rows]
        self._prompt_mask = self._prompt_mask[rows]
        self._tail = self._tail[rows]

    def spread(self, count: int) -> None:
        """Make each prompt `count` rows, one after the other, before the first step."""
        index = torch.arange(len(self._positions), device=self._positions.device).repeat_interleave(count)
        self.take(index)
        self.logits = self.logits[index]

    def _for_attention(self, mask: torch.Tensor) -> torch.Tensor:
        if self._model.config._attn_implementation == "sdpa":
            return mask
        dtype = self._model.dtype  # eager attention adds its mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
        """Logits (rows, kept, V) in float32: of all places of a step, of the last of the prompts."""
        return self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=self._beams if self._tail.shape[2] else 1,
            **{self._cache_option: self._cache},
        ).logits.float()
