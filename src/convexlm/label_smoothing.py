"""Label smoothing without the logits: what `label_smoothing_factor` adds to maximum likelihood at the fused head.

Smoothing by e replaces -log p_y by (1 - e) (-log p_y) + e mean_v(-log p_v) (Szegedy et al. 2016; transformers'
`LabelSmoother`). The normaliser of the softmax is in both, so the difference is linear in the logits: it is
e (z_y - mean_v z_v), and the mean of the logits is the state's product with the mean row of the weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from convexlm.objectives import Objective


def refuse_label_smoothing(objective: Objective, softcap: float | None = None) -> str | None:
    """Why label smoothing does not go with this objective or model, or None.

    Args:
        objective: what is minimised.
        softcap: the cap on the model's logits.
    """
    if objective.name != "mle" or objective.length_weighting != "token":
        return (
            "`label_smoothing_factor` goes with `objective='mle'` and `length_weighting='token'` alone: other "
            "objectives are functions of the targets' log-probabilities; consider `mle_mix` there"
        )
    if softcap is not None:
        return "`label_smoothing_factor` is not supported where a model caps its logits, as this one does"
    return None


def smoothing_term(
    states: Tensor,
    weight: Tensor,
    labels: Tensor,
    factor: float,
    normalizer: Tensor,
    *,
    bias: Tensor | None = None,
    sample_weights: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """What smoothing adds to the mean of -log p over target tokens: a 0-d float32 (float64 for float64) tensor.

    Args:
        states: (N, H) floating, the states that predict the labels.
        weight: (V, H) floating, the output layer's.
        labels: (N,) integers in [0, V).
        factor: e, from 0 to 1.
        normalizer: what the sum over tokens is divided by; 0 gives 0.
        bias: (V,) floating.
        sample_weights: (N,) a weight for each token.
        scale: factor on the logits.
    """
    high = torch.promote_types(states.dtype, torch.float32)
    with torch.autocast(states.device.type, enabled=False):
        rows = weight.index_select(0, labels).to(high) - weight.mean(0, dtype=high)
        gaps = (states.to(high) * rows).sum(-1)
        if bias is not None:
            gaps = gaps + bias.index_select(0, labels).to(high) - bias.mean(dtype=high)
        if sample_weights is not None:
            gaps = gaps * sample_weights.to(high)
        total = gaps.sum() * (factor * scale)
        normalizer = normalizer.detach().to(high).reshape(())
        return torch.where(normalizer > 0, total / normalizer.clamp(min=torch.finfo(high).tiny), total * 0)
