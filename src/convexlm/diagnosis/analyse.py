"""From lengths and mean log-probabilities to what any objective would do with the data. Numpy, and the objectives.

The words used here, for a record with T target tokens, its own weight a and an objective's weight w:

- *amount*: what the record counts under maximum likelihood: a T with token length weighting, a with sequence.
- *share*: amount x w over the sum of that. It is the share of the factors dL/d log p(token) that fall to the record.
  For maximum likelihood (w = 1) it is the record's share of the tokens, or of the records.
- *logit share*: the same with each token's factor times the length of its log-probability's gradient with respect to
  the model's logits, which is near 0 for a token that is learned already. No backward pass is made, so what the
  gradient becomes further down in the network stays unknown.
- *update ratio*: sum of amount x w over the sum of amounts, the amount-weighted mean weight: how long the gradient is
  compared with maximum likelihood's if the records' gradients were alike in length and direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from convexlm.diagnosis.judged import describe_judged, wrong_share
from convexlm.diagnosis.optimum import exact_optimum, k_for_update_ratio
from convexlm.objective_slope import check_slope
from convexlm.objectives import Mle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convexlm.objectives import Objective

QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
NOTHING_BELOW = 0.01
"""A record with a smaller weight gets next to nothing: a hundredth of what maximum likelihood gives it."""
EXTREMES = 20
_GROUPS = 10


@dataclass(frozen=True, eq=False)
class Sample:
    """What is known of n records. Arrays are (n,) unless said otherwise.

    Attributes:
        lengths: T, target tokens, at least 1.
        m: mean log-probability, at most 0.
        weights: the records' own weights, at least 0.
        sources: where each is from, or None.
        log_probs: (sum of lengths,), every target's log-probability; needed for objectives of level token.
        logit_norms: as `log_probs`; see `Measurement`. Without it there are no logit shares.
        right: 1 where the answer was judged right, 0 where wrong, NaN where nobody has judged it; or None.
    """

    lengths: np.ndarray
    m: np.ndarray
    weights: np.ndarray
    sources: Sequence[str] | np.ndarray | None = None
    log_probs: np.ndarray | None = None
    logit_norms: np.ndarray | None = None
    right: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.lengths)
        named = n if self.sources is None else len(self.sources)  # an array has no truth of its own
        if n == 0 or len(self.m) != n or len(self.weights) != n or named != n:
            raise ValueError("lengths, m, weights and sources must be of one length, and not empty")
        if (self.lengths < 1).any() or not np.isfinite(self.m).all() or (self.weights < 0).any():
            raise ValueError("lengths must be at least 1, m finite and weights not negative")
        if self.right is not None and len(self.right) != n:
            raise ValueError("right must have one number a record")
        if not (self.weights > 0).any():
            raise ValueError("every record has the weight 0")
        for name in ("log_probs", "logit_norms"):
            values = getattr(self, name)
            if values is not None and len(values) != self.lengths.sum():
                raise ValueError(f"{name} must have one number a target token")

    def per_record(self, tokens: np.ndarray) -> np.ndarray:
        """The mean over each record's tokens of an array with one number a token."""
        return np.add.reduceat(tokens.astype(np.float64), self._starts) / self.lengths

    @property
    def owners(self) -> np.ndarray:
        """(sum of lengths,): the record of every token."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def _starts(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths


def analyse(sample: Sample, objectives: Sequence[tuple[str, Objective]]) -> dict[str, Any]:
    """Statistics of the data (`data`), and of every labelled objective (`objectives`, in order). JSON-ready.

    Raises:
        ValueError: as `analyse_objective`.
    """
    return {
        "data": describe_data(sample),
        "objectives": [{"label": label, **analyse_objective(sample, objective)} for label, objective in objectives],
    }


def describe_data(sample: Sample) -> dict[str, Any]:
    """The distribution of p̄ and of the lengths, under no objective. Records of weight 0 take no part."""
    used = sample.weights > 0
    p_bar, lengths, a = np.exp(sample.m[used]), sample.lengths[used], sample.weights[used]
    counts, edges = np.histogram(p_bar, bins=20, range=(0.0, 1.0))
    return {
        "num_records": int(used.sum()),
        "zero_weight": int((~used).sum()),
        "num_target_tokens": int(lengths.sum()),
        "nll": float(-(a * lengths * sample.m[used]).sum() / (a * lengths).sum()),
        "p_bar": {"mean": float(p_bar.mean()), "quantiles": quantiles(p_bar)},
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "lengths": {"mean": float(lengths.mean()), "quantiles": quantiles(lengths)},
        "sources": _source_counts(sample),
        "judged": describe_judged(sample),
    }


def analyse_objective(sample: Sample, objective: Objective) -> dict[str, Any]:
    """What one objective would do with the data; see the module for the words.

    Raises:
        ValueError: one of level token, and no log-probabilities of tokens; or one of a user's own whose weight is not
            minus the slope of its value, or negative or no number somewhere.
    """
    check_slope(objective)
    weights, units, repeats = record_weights(sample, objective)
    used = sample.weights > 0
    amounts = amounts_of(sample, objective.length_weighting)
    gradient = amounts * weights
    plain, logit = (_logit_amounts(sample, one, amounts) for one in (Mle(), objective))
    shares = {
        "share": _share(gradient),
        "mle_share": _share(amounts),
        "logit_share": None if logit is None else _share(logit),
        "mle_logit_share": None if plain is None else _share(plain),
    }

    def row(group: np.ndarray) -> dict[str, Any]:
        t = sample.lengths[group] * sample.weights[group]
        return {
            "records": len(group),
            "nll": float(-(t * sample.m[group]).sum() / t.sum()),
            "weight": float(gradient[group].sum() / amounts[group].sum()),
            **{name: None if share is None else float(share[group].sum()) for name, share in shares.items()},
        }

    def tenths(shown: np.ndarray, values: np.ndarray) -> list[dict[str, Any]]:
        return [{**_range(shown[group]), **row(group)} for group in _groups(sample, values)]

    square = float((repeats * units**2).sum() * repeats.sum())
    nothing = used & (weights < NOTHING_BELOW)
    order = np.lexsort((sample.m, weights))
    order = order[used[order]]
    few = min(EXTREMES, max(1, len(order) // 2))
    by_length = {name: _share(amounts_of(sample, name) * weights) for name in ("token", "sequence")}
    return {
        "objective": objective.to_dict(),
        "k": getattr(objective, "k", None),
        "weight": {
            "mean": float((repeats * units).sum() / repeats.sum()),
            "min": float(units[repeats > 0].min()),
            "max": float(units[repeats > 0].max()),
            "quantiles": quantiles(units[repeats > 0]),
            "effective_sample_size": min(1.0, float((repeats * units).sum()) ** 2 / square) if square else 0.0,
            "units": "tokens" if objective.level == "token" else "records",
        },
        "update_ratio": float(gradient.sum() / amounts.sum()),
        "logit_update_ratio": _logit_ratio(sample, objective, amounts),
        "gets_nothing": {
            "below": NOTHING_BELOW,
            "count": int(nothing.sum()),
            "share": float(nothing.sum() / used.sum()),
            "token_share": float(sample.lengths[nothing].sum() / sample.lengths[used].sum()),
        },
        "by_p_bar": tenths(np.exp(sample.m), sample.m),
        "by_length": tenths(sample.lengths, sample.lengths),
        "by_source": [{"source": name, **row(group)} for name, group in _source_groups(sample).items()],
        "wrong": None
        if sample.right is None
        else {name: wrong_share(sample, share) for name, share in shares.items()},
        "length_weighting": {
            "moved": float(np.abs(by_length["token"] - by_length["sequence"]).sum() / 2),
            "by_length": {
                name: [float(share[group].sum()) for group in _groups(sample, sample.lengths)]
                for name, share in by_length.items()
            },
        },
        "neglected": [_extreme(index, sample, weights) for index in order[:few]],
        "favoured": [_extreme(index, sample, weights) for index in order[::-1][:few]],
        "optimum": exact_optimum(sample.lengths[used], objective),
        "k_for_ratio": k_for_update_ratio(sample.m, amounts, objective),
    }


def record_weights(sample: Sample, objective: Objective) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each record's weight (at token level the mean over its tokens), the weights of all units, and their counts.

    The last two are what `ObjectiveOutput.statistics()` sums over: records, or tokens at token level, each as often as
    its record's weight says.
    """
    if objective.level != "token":
        lengths = torch.from_numpy(np.asarray(sample.lengths, dtype=np.float64))
        weights = _weights_at(objective.for_lengths(lengths), sample.m)
        return weights, weights, sample.weights
    if sample.log_probs is None:
        raise ValueError("an objective of level token needs the log-probabilities of the tokens")
    log_probs = sample.log_probs.astype(np.float64)
    units = _weights_at(objective.for_lengths(torch.ones(len(log_probs), dtype=torch.float64)), log_probs)
    return sample.per_record(units), units, sample.weights[sample.owners]


