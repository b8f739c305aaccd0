"""Training objectives: decreasing functions of a sequence's mean log-probability, and the loss of a batch under them.

Let m be the mean of a sequence's target log-probabilities l_1 .. l_T. An objective is a function `value(m)` with
`value(0) = 0`; its slope `weight(m) = -d value/dm` is the factor on the sequence's gradient. All this is pure torch.

To add one, from anywhere, and select it by name:

    @register_objective("reciprocal")
    @dataclass(frozen=True, kw_only=True)
    class Reciprocal(Objective):
        def value(self, m): return m / (m - 1)
        def weight(self, m): return 1 / (m - 1) ** 2
"""

from __future__ import annotations

import inspect
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from convexlm.objective_batch import check_inputs, check_number, denominator, number_sequences, spread_sample_weights
from convexlm.objective_statistics import MINIMUM_STATISTICS, ObjectiveOutput, merge_statistics, summarize

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "MINIMUM_STATISTICS",
    "Convex",
    "Mle",
    "Objective",
    "ObjectiveOutput",
    "Power",
    "get_objective",
    "merge_statistics",
    "objective_names",
    "register_objective",
    "summarize",
    "warmed_up",
]

IGNORE_INDEX = -100  # the label of a position that is no target, as in transformers
_SMALLEST_K = 1e-12

_Class = TypeVar("_Class", bound="type[Objective]")
_registry: dict[str, type[Objective]] = {}
# DFT (arXiv 2508.05629) has exactly the gradient of token-level convex with k = 1.
_aliases: dict[str, tuple[str, dict[str, Any]]] = {"dft": ("convex", {"level": "token", "k": 1.0})}


def register_objective(name: str) -> Callable[[_Class], _Class]:
    """Class decorator: make an `Objective` subclass known under `name`; ValueError if the name is another class's."""

    def register(cls: _Class) -> _Class:
        if not (isinstance(cls, type) and issubclass(cls, Objective)):
            raise ValueError(f"objective `{name}`: {cls!r} is not a subclass of Objective")
        known = _registry.get(name)
        if name in _aliases or (
            known and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__)
        ):
            raise ValueError(f"objective `{name}` exists already; choose another name")
        if inspect.get_annotations(cls) and "__dataclass_fields__" not in cls.__dict__:
            raise ValueError(f"objective `{name}`: put @dataclass(frozen=True, kw_only=True) right above the class")
        cls.name = name
        _registry[name] = cls
        return cls

    return register


def objective_names() -> list[str]:
    """The names that `get_objective` takes, sorted."""
    return sorted([*_registry, *_aliases])


