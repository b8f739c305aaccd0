"""Records of which somebody has said whether their answer is right: how well p̄ parts the right ones from the wrong.

Sequence-level weights and filters by p̄ let go of wrong answers only where those are the unlikely ones. Where p̄ ranks
wrong above right, both do harm. So a few hundred judged records say more than any figure without them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from convexlm.diagnosis.analyse import Sample

DROPPED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_Z95 = 1.959963984540054


def couples_right_above(right: np.ndarray, wrong: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The share of couples (a right, a wrong record) in which the right one's value is larger, and its 95 % interval.

    That is the area under the ROC curve; equal values count half. The interval is DeLong's (Biometrics 44, 1988), from
    midranks as Sun and Xu compute it (IEEE Signal Processing Letters 21, 2014), cut to [0, 1].

    Args:
        right: (m,) values of right records, m >= 1.
        wrong: (n,) values of wrong records, n >= 1.

    Returns:
        The share, and (low, high); with a single record on a side, or where all are equal, (0, 1), for nothing is then
        known of its spread.
        Where all couples agree DeLong's variance is zero, however few they are, and the bound is another: with the
        true share A, all agree with a probability of at most A^min(m, n), and the bound is where that is 2.5 %.
    """
    from scipy.stats import rankdata

    m, n = len(right), len(wrong)
    together = rankdata(np.concatenate([right, wrong]))
    of_right = (together[:m] - rankdata(right)) / n  # each right record: the share of wrong ones below it
    of_wrong = 1 - (together[m:] - rankdata(wrong)) / m
    share = float(of_right.mean())
    if min(m, n) < 2:
        return share, (0.0, 1.0)
    if share in (0.0, 1.0):
        bound = 0.025 ** (1 / min(m, n))
        return share, (bound, 1.0) if share else (0.0, 1.0 - bound)
    half = _Z95 * float(np.sqrt(of_right.var(ddof=1) / m + of_wrong.var(ddof=1) / n))
    if half == 0:  # every couple ties, or each record has as many on one side: nothing is seen of the spread
        return share, (0.0, 1.0)
    return share, (max(0.0, share - half), min(1.0, share + half))


def describe_judged(sample: Sample) -> dict[str, Any] | None:
    """How p̄ and the length part right from wrong, and what dropping the least likely records would leave.

    Records of weight 0 take no part. JSON-ready:

    - `right`, `wrong`, `unjudged`: numbers of records.
    - `p_bar_ranks_right`, `p_bar_interval`: see `couples_right_above`; `length_ranks_right`: the same of T.
    - `p_bar_median`, `mean_tokens`: of the right and of the wrong.
    - `dropping`: for each tenth of the judged records that is dropped by lowest p̄, the share of wrong ones among the
      rest (`wrong_left`), and the shares of all wrong and of all right ones that went.

    None without judged records, or with only right or only wrong ones.
    """
    if sample.right is None:
        return None
    used = sample.weights > 0
    right, wrong = (np.flatnonzero(used & (sample.right == side)) for side in (1.0, 0.0))
    if not len(right) or not len(wrong):
        return None
    share, interval = couples_right_above(sample.m[right], sample.m[wrong])
    sides = {"right": right, "wrong": wrong}
    return {
        **{name: len(group) for name, group in sides.items()},
        "unjudged": int(used.sum()) - len(right) - len(wrong),
        "p_bar_ranks_right": share,
        "p_bar_interval": list(interval),
        "length_ranks_right": couples_right_above(sample.lengths[right], sample.lengths[wrong])[0],
        "p_bar_median": {name: float(np.median(np.exp(sample.m[group]))) for name, group in sides.items()},
        "mean_tokens": {name: float(sample.lengths[group].mean()) for name, group in sides.items()},
        "dropping": [_dropping(sample, right, wrong, part) for part in DROPPED],
    }


def wrong_share(sample: Sample, share: np.ndarray | None) -> float | None:
    """What the wrong records get of all that the judged ones get; None without judged records."""
    if sample.right is None or share is None:
        return None
    judged = share[~np.isnan(sample.right)].sum()
    return float(share[sample.right == 0].sum() / judged) if judged > 0 else None


def _dropping(sample: Sample, right: np.ndarray, wrong: np.ndarray, part: float) -> dict[str, float]:
    order = np.concatenate([right, wrong])
    order = order[np.lexsort((order, sample.m[order]))]
    gone = order[: round(part * len(order))]
    wrong_gone = int((sample.right[gone] == 0).sum())  # type: ignore[index]
    left = len(order) - len(gone)
    return {
        "dropped": part,
        "wrong_left": (len(wrong) - wrong_gone) / left if left else 0.0,
        "wrong_dropped": wrong_gone / len(wrong),
        "right_dropped": (len(gone) - wrong_gone) / len(right),
    }
