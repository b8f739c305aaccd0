"""What an objective reports about a batch, and the numbers people watch. Only torch is needed here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

MINIMUM_STATISTICS = ("weight_min",)  # reduced by minimum; every other statistic by sum


@dataclass(frozen=True, eq=False)
class ObjectiveOutput:
    """What an objective says about a batch of S sequences. Only `loss` carries a gradient.

    Attributes:
        loss: scalar, float32 (float64 for float64 input).
        weights: the factor on the gradient: (S,), or at token level one a token, in the log-probabilities' shape;
            0 where nothing takes part: rows without targets, masked tokens, sample weight 0.
        mean_log_probs: (S,), mean log-probability of the target tokens; 0 for a sequence that takes no part.
        lengths: (S,) int64, target tokens of each sequence that take part.
        num_tokens: 0-d int64, target tokens that take part (a sample weight counts them once, or not at all if 0).
        num_sequences: 0-d int64, sequences that take part.
        normalizer: 0-d, this batch's own denominator: (sample-weighted) tokens or sequences, by length weighting.
    """

    loss: Tensor
    weights: Tensor
    mean_log_probs: Tensor
    lengths: Tensor
    num_tokens: Tensor
    num_sequences: Tensor
    normalizer: Tensor
    _statistics: dict[str, Tensor] = field(repr=False)

    def statistics(self) -> dict[str, Tensor]:
        """Detached 0-d tensors (float64; float32 on mps) that add up over micro-batches and ranks; see `summarize`.

        `loss_sum` and `normalizer` (the loss is their ratio), `tokens`, `sequences` and `nll_sum` (sample-weighted);
        `weight_sum`, `weight_sq_sum` and `units`: the weights over sequences, or at token level over tokens;
        `num_tokens` and `num_sequences` (unweighted). `weight_min` alone is reduced by minimum, inf being no unit.
        """
        return dict(self._statistics)


def merge_statistics(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The statistics of two batches together."""
    return {
        key: torch.minimum(value, second[key]) if key in MINIMUM_STATISTICS else value + second[key]
        for key, value in first.items()
    }


def summarize(statistics: Mapping[str, Tensor], empty: float = 0.0) -> dict[str, float]:
    """Statistics to the numbers people watch, as Python floats; `empty` throughout if no target token had weight.

    `loss`; `nll` per target token (nats); `weight_mean`; `weight_min`; `effective_sample_size`, which is
    (sum w)^2 / (n sum w^2), the fraction in (0, 1] of units that carry the gradient (0 if every weight underflowed);
    `num_target_tokens`, which is a count and always a number.
    """
    s = {key: float(value) for key, value in statistics.items()}
    square = s["units"] * s["weight_sq_sum"]
    nothing = 0.0 if s["units"] else empty
    return {
        "loss": s["loss_sum"] / s["normalizer"] if s["normalizer"] else empty,
        "nll": s["nll_sum"] / s["tokens"] if s["tokens"] else empty,
        "weight_mean": s["weight_sum"] / s["units"] if s["units"] else empty,
        "weight_min": s["weight_min"] if s["units"] else empty,
        "effective_sample_size": min(1.0, s["weight_sum"] ** 2 / square) if square else nothing,
        "num_target_tokens": s["num_tokens"],
    }
