"""An objective as the `compute_loss_func` of a plain `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convexlm.objectives import IGNORE_INDEX

if TYPE_CHECKING:
    from convexlm.objectives import Objective


def compute_loss_func(objective: Objective, sequences_per_batch: int | None) -> Callable[..., Tensor]:
    """See `Objective.as_compute_loss_func`; `sequences_per_batch` is checked there."""

    def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if labels is None:
            raise ValueError("the batch has no `labels`; a causal model needs them, -100 where there is no target")
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        targets = labels[:, 1:].to(logits.device)
        rows, places = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
        # Only target positions are copied and upcast: the prompt's logits are the larger part, and may be NaN.
        chosen = logits[rows, places]
        high = torch.float64 if logits.dtype == torch.float64 else torch.float32
        log_probs = chosen.log_softmax(-1, dtype=high).gather(-1, targets[rows, places, None]).squeeze(-1)
        normalizer: float | Tensor | None = None
        if num_items_in_batch is not None:
            normalizer = torch.as_tensor(num_items_in_batch).reshape(-1)[0]
            if objective.length_weighting == "sequence":
                normalizer = _sequence_count(rows, normalizer, sequences_per_batch)
        everywhere = torch.ones_like(rows, dtype=torch.bool)
        return objective(log_probs, everywhere, sequence_ids=rows, normalizer=normalizer).loss

    return compute_loss


def _sequence_count(rows: Tensor, num_items: Tensor, sequences_per_batch: int | None) -> float | Tensor:
    """The denominator of sequence weighting inside a plain Trainer, which counts `num_items` tokens.

    In training it is the user's count. In evaluation (no gradients) the batch stands for itself; but the Trainer
    multiplies its loss by the number of ranks if it counted tokens over all of them, so then sequences are too.
    """
    if torch.is_grad_enabled():
        if sequences_per_batch is None:
            raise ValueError(
                "length_weighting='sequence' in a plain Trainer needs as_compute_loss_func(sequences_per_batch=...): "
                "the number of sequences of one optimizer step over accumulation steps and ranks, for the Trainer "
                "counts tokens only. ConvexTrainer counts sequences itself."
            )
        return float(sequences_per_batch)
    counts = torch.stack([rows.new_tensor(len(rows)), rows.new_tensor(len(rows.unique()))])
    own_tokens, own_sequences = counts.tolist()
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return float(own_sequences)
    distributed.all_reduce(counts)  # by every rank, whatever its own numbers, or one would wait for ever
    tokens, sequences = counts.tolist()
    return float(own_sequences) if int(num_items) == own_tokens else sequences * float(num_items) / max(tokens, 1)
