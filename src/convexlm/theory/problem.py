"""What is to be maximised: a sum of one function per candidate answer, and that function's slope."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from convexlm.objectives import Convex, Mle, Objective, Power, get_objective

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
else:
    Floats = Any

SUM_TOLERANCE = 1e-6
# Below this log-probability a probability counts as 0 where the slope is known only as a number: exp(-700) = 1e-304.
LOWEST = -700.0


def check_probabilities(probabilities: Sequence[float] | Floats) -> Floats:
    """The distribution as float64 (n,), summing to 1 exactly to rounding.

    Raises:
        ValueError: empty, not one-dimensional, a negative, NaN or infinite entry, or a sum off 1 by more than 1e-6.
    """
    d = _numbers("probabilities", probabilities)
    if d.ndim != 1 or d.size == 0:
        raise ValueError("probabilities must be a list of at least one number")
    for place, value in enumerate(d.tolist(), start=1):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"probability {place} is {value!r}; every one must be a number from 0 to 1")
    total = math.fsum(d)
    if abs(total - 1) > SUM_TOLERANCE:
        raise ValueError(f"the probabilities sum to {total:.9g}, not to 1 (within {SUM_TOLERANCE:g})")
    return d / total


def check_lengths(lengths: float | Sequence[float] | Floats, count: int) -> Floats:
    """One length a candidate, float64 (count,), from one number for all or one each.

    Raises:
        ValueError: another number of them than `count`, or one that is not finite and positive.
    """
    values = np.atleast_1d(_numbers("lengths", lengths))
    if values.ndim != 1 or values.size not in (1, count):
        raise ValueError(f"{values.size} lengths for {count} probabilities; give one for all, or one each")
    for value in values.tolist():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"a length is a number of tokens above 0, not {value!r}")
    return np.broadcast_to(values, (count,)).astype(np.float64)


def _numbers(name: str, values: Any) -> Floats:
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "iuf":
            raise TypeError
        return array.astype(np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers, not {values!r}") from None


def as_objective(objective: str | Objective, settings: dict[str, Any]) -> Objective:
    """The objective, looked up with its settings if it is given by name."""
    if isinstance(objective, str):
        return as_objective(get_objective(objective, **settings), {})
    if settings:
        raise ValueError(f"settings ({', '.join(settings)}) go with an objective's name, not with an objective")
    if type(objective).for_lengths is not Objective.for_lengths:
        raise ValueError(f"objective `{objective.name}` depends on the length: its optimum is not worked out here")
    return objective


@dataclass(frozen=True, eq=False)
class Problem:
    """Maximise sum_i a_i T_i (-V(log p_i / T_i)) over the simplex; the slope in p_i is a_i w(log p_i / T_i) / p_i.

    That is the expectation of minus the loss, up to its denominator, which is constant. With token length weighting
    a_i is d_i; with sequence length weighting d_i / T_i. At token level a candidate is one choice of a token after
    which all is certain (m = 0, loss 0), so every T_i here is 1.

    Attributes:
        log_a: log a_i, (n,), of the candidates with d_i > 0.
        lengths: T_i, (n,).
        objective: gives V (`mixed_value`) and w (`mixed_weight`).
    """

    log_a: Floats
    lengths: Floats
    objective: Objective

    @classmethod
    def of(cls, d: Floats, lengths: Floats, objective: Objective) -> Problem:
        """The problem for data probabilities (all above 0) of candidates with these numbers of tokens."""
        log_a = np.log(d)
        if objective.length_weighting == "sequence":
            log_a = log_a - np.log(lengths)
        if objective.level == "token":
            lengths = np.ones_like(lengths)
        return cls(log_a, lengths, objective)

    @property
    def is_likelihood(self) -> bool:
        """Whether the objective is maximum likelihood under another name."""
        objective = self.objective
        return objective.mle_mix == 1 or type(objective) is Mle or (type(objective) is Power and objective.k == 1)

    @property
    def convex_k(self) -> float | None:
        """The k of a pure `convex` objective, whose slope is a power of p_i; else None."""
        objective = self.objective
        return objective.k if type(objective) is Convex and objective.mle_mix == 0 else None

    def log_slope(self, log_p: Floats, log_a: Floats, lengths: Floats) -> Floats:
        """The logarithm of the derivative in p_i, elementwise."""
        return log_a + log_weight(self.objective, log_p / lengths) - log_p

    def total(self, log_p: Floats) -> float:
        """What is maximised, at log-probabilities (n,); -inf where a term is."""
        value = values_at(self.objective, log_p / self.lengths)
        return -float(math.fsum(np.exp(self.log_a) * self.lengths * value)) if np.all(value < math.inf) else -math.inf


def log_weight(objective: Objective, m: Floats) -> Floats:
    """Logarithm of w(m), elementwise for m in (-inf, 0]; for objectives of our own without underflow.

    `power` is taken by its formula. In training its value is a parabola where -m < 1e-4, to keep weights finite.
    """
    if objective.mle_mix == 1:
        return np.zeros_like(m)
    with np.errstate(divide="ignore", over="ignore"):  # k of 1e308 times m is -inf, as it should be
        if type(objective) is Mle:
            plain = np.zeros_like(m)
        elif type(objective) is Convex:
            plain = objective.k * m
        elif type(objective) is Power:
            plain = (objective.k - 1) * np.log(-m) if objective.k < 1 else np.zeros_like(m)
        else:
            weight = _call(objective.weight, m)
            if not (weight >= 0).all():
                raise ValueError(f"objective `{objective.name}`: weight(m) is negative or no number at some m")
            plain = np.log(weight)
    if objective.mle_mix == 0:
        return plain
    return np.logaddexp(math.log1p(-objective.mle_mix) + plain, math.log(objective.mle_mix))


def values_at(objective: Objective, m: Floats) -> Floats:
    """The objective's value at m in [-inf, 0], `mle_mix` included; inf where it diverges. `power` by its formula."""
    if type(objective) is Power:
        a = objective.mle_mix
        value: Floats = (-m) ** objective.k / objective.k
        return value if a == 0 else (1 - a) * value - a * m
    value = _call(objective.mixed_value, m)
    if np.isnan(value).any():  # a user's formula may come to inf / inf at m = -inf
        value = np.where(np.isnan(value), _call(objective.mixed_value, np.maximum(m, LOWEST)), value)
    if np.isnan(value).any():
        raise ValueError(f"objective `{objective.name}`: value(m) is not a number everywhere on m <= 0")
    return value


def _call(function: Any, m: Floats) -> Floats:
    with torch.no_grad():
        result: Floats = function(torch.from_numpy(np.ascontiguousarray(m, dtype=np.float64))).double().numpy()
    return np.broadcast_to(result, m.shape)