def get_objective(name: str, **settings: Any) -> Objective:
    """The objective of that name; ValueError for an unknown name, an unknown setting or a bad value."""
    if name in _aliases:
        target, fixed = _aliases[name]
        for key, value in fixed.items():
            if settings.setdefault(key, value) != value:
                raise ValueError(
                    f"objective `{name}` is `{target}` with {key}={value!r}; {key}={settings[key]!r} is not it"
                )
        name = target
    if name not in _registry:
        raise ValueError(f"unknown objective `{name}`; known: {', '.join(objective_names())}")
    cls = _registry[name]
    known_settings = [f.name for f in fields(cls) if f.init]
    for key in settings:
        if key not in known_settings:
            raise ValueError(f"objective `{name}` has no setting `{key}`; it has: {', '.join(known_settings)}")
    return cls(**settings)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """An objective and how it averages a batch. A subclass defines `value` and `weight`, elementwise in m <= 0.

    Attributes:
        level: "sequence" applies the function to each sequence's mean log-probability, "token" to each token's own.
        length_weighting: "token" weighs sequences by their target tokens, "sequence" weighs them alike.
        mle_mix: a in [0, 1]; the objective becomes (1 - a) value(m) - a m, which keeps every weight at a or above.
    """

    name: ClassVar[str] = ""

    level: str = "sequence"
    length_weighting: str = "token"
    mle_mix: float = 0.0

    def __post_init__(self) -> None:
        for setting in ("level", "length_weighting"):
            if getattr(self, setting) not in ("sequence", "token"):
                raise ValueError(f"{setting} must be 'sequence' or 'token', not {getattr(self, setting)!r}")
        check_number("mle_mix", self.mle_mix, 0.0, 1.0)

    def value(self, m: Tensor) -> Tensor:
        """The pure function of the mean log-probability m (any shape, float64 in training): 0 at 0, decreasing."""
        raise NotImplementedError(f"{type(self).__name__} must define value(m)")

    def weight(self, m: Tensor) -> Tensor:
        """The slope -d value/dm, elementwise: the factor on the gradient of a sequence (or token)."""
        raise NotImplementedError(f"{type(self).__name__} must define weight(m)")

    def mixed_value(self, m: Tensor) -> Tensor:
        """`value` with `mle_mix` applied: what training minimises."""
        a = self.mle_mix
        return self.value(m) if a == 0 else (1 - a) * self.value(m) - a * m

    def mixed_weight(self, m: Tensor) -> Tensor:
        """`weight` with `mle_mix` applied."""
        a = self.mle_mix
        return self.weight(m) if a == 0 else (1 - a) * self.weight(m) + a

    def at_warmup(self, fraction: float) -> Objective:
        """The objective `fraction` of the way from maximum likelihood; one without a k stays as it is."""
        return self

    def for_lengths(self, lengths: Tensor) -> Objective:
        """The objective of sequences with these numbers of target tokens: itself, unless a subclass says otherwise.

        Args:
            lengths: (n,) float64, at least 1; all 1 at level "token". What is returned is then asked for `value` and
                `weight` at m of the same shape.
        """
        return self

    def to_dict(self) -> dict[str, Any]:
        """Name and settings, JSON-ready; `get_objective(**d)` gives the objective back."""
        return {"name": self.name, **asdict(self)}

    def __call__(
        self,
        log_probs: Tensor,
        mask: Tensor,
        sequence_ids: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        sample_weights: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Loss and statistics of a batch. dL/d l_it = -a_i weight / normalizer, and over T_i for sequence weighting.

        Means and sums are taken in float64 (float32 on mps), whatever the input's dtype. Masked positions may hold
        anything, NaN included, and get a gradient of exactly 0; without any target the loss is a 0 with a graph.

        Args:
            log_probs: (batch, length) or flat (N,), floating: log-probability of each label token.
            mask: bool, same shape: True on target tokens.
            sequence_ids: integers, same shape: which sequence of its row a token belongs to; any values, also at
                masked places. Sequences come out in order of first appearance, and only those with a target token.
                Without ids a row (or the whole flat input) is one sequence, and rows without targets come out too.
            normalizer: replaces the denominator: target tokens (or sequences, for sequence weighting) of the global
                batch, counted with their sample weights. A number or a tensor of one element.
            sample_weights: a_i >= 0, as if sequence i occurred a_i times; 0 masks it. (batch,) without ids, or in the
                shape of `log_probs` and constant within each sequence.

        Raises:
            ValueError: shapes or dtypes do not fit, or a sample weight or the normalizer is negative or not finite.
        """
        check_inputs(log_probs, mask, sequence_ids)
        segments, count = number_sequences(mask, sequence_ids)
        return self.over_segments(
            log_probs, mask, segments, count, normalizer, sample_weights, by_token_weights=sequence_ids is not None
        )

    def over_segments(
        self,
        log_probs: Tensor,
        mask: Tensor,
        segments: Tensor,
        count: int,
        normalizer: float | Tensor | None = None,
        sample_weights: Tensor | None = None,
        *,
        by_token_weights: bool = True,
    ) -> ObjectiveOutput:
        """As `__call__`, for sequences that are numbered already, which spares a GPU the stalls of numbering them.

        Args:
            log_probs: as in `__call__`.
            mask: as in `__call__`.
            segments: int64, flat: the number of every token's sequence, from 0; `count` at masked places.
            count: how many sequences there are.
            normalizer: as in `__call__`.
            sample_weights: as in `__call__`.
            by_token_weights: whether sample weights come one a token only, as they do beside `sequence_ids`.

        Raises:
            ValueError: as `__call__`, but for shapes and dtypes, which are not looked at.
        """
        dtype = torch.float32 if log_probs.device.type == "mps" else torch.float64
        result_dtype = torch.float64 if log_probs.dtype == torch.float64 else torch.float32
        by_token, by_length = self.level == "token", self.length_weighting == "token"

        def total(x: Tensor) -> Tensor:
            # Unlike index_add, an accumulating index_put has a fixed order of summation on CUDA too.
            return x.new_zeros(count + 1).index_put((segments,), x, accumulate=True)[:count]

        used, token_weights = mask.flatten(), None
        if sample_weights is not None:
            token_weights = spread_sample_weights(sample_weights, mask, segments, count, by_token_weights, dtype)
            used = used & (token_weights > 0)
        a_token = used.to(dtype) if token_weights is None else torch.where(used, token_weights, 0.0)

        # The value at a place that takes no part is never used; -1 is one at which no objective has a pole.
        log_p = torch.where(used, log_probs.flatten().to(dtype), 0.0)
        lengths = total(used.to(dtype))
        present = lengths > 0
        sums = total(log_p)
        means = torch.where(present, sums / lengths.clamp(min=1), -1.0)
        weighted_lengths = total(a_token)
        a_sequence = weighted_lengths / lengths.clamp(min=1)
        tokens, sequences = weighted_lengths.sum(), a_sequence.sum()

        points = torch.where(used, log_p, -1.0) if by_token else means
        here = used if by_token else present
        repeats = a_token if by_token else a_sequence
        function = self.for_lengths(torch.ones_like(points) if by_token else lengths.clamp(min=1))
        values, weights = function.mixed_value(points), function.mixed_weight(points.detach())
        if not values.shape == weights.shape == points.shape:
            raise ValueError(
                f"objective `{self.name}` has to give a value and a weight for each of the {len(points)} numbers m, "
                f"not {tuple(values.shape)} and {tuple(weights.shape)}; it must be elementwise in m"
            )
        values, weights = torch.where(here, values, 0.0), torch.where(here, weights, 0.0)
        share = repeats
        if by_token and not by_length:
            share = repeats / torch.cat([lengths.clamp(min=1), lengths.new_ones(1)])[segments]
        elif by_length and not by_token:
            share = weighted_lengths
        loss_sum = (share * values).sum()
        own = tokens if by_length else sequences
        loss = loss_sum / denominator(normalizer, own)

        infinity = weights.new_full((1,), math.inf)
        statistics = {
            "loss_sum": loss_sum.detach(),
            "normalizer": own,
            "tokens": tokens,
            "sequences": sequences,
            "nll_sum": -(a_sequence * torch.where(present, sums.detach(), 0.0)).sum(),
            "weight_sum": (repeats * weights).sum(),
            "weight_sq_sum": (repeats * weights**2).sum(),
            "units": repeats.sum(),
            "num_tokens": lengths.sum(),
            "num_sequences": present.sum().to(dtype),
            "weight_min": torch.cat([torch.where(here, weights, math.inf), infinity]).min(),
        }
        return ObjectiveOutput(
            loss=loss.to(result_dtype),
            weights=weights.to(result_dtype).reshape(log_probs.shape if by_token else (count,)),
            mean_log_probs=torch.where(present, means.detach(), 0.0).to(result_dtype),
            lengths=lengths.long(),
            num_tokens=lengths.sum().long(),
            num_sequences=present.sum(),
            normalizer=own,
            _statistics=statistics,
        )

    def as_compute_loss_func(self, *, sequences_per_batch: int | None = None) -> Callable[..., Tensor]:
        """A `compute_loss_func` for a plain `transformers.Trainer` with a causal model and one sequence a row.

        Args:
            sequences_per_batch: sequences of one optimizer step over all accumulation steps and ranks, needed to train
                with sequence weighting, for the Trainer counts tokens only. Use `dataloader_drop_last` with it, so
                that every step has as many.
        """
        if sequences_per_batch is not None:
            check_number("sequences_per_batch", sequences_per_batch, 1)

        from convexlm.objective_trainer import compute_loss_func

        return compute_loss_func(self, sequences_per_batch)


@register_objective("mle")
@dataclass(frozen=True, kw_only=True)
class Mle(Objective):
    """Maximum likelihood: value -m, weight 1. Its `level` changes only the units of the weight statistics."""

    def value(self, m: Tensor) -> Tensor:
        """-m."""
        return -m

    def weight(self, m: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(m)


@register_objective("convex")
@dataclass(frozen=True, kw_only=True)
class Convex(Objective):
    """The exponential composition of arXiv 2310.17217, shifted and scaled: value (1 - exp(k m)) / k, weight exp(k m).

    Tends to `mle` as k -> 0. At token level it is the family (1 - p^k) / k of arXiv 2510.00526.
    """

    k: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("k", self.k, _SMALLEST_K, hint="; for k -> 0 use `mle`")

    def value(self, m: Tensor) -> Tensor:
        """(1 - exp(k m)) / k."""
        x = self.k * m
        # expm1 alone is exact in value, but its derivative (expm1 + 1) loses all digits of a small weight.
        return torch.where(x > -0.5, -x.clamp(min=-0.5).expm1(), 1 - x.exp()) / self.k

    def weight(self, m: Tensor) -> Tensor:
        """exp(k m)."""
        return (self.k * m).exp()

    def at_warmup(self, fraction: float) -> Objective:
        """With k times `fraction`; maximum likelihood at 0."""
        k = self.k * check_number("fraction", fraction, 0.0, 1.0)
        return replace(self, k=k) if k >= _SMALLEST_K else Mle(**_common_settings(self))


@register_objective("power")
@dataclass(frozen=True, kw_only=True)
class Power(Objective):
    """The composition with -(-m)^k: value (-m)^k / k, weight (-m)^(k-1), for 0 < k <= 1; k = 1 is `mle`.

    The weight would diverge at m = 0. So for u = -m below eps = 1e-4 the value is the parabola a u + b u^2 instead,
    which meets it with equal value and slope at eps: a = eps^(k-1) (2/k - 1), b = eps^(k-2) (1 - 1/k). Value and
    weight are continuous, `value(0)` is 0, and no weight exceeds a (300 for k = 0.5).
    """

    k: float = 0.5
    eps: ClassVar[float] = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("k", self.k, _SMALLEST_K, 1.0)

    def _parabola(self) -> tuple[float, float]:
        return self.eps ** (self.k - 1) * (2 / self.k - 1), self.eps ** (self.k - 2) * (1 - 1 / self.k)

    def value(self, m: Tensor) -> Tensor:
        """(-m)^k / k, and the parabola near 0."""
        a, b = self._parabola()
        u = -m
        near = u.clamp(max=self.eps)  # each branch sees only arguments of its own, so that neither overflows
        return torch.where(u < self.eps, a * near + b * near**2, u.clamp(min=self.eps) ** self.k / self.k)

    def weight(self, m: Tensor) -> Tensor:
        """(-m)^(k-1), and the parabola's slope near 0."""
        a, b = self._parabola()
        u = -m
        near = u.clamp(max=self.eps)
        return torch.where(u < self.eps, a + 2 * b * near, u.clamp(min=self.eps) ** (self.k - 1))

    def at_warmup(self, fraction: float) -> Objective:
        """With k on the straight line from 1 (maximum likelihood) to its own."""
        return replace(self, k=1 + (self.k - 1) * check_number("fraction", fraction, 0.0, 1.0))


def warmed_up(objective: Objective, fraction: float) -> Objective:
    """The objective with k ramped up: maximum likelihood at fraction 0, itself at 1; without a k, always itself."""
    check_number("fraction", fraction, 0.0, 1.0)
    return objective.at_warmup(fraction)


def _common_settings(objective: Objective) -> dict[str, Any]:
    return {f.name: getattr(objective, f.name) for f in fields(Objective)}
