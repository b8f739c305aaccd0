"""`tempered`: convex with k in proportion to each target's length, k_i = c T_i. A plugin, for one experiment.

With token length weighting the expected loss is, up to constants, -sum_i d_i (p_i^c - 1) / c, of the whole sequence's
probability p_i: T_i has dropped out. So the optimum is p_i proportional to d_i^(1 / (1 - c)), the data at temperature
1 - c, at *any* lengths, where `convex` has temperature 1 - k / T_i and no one temperature at unequal lengths. The
price is the weight p_i^c = exp(c T_i m_i), which falls exponentially with the length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from convexlm.objective_batch import check_number
from convexlm.objectives import Objective, register_objective


@dataclass(frozen=True, kw_only=True)
class _Exponential(Objective):
    """(1 - exp(k m)) / k with a k for each sequence."""

    k: Any

    def value(self, m: Tensor) -> Tensor:
        x = self.k * m
        # As in `Convex`: the derivative of expm1 has lost all digits of a small weight.
        return torch.where(x > -0.5, -x.clamp(min=-0.5).expm1(), 1 - x.exp()) / self.k

    def weight(self, m: Tensor) -> Tensor:
        return (self.k * m).exp()


@register_objective("tempered")
@dataclass(frozen=True, kw_only=True)
class Tempered(Objective):
    """Value (1 - p^c) / (c T), weight p^c, p = exp(T m) being the probability of the whole sequence; 0 < c <= 1."""

    c: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("c", self.c, 1e-6, 1.0)

    def value(self, m: Tensor) -> Tensor:
        """At T = 1."""
        return self.for_lengths(torch.ones_like(m)).value(m)

    def weight(self, m: Tensor) -> Tensor:
        """At T = 1."""
        return self.for_lengths(torch.ones_like(m)).weight(m)

    def at_warmup(self, fraction: float) -> Objective:
        """With c times `fraction`."""
        return replace(self, c=max(1e-6, self.c * fraction))

    def for_lengths(self, lengths: Tensor) -> Objective:
        """With k = c T."""
        return _Exponential(k=self.c * lengths, mle_mix=self.mle_mix)
