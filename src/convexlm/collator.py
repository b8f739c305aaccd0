"""Batches for `ConvexTrainer`: TRL's collator, with record weights, left padding, and whose row each token is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from convexlm.objectives import IGNORE_INDEX

WEIGHT, ROW, RECORD = "token_weight", "row_index", "record_id"
LARGEST_WEIGHT = torch.finfo(torch.float32).max
# Of transformers' names of layers, those that see other tokens through a mask alone.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass
class ConvexCollator(DataCollatorForLanguageModeling):
    """TRL's collator for language modeling, and two tensors that follow the tokens through padding and packing.

    Adds to TRL's batch, the first two shaped like `input_ids`:

    - `token_weight` (float32): the `weight` of the record that the token belongs to. Only if a record has one.
    - `row_index` (int64): which example of the batch a token came from, -1 for padding. Only for padding-free batches,
      whose examples are flattened into one row, and for packed rows.
    - `record_id`: the examples' own `record_id`, a list. Only if they have one. It is for reports, no tensor and no
      input of a model.

    With `padding_side="left"` rows are padded on the left and `position_ids` are given, so that a token has the
    same position as without padding.

    With `packed_rows=True`, examples that hold several sequences each (`seq_lengths`) stay rows of the batch, padded
    to the longest, in place of TRL's one row of all. `position_ids` and `seq_idx` say where sequences begin, and there
    is no `attention_mask`, so that transformers makes a mask between sequences for each row: attention then costs
    (rows x length^2), not (rows x length)^2.
    """

    return_position_ids: bool = False
    padding_side: str = "right"
    packed_rows: bool = False

    def __post_init__(self) -> None:
        if self.packed_rows and (self.padding_free or self.padding_side != "right"):
            raise ValueError("`packed_rows` goes with neither `padding_free` nor padding on the left")
        self.return_position_ids = self.return_position_ids or self.packed_rows

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate `examples` (`input_ids`, `labels`, and optionally `seq_lengths`, `weight` and `record_id`).

        Raises:
            ValueError: a record's labels are more or fewer than its tokens, or its `weight` is none.
        """
        for example in examples:
            check_labels(len(example["input_ids"]), len(example.get("labels", example["input_ids"])))
        batch = super().torch_call(examples)
        if self.packed_rows:
            del batch["attention_mask"]
            begins = batch["position_ids"] == 0
            batch["labels"][begins] = IGNORE_INDEX  # no sequence's first token is a target, and no padding
            batch["seq_idx"] = begins.cumsum(1, dtype=torch.int32) - 1
        shape = batch["input_ids"].shape
        lengths = [len(example["input_ids"]) for example in examples]
        if any(example.get("weight") is not None for example in examples):
            weights = [_token_weights(example, length) for example, length in zip(examples, lengths, strict=True)]
            batch[WEIGHT] = _lay_out(weights, shape, self.padding_free)
        if self.padding_free or self.packed_rows:
            rows = [torch.full((length,), row, dtype=torch.int64) for row, length in enumerate(lengths)]
            batch[ROW] = _lay_out(rows, shape, self.padding_free, filling=-1)
        elif self.padding_side == "left":
            _shift_to_the_right(batch, lengths)
        if all(example.get(RECORD) is not None for example in examples):
            batch[RECORD] = [example[RECORD] for example in examples]
        return batch


def keeps_packed_rows(config: Any, attention: str | None = None) -> bool:
    """Whether packed rows are better kept apart than flattened into one: whether attention makes a mask between them.

    Flash and flex attention skip what is masked and take one row; layers with a state (Mamba, linear attention) know
    where a sequence begins in TRL's flattened form alone, and of a model that is not transformers' own nobody knows.

    Args:
        config: the model's.
        attention: its `attn_implementation`; the config's if None, and transformers' default (sdpa) if it has none.
    """
    text = config.get_text_config()
    chosen = attention or getattr(text, "_attn_implementation", None) or "sdpa"
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    stateful = known and getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_is_stateful", False)
    plain = set(getattr(text, "layer_types", None) or ()) <= ATTENTION_LAYERS
    return chosen in ("sdpa", "eager") and known and plain and not stateful


def sequences_of(batch: dict[str, Any]) -> torch.Tensor | None:
    """Which sequence of its row a token belongs to, in the layout of `labels`; None: a row is one sequence.

    A collator of the user's own may say by `position_ids` alone where a sequence begins, as transformers'
    `DataCollatorWithFlattening` does.
    """
    ids, positions, labels = batch.get("seq_idx"), batch.get("position_ids"), batch["labels"]
    if ids is not None or positions is None or positions.dim() != 2:
        return ids
    begins = positions == 0
    return (begins.cumsum(1) - begins[:, :1].long()).expand(labels.shape)


def _token_weights(example: dict[str, Any], length: int) -> torch.Tensor:
    weight: Any = example.get("weight")
    # A packed row carries one number a token, in an array where the dataset has a format of its own.
    if isinstance(weight, (list, tuple)) or getattr(weight, "ndim", 0) == 1:
        if len(weight) != length:
            raise ValueError(
                f"`weight` is a list of {len(weight)} numbers for {length} tokens; give one number a record"
            )
        return torch.as_tensor(weight, dtype=torch.float32)
    return torch.full((length,), weight_of(weight), dtype=torch.float32)


def check_labels(tokens: int, labels: int) -> None:
    """Refuse a record whose labels are not one for each of its tokens.

    Raises:
        ValueError: they are not.
    """
    if tokens != labels:
        raise ValueError(
            f"a record has {labels} `labels` for {tokens} `input_ids`; they are one a token, the prompt's being -100"
        )


def weight_of(weight: Any) -> float:
    """A record's weight as a number; 1 where it has none.

    Raises:
        ValueError: it is no number, negative, or not finite in float32.
    """
    try:
        value = 1.0 if weight is None else float(weight)
    except (TypeError, ValueError):
        raise ValueError(f"a record's `weight` must be a number, not {weight!r}") from None
    check_weight(value)
    return value


def check_weight(weight: float) -> None:
    """Refuse a record's weight that is negative, or not finite in float32.

    Raises:
        ValueError: if it is.
    """
    if not math.isfinite(weight) or weight < 0:
        raise ValueError(f"a record's `weight` must be a finite number of at least 0, not {weight}")
    if weight > LARGEST_WEIGHT:
        raise ValueError(f"a record's `weight` must be at most {LARGEST_WEIGHT:.4g} (float32's largest), not {weight}")


def _lay_out(values: list[torch.Tensor], shape: torch.Size, flat: bool, filling: int = 0) -> torch.Tensor:
    """Values of each example's tokens in the layout of `input_ids`, `filling` where that is padded."""
    out = torch.full(shape, filling, dtype=values[0].dtype)
    if flat:
        values = [torch.cat(values)]
    for row, value in enumerate(values):
        out[row, : len(value)] = value
    return out


def _shift_to_the_right(batch: dict[str, Any], lengths: list[int]) -> None:
    """Move each row's padding from its end to its beginning, in place."""
    batch["labels"][:, 0] = (
        IGNORE_INDEX  # no token comes before a row's first to predict it; padding would, once moved
    )
    for row, length in enumerate(lengths):
        shift = batch["input_ids"].shape[1] - length
        for key, value in batch.items():
            if isinstance(value, torch.Tensor) and value.dim() == 2:
                batch[key][row] = value[row].roll(shift)
    # Without these a model would count positions from the padding on.
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