def amounts_of(sample: Sample, length_weighting: str) -> np.ndarray:
    """What every record counts under maximum likelihood."""
    return sample.weights * sample.lengths if length_weighting == "token" else sample.weights * 1.0


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Quantiles by their name: `0.05` is the value below which a twentieth lies."""
    return {f"{q:g}": float(value) for q, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}


def compare(before: Sample, after: Sample) -> dict[str, Any]:
    """NLL and p̄ of the same records before and after, by tenth of p̄ before, by source, and in all.

    Raises:
        ValueError: the two are not of the same records.
    """
    if not np.array_equal(before.lengths, after.lengths):
        raise ValueError("the two measurements are not of the same targets")
    used = before.weights > 0

    def row(group: np.ndarray) -> dict[str, Any]:
        t = before.lengths[group] * before.weights[group]
        nll = [float(-(t * x.m[group]).sum() / t.sum()) for x in (before, after)]
        p_bar = [float(np.exp(x.m[group]).mean()) for x in (before, after)]
        return {
            "records": len(group),
            "nll_before": nll[0],
            "nll_after": nll[1],
            "p_bar_before": p_bar[0],
            "p_bar_after": p_bar[1],
            "worse": float((after.m[group] < before.m[group]).mean()),
        }

    sources = _source_groups(before)
    return {
        "all": row(np.flatnonzero(used)),
        "by_p_bar": [{**_range(np.exp(before.m[g])), **row(g)} for g in _groups(before, before.m)],
        "by_source": [{"source": name, **row(group)} for name, group in sources.items()],
    }


def _weights_at(objective: Objective, m: np.ndarray) -> np.ndarray:
    found = objective.mixed_weight(torch.from_numpy(np.ascontiguousarray(m, dtype=np.float64)))
    weights: np.ndarray = found.detach().double().numpy()
    bad = ~((weights >= 0) & (weights < np.inf))
    if bad.any():
        raise ValueError(f"objective `{objective.name}`: weight(m) is negative or no number at m = {m[bad][0]:.4g}")
    return weights


def _share(values: np.ndarray) -> np.ndarray:
    total = values.sum()
    return values / total if total > 0 else np.zeros_like(values)


def _logit_amounts(sample: Sample, objective: Objective, amounts: np.ndarray) -> np.ndarray | None:
    if sample.logit_norms is None:
        return None
    return amounts * sample.per_record(sample.logit_norms * _token_weights(sample, objective))


def _token_weights(sample: Sample, objective: Objective) -> np.ndarray:
    weights, units, _ = record_weights(sample, objective)
    return units if objective.level == "token" else weights[sample.owners]


def _logit_ratio(sample: Sample, objective: Objective, amounts: np.ndarray) -> float | None:
    """The length of the loss's gradient with respect to all logits, over maximum likelihood's; exact."""
    if sample.logit_norms is None:
        return None
    plain = (amounts / sample.lengths)[sample.owners] * sample.logit_norms.astype(np.float64)
    weighted = plain * _token_weights(sample, objective)
    total = float(np.sqrt((plain**2).sum()))
    return float(np.sqrt((weighted**2).sum())) / total if total > 0 else None


def _groups(sample: Sample, values: np.ndarray) -> list[np.ndarray]:
    """Records in ten groups of nearly one size by a value (as many groups as records if they are fewer than ten)."""
    used = np.flatnonzero(sample.weights > 0)
    order = used[np.argsort(values[used], kind="stable")]
    return np.array_split(order, min(_GROUPS, len(order)))


def _range(values: np.ndarray) -> dict[str, float]:
    return {"from": float(values.min()), "to": float(values.max())}


def _source_groups(sample: Sample) -> dict[str, np.ndarray]:
    """Records by source, the largest first, without those of weight 0."""
    if sample.sources is None:
        return {}
    names = np.asarray(sample.sources, dtype=object)
    used = sample.weights > 0
    groups = {str(name): np.flatnonzero((names == name) & used) for name in dict.fromkeys(sample.sources)}
    return dict(sorted(((n, g) for n, g in groups.items() if len(g)), key=lambda item: (-len(item[1]), item[0])))


def _source_counts(sample: Sample) -> dict[str, int] | None:
    return None if sample.sources is None else {name: len(group) for name, group in _source_groups(sample).items()}


def _extreme(index: int, sample: Sample, weights: np.ndarray) -> dict[str, Any]:
    return {
        "index": int(index),
        "weight": float(weights[index]),
        "p_bar": float(np.exp(sample.m[index])),
        "tokens": int(sample.lengths[index]),
    }
