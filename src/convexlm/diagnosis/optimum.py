"""What the exact optimum does at the data's lengths, and which k would give a wanted size of update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from convexlm.objectives import Convex

if TYPE_CHECKING:
    from convexlm.objectives import Objective

WANTED_RATIO = 0.25
"""The update ratio that advice on k aims at; a rule of thumb of this project, no measured optimum."""
_SMALLEST_K, _LARGEST_K = 1e-3, 64.0


def exact_optimum(lengths: np.ndarray, objective: Objective) -> dict[str, Any] | None:
    """How much `convex` sharpens the data's distribution over answers of each length, were the model free to follow.

    For k < T the optimum is the data's distribution to the power 1/(1 - k/T); from k = T on it is one answer alone
    (`docs/theory.md`). At token level every token is a sequence of length 1. Other objectives, and `mle_mix`, have no
    such form: None.

    Returns:
        `exponent`: its quantiles over the records with T > k, or None if there are none; `collapsed`: how many
        records have T <= k; `collapsed_share`; `shortest`: the least T, which is the least k that collapses anything.
    """
    if type(objective) is not Convex or objective.mle_mix > 0:  # one derived from it has a slope of its own
        return None
    t = np.ones(len(lengths)) if objective.level == "token" else lengths.astype(np.float64)
    open_ = t[t > objective.k]
    exponents = 1.0 / (1.0 - objective.k / open_)
    names = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    return {
        "exponent": {f"{q:g}": float(v) for q, v in zip(names, np.quantile(exponents, names), strict=True)}
        if len(open_)
        else None,
        "collapsed": int((t <= objective.k).sum()),
        "collapsed_share": float((t <= objective.k).mean()),
        "shortest": int(t.min()),
    }


def k_for_update_ratio(
    m: np.ndarray, amounts: np.ndarray, objective: Objective, wanted: float = WANTED_RATIO
) -> float | None:
    """The k of sequence-level `convex` at which the update ratio is `wanted`, rounded down to two digits.

    None for other objectives, and where no k in [0.001, 64] reaches it. The ratio falls as k grows.
    """
    if type(objective) is not Convex or objective.level == "token" or objective.mle_mix > 0:
        return None
    share = amounts / amounts.sum()

    def ratio(k: float) -> float:
        return float((share * np.exp(k * m)).sum())

    if ratio(_SMALLEST_K) < wanted or ratio(_LARGEST_K) > wanted:
        return None
    low, high = _SMALLEST_K, _LARGEST_K
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if ratio(middle) >= wanted else (low, middle)
    step = 10.0 ** (np.floor(np.log10(low)) - 1)
    return float(f"{np.floor(low / step) * step:.3g}")
