"""Why a convex function of p alone does not train: wrong vertices hold, and the gradient vanishes with the length.

The composition with the length-normalised logarithm mends both, which is why objectives are functions of log(p) / T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from convexlm.theory.problem import Floats, check_probabilities

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, eq=False)
class Climb:
    """Where gradient ascent ended.

    Attributes:
        probabilities: float64 (n,), at the end.
        steps: gradient steps taken.
        gradient_norm: of the last gradient in the logits.
    """

    probabilities: Floats
    steps: int
    gradient_norm: float


def climb_plain_power(
    probabilities: Sequence[float] | Floats,
    start: Sequence[float] | Floats,
    order: float = 2.0,
    *,
    rate: float = 1.0,
    max_steps: int = 100_000,
    tolerance: float = 1e-4,
) -> Climb:
    """Gradient ascent, in softmax logits, on sum_i d_i p_i^order: the convex function without the logarithm.

    For order > 1 it ends at the vertex that (d_i p_i^(order - 1)) favours at the start, not at the data's mode.

    Raises:
        ValueError: no distributions, of different sizes, a start with a 0, order below 1 or a rate not above 0.
    """
    d, p = check_probabilities(probabilities), check_probabilities(start)
    if len(d) != len(p):
        raise ValueError(f"{len(d)} probabilities but a start of {len(p)}")
    if not (p > 0).all():
        raise ValueError("a start must give every candidate some probability")
    if not (1 <= order < math.inf and 0 < rate < math.inf and max_steps >= 1):
        raise ValueError("order must be at least 1, rate above 0 and max_steps at least 1")
    logits = np.log(p)
    steps, norm = 0, math.inf
    while steps < max_steps and norm >= tolerance:
        steps += 1
        pull = order * d * p**order
        gradient = pull - p * pull.sum()
        logits = logits + rate * gradient
        logits = logits - np.logaddexp.reduce(logits)
        p = np.exp(logits)
        norm = float(np.linalg.norm(gradient))
    return Climb(p, steps, norm)


def local_optima_plain_power(probabilities: Sequence[float] | Floats, order: float = 2.0) -> list[int]:
    """The vertices that are local maxima of sum_i d_i p_i^order on the simplex, by their index.

    At vertex j the slope towards i is d_i order 0^(order - 1) - d_j order. For order > 1 that is negative for every
    candidate with d_j > 0; for order = 1 only where no d_i is larger.

    Raises:
        ValueError: no distribution, or order below 1.
    """
    d = check_probabilities(probabilities)
    if not 1 <= order < math.inf:
        raise ValueError(f"order must be a number of at least 1, not {order!r}")
    if order > 1:
        return [int(i) for i in np.flatnonzero(d > 0)]
    return [int(i) for i in np.flatnonzero(d == d.max())]


def log_gradient_factor(mean_log_prob: float, length: float, order: float = 1.0) -> float:
    """Logarithm of the factor on grad log p when p^order is maximised: order p^order, p = exp(length * mean_log_prob).

    It falls exponentially with the length; the composition's factor p̄^k does not depend on it. In nats.

    Raises:
        ValueError: a positive or infinite mean log-probability, a length or an order not above 0.
    """
    if not (-math.inf < mean_log_prob <= 0 and 0 < length < math.inf and 0 < order < math.inf):
        raise ValueError("mean_log_prob must be a number of at most 0, length and order above 0")
    return math.log(order) + order * length * mean_log_prob
