"""The distribution that an objective wants: `optimum`, in closed form where there is one and by solving otherwise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from convexlm.objective_slope import check_slope
from convexlm.objectives import Convex, Mle, Objective, Power
from convexlm.theory.problem import Floats, Problem, as_objective, check_lengths, check_probabilities, values_at
from convexlm.theory.solver import solve

if TYPE_CHECKING:
    from collections.abc import Sequence

CLOSED_FORM, SOLVED = "closed form", "solved"


@dataclass(frozen=True, eq=False)
class Optimum:
    """The distribution over candidates at which the expected loss is least.

    Attributes:
        probabilities: float64 (n,), in the order of the data, summing to 1.
        log_probabilities: float64 (n,), exact also where a probability underflows; -inf for a true 0.
        entropy: of `probabilities`, in nats.
        mode_mass: the probability of the data's most probable candidates: the largest at them, where several tie.
        temperature: tau, if the optimum is the data at that temperature (p proportional to d^(1/tau)); 0 where the
            data's mode has everything; None where no single temperature describes it.
        method: "closed form" or "solved".
        concave: whether the problem is concave, so that every local optimum is this one.
        kkt_residual: how far p is from stationary and from sum 1: the largest |slope_i / lambda - 1| of a candidate
            with mass, (slope_i / lambda - 1)+ of one without, and |sum - 1|.
        expected_loss: at the optimum, in the scale of `Objective.__call__`'s loss.
        notes: what a reader should know of this answer, as sentences; often empty.
    """

    probabilities: Floats
    log_probabilities: Floats
    entropy: float
    mode_mass: float
    temperature: float | None
    method: str
    concave: bool
    kkt_residual: float
    expected_loss: float
    notes: tuple[str, ...] = ()


def optimum(
    probabilities: Sequence[float] | Floats,
    lengths: float | Sequence[float] | Floats,
    objective: str | Objective = "convex",
    **settings: Any,
) -> Optimum:
    """The minimum over the whole simplex of the expected loss, for a model free to choose any distribution.

    Args:
        probabilities: the data's distribution d over the candidate answers to one prompt, (n,), sum 1 within 1e-6.
        lengths: target tokens T of every candidate: one number for all, or one each. A model that gives a candidate
            the probability p gives it the mean log-probability log(p) / T.
        objective: an objective, or a name for `get_objective` with `settings` (`k`, `mle_mix`, ...). At level "token"
            the candidates are taken to part at one token, what follows being certain, so T is 1 but for weighting.
        **settings: the named objective's.

    Ties: at k = T (convex) all mixtures of the tied modes are equally good and their even mixture is returned. At
    k > T, and wherever else a single one must win, the first of the tied is returned and `notes` says so.

    Raises:
        ValueError: no distribution, lengths that do not fit, an unknown objective, or a registered objective whose
            weight is not minus the slope of its value.
    """
    d = check_probabilities(probabilities)
    all_lengths = check_lengths(lengths, len(d))
    chosen = as_objective(objective, settings)
    held = d > 0
    problem = Problem.of(d[held], all_lengths[held], chosen)
    if type(chosen) not in (Mle, Convex, Power):
        check_slope(chosen)
    notes = []
    if chosen.level == "token" and bool((all_lengths != 1).any()):
        notes.append("level token: candidates are taken to part at one token, what follows being certain")

    log_p, method, concave, upper = _closed_form(problem)
    if log_p is None:
        solution = solve(problem)
        log_p, concave, upper = solution.log_p, solution.concave, solution.upper
        if not solution.exact:
            notes.append("the objective's shape is unusual: the best of many searches, which may miss a better one")
    if not concave:
        notes.append("not concave: this is the global optimum; training may end at a local one, if there are others")
    if upper is not None:
        tied = (problem.log_a == problem.log_a[upper]) & (problem.lengths == problem.lengths[upper])
        if tied.sum() > 1:
            notes.append(f"{tied.sum()} candidates tie, each with an optimum as good; this is the first one's")
    elif problem.convex_k is not None and (log_p == log_p.max()).sum() > 1 and _hard_ties(problem):
        notes.append("tied candidates share evenly; any other split between them is as good")
    units = 1.0 if chosen.level == "token" else float(all_lengths[held][np.argmax(log_p)])
    if type(chosen) is Power and chosen.k < 1 and -log_p.max() / units < chosen.eps and len(log_p) > 1:
        notes.append(f"power by its formula; in training it is a parabola where -m < {chosen.eps:g}, as at this mode")
    full = np.full(len(d), -np.inf)
    full[held] = log_p
    p = np.exp(full)
    if problem.is_likelihood:  # without the detour over logarithms, so that equal lengths give d to the last digit
        p = d / all_lengths if chosen.length_weighting == "sequence" and not _equal(all_lengths) else d
    p = p / math.fsum(p)
    return Optimum(
        probabilities=p,
        log_probabilities=full,
        entropy=entropy(p),
        mode_mass=float(p[d == d.max()].max()),
        temperature=_temperature(problem),
        method=method,
        concave=concave,
        kkt_residual=kkt_residual(problem, log_p),
        expected_loss=_loss(d, all_lengths, chosen, full),
        notes=tuple(notes),
    )


def _closed_form(problem: Problem) -> tuple[Floats | None, str, bool, int | None]:
    """(log p, method, concave, the candidate that takes all or None); log p is None where it must be solved for."""
    log_a, k = problem.log_a, problem.convex_k
    length = float(problem.lengths[0])
    if len(log_a) == 1:
        return np.zeros(1), CLOSED_FORM, True, None
    if problem.is_likelihood:
        return log_a - np.logaddexp.reduce(log_a), CLOSED_FORM, True, None
    if k is None or not _equal(problem.lengths):
        return None, SOLVED, True, None
    largest = int(np.argmax(log_a))
    if k < length:
        # (length - k) is exact where they are near, 1 - k / length is not; relative to the largest nothing overflows.
        log_p = (log_a - log_a[largest]) * (length / (length - k))
        return log_p - np.logaddexp.reduce(log_p), CLOSED_FORM, True, None
    winners = log_a == log_a[largest]
    if k > length:
        winners = np.arange(len(log_a)) == largest
    log_p = np.where(winners, -math.log(winners.sum()), -np.inf)
    return log_p, CLOSED_FORM, k == length, largest if k > length else None


def _equal(values: Floats) -> bool:
    return bool((values == values[0]).all())


def _hard_ties(problem: Problem) -> bool:
    """Whether terms are linear in p, so that mass may move between equal ones at no cost."""
    k = problem.convex_k
    tied = problem.lengths == k
    return bool(tied.sum() > 1) and len(np.unique(problem.log_a[tied])) < tied.sum()


def _temperature(problem: Problem) -> float | None:
    k, lengths = problem.convex_k, problem.lengths
    if k is not None and _equal(lengths):
        return max(float((lengths[0] - k) / lengths[0]), 0.0) if k <= lengths[0] else None
    return 1.0 if problem.is_likelihood else None


def kkt_residual(problem: Problem, log_p: Floats) -> float:
    """The largest violation of the conditions of optimality, relative to the common slope; see `Optimum`."""
    slope = np.full(len(log_p), -np.inf)
    held = log_p > -np.inf
    slope[held] = problem.log_slope(log_p[held], problem.log_a[held], problem.lengths[held])
    if (~held).any():
        bottom = np.full(int((~held).sum()), -700.0)
        slope[~held] = problem.log_slope(bottom, problem.log_a[~held], problem.lengths[~held])
    reference = slope[np.argmax(log_p)]
    # One candidate alone has p = 1, where the slope of power is infinite: infinity less infinity is no violation.
    with np.errstate(invalid="ignore"):
        off = np.expm1(np.where(slope == reference, 0.0, np.minimum(slope - reference, 700.0)))
    wrong = np.where(held, np.abs(off), np.maximum(off, 0.0))
    return max(float(wrong.max()), abs(math.fsum(np.exp(log_p)) - 1))


def entropy(probabilities: Sequence[float] | Floats) -> float:
    """Shannon entropy in nats; 0 log 0 is 0."""
    p = np.asarray(probabilities, dtype=np.float64)
    p = p[p > 0]
    return max(0.0, -math.fsum(p * np.log(p)))


def expected_loss(
    probabilities: Sequence[float] | Floats,
    model_probabilities: Sequence[float] | Floats,
    lengths: float | Sequence[float] | Floats,
    objective: str | Objective = "convex",
    **settings: Any,
) -> float:
    """The data's expectation of the loss when the model gives the candidates these probabilities; may be inf.

    Equal to `Objective.__call__`'s loss on all candidates with sample weights d, but that `power` is taken by its
    formula where -m < 1e-4 too. Arguments as in `optimum`.

    Raises:
        ValueError: as `optimum`.
    """
    d, p = check_probabilities(probabilities), check_probabilities(model_probabilities)
    if len(d) != len(p):
        raise ValueError(f"{len(d)} data probabilities but {len(p)} of the model")
    with np.errstate(divide="ignore"):
        return _loss(d, check_lengths(lengths, len(d)), as_objective(objective, settings), np.log(p))


def _loss(d: Floats, lengths: Floats, objective: Objective, log_p: Floats) -> float:
    held = d > 0
    d, lengths, log_p = d[held], lengths[held], log_p[held]
    by_length, by_token = objective.length_weighting == "token", objective.level == "token"
    value = values_at(objective, log_p if by_token else log_p / lengths)
    # At token level one token of a candidate has a loss; at sequence level each of its T has, with token weighting.
    share = np.ones_like(d) if by_token else lengths
    share = share if by_length else share / lengths
    return float(math.fsum(d * share * value)) / (float(math.fsum(d * lengths)) if by_length else 1.0)
