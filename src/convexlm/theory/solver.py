"""The global maximum of a separable problem over the simplex, also where it is not concave.

The slope of one term, as a function of p, falls on a first stretch ("lower branch", where the term is concave) and
for some objectives rises after it ("upper branch"). At a local maximum at most one candidate lies where its slope
rises, or moving mass between two such would gain. So there is one problem with every candidate on its lower branch,
solved by bisection on the common slope lambda, and one for each candidate that might lie above, solved by scanning
its own p. Among candidates of one length the terms differ by a factor only, so by rearrangement only the largest of
them may lie above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from convexlm.objectives import Convex, Mle, Power
from convexlm.theory.problem import LOWEST, Floats, Problem, log_weight

if TYPE_CHECKING:
    from collections.abc import Callable

_DEEP = -1e6  # the lowest log-probability that is looked at where the log-slope is known without underflow
_BISECTIONS = 100
_SECTIONS = 64  # a bracket is cut into as many parts at once, for one numpy call costs as much as sixty-four
_SAME = 1e-9  # a rise of the log-slope by less is rounding
# Logits of the scanned candidate's probability. `power` with a small k leaves the others as little as exp(-600).
_LOGITS = np.concatenate([np.linspace(LOWEST, -21, 120), np.linspace(-20, 42, 621), np.linspace(44, 700, 329)])


@dataclass(frozen=True, eq=False)
class Solution:
    """log p (n,), whether the problem is concave, and which candidate lies on its upper branch (or None)."""

    log_p: Floats
    concave: bool
    upper: int | None
    exact: bool = True


def solve(problem: Problem) -> Solution:
    """The global maximum; `exact` is False if the objective's shape is one for which only searching remains."""
    ends = np.empty_like(problem.lengths)
    regular = True
    for length in np.unique(problem.lengths):
        end, as_assumed = lower_branch_end(problem, float(length))
        ends[problem.lengths == length] = end
        regular &= as_assumed
    found: list[tuple[Floats, int | None]] = []
    everyone = _common_slope(problem, ends)
    if everyone is not None:
        found.append((everyone, None))
    concave = bool((ends == 0).all())
    if not concave:
        for length in np.unique(problem.lengths[ends < 0]):
            same = np.flatnonzero(problem.lengths == length)
            largest = int(same[np.argmax(problem.log_a[same])])
            found += [(log_p, largest) for log_p in _scan(problem, ends, largest)]
        if not regular:
            found += [(log_p, None) for log_p in _search(problem)]
    best = max(found, key=lambda entry: problem.total(entry[0]))
    return Solution(best[0], concave, best[1], regular)


def lower_branch_end(problem: Problem, length: float) -> tuple[float, bool]:
    """The log-probability up to which the slope falls (0: everywhere, -inf: nowhere), and whether the shape is known.

    Known is: it falls, then rises up to p = 1; or whatever it does, does so above p = 1/2 only.
    """
    k = problem.convex_k
    if k is not None:
        return (0.0 if k <= length else -math.inf), True
    bottom = _bottom(problem)
    grid = np.concatenate([-np.geomspace(-bottom, 1e-9, 6000), [0.0]])

    def slope(x: Floats) -> Floats:
        return problem.log_slope(x, np.zeros_like(x), np.full_like(x, length))

    values = slope(grid)
    lowest = np.minimum.accumulate(values)
    rising = values > lowest + _SAME
    if not rising.any():
        return 0.0, True
    first = int(np.argmax(rising))
    turn = int(np.argmin(values[:first]))
    if turn == 0:
        return -math.inf, _rises(values)
    low, high = grid[turn - 1], grid[min(turn + 1, len(grid) - 1)]
    for _ in range(_BISECTIONS):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        a, b = slope(np.array([left, right]))
        low, high = (low, right) if a <= b else (left, high)
    end = float((low + high) / 2)
    return end, end > -math.log(2) or _rises(values[turn:])


def _rises(values: Floats) -> bool:
    return bool((values[1:] >= values[:-1] - _SAME).all())


def _bottom(problem: Problem) -> float:
    return _DEEP if type(problem.objective) in (Mle, Convex, Power) else LOWEST


def lower_branch(problem: Problem, log_slope: Floats, ends: Floats) -> Floats:
    """Where, on the lower branch, each candidate's slope is exp(log_slope) (..., 1): its log p (..., n)."""
    log_a, lengths = problem.log_a, problem.lengths
    shape = np.broadcast_shapes(log_slope.shape, log_a.shape)
    k = problem.convex_k
    if k is not None:
        rest = np.where(lengths == k, 1.0, lengths - k)
        gap = log_a - log_slope
        log_p = np.minimum(gap * (lengths / rest), 0.0)
        log_p = np.where(lengths == k, np.where(gap >= 0, 0.0, -np.inf), log_p)
        return np.broadcast_to(np.where(lengths < k, -np.inf, log_p), shape)
    bottom = _bottom(problem)
    high = np.broadcast_to(np.maximum(ends, bottom), shape).copy()
    low = np.full(shape, bottom)
    at_end = problem.log_slope(high, log_a, lengths) >= log_slope
    at_bottom = (problem.log_slope(low, log_a, lengths) < log_slope) | np.isneginf(ends)
    top = high.copy()
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        above = problem.log_slope(middle, log_a, lengths) > log_slope
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(at_bottom, -np.inf, np.where(at_end, top, high))


def _common_slope(problem: Problem, ends: Floats) -> Floats | None:
    """Everyone on the lower branch with one slope and total mass 1; None if their branches cannot hold the mass."""
    reached = ends > -math.inf
    if not reached.any():
        return None
    log_a, lengths, top = problem.log_a[reached], problem.lengths[reached], ends[reached]
    at_end = problem.log_slope(top, log_a, lengths)
    at_share = problem.log_slope(np.minimum(top, -math.log(len(ends))), log_a, lengths)

    def mass(log_slope: Floats) -> Floats:
        return np.exp(lower_branch(problem, log_slope[:, None], ends)).sum(-1) - 1

    low, high = float(at_end.min()), float(at_share.max())
    if mass(np.array([low]))[0] < 0:
        return None
    low, high = _bracket(mass, low, high + _SAME)
    more, less = (lower_branch(problem, np.array([x]), ends) for x in (low, high))
    excess, gap = np.exp(more).sum() - 1, 1 - np.exp(less).sum()
    if excess + gap == 0:
        return less
    # Where the mass jumps (terms that are linear in p) any point between is optimal; this one shares it evenly.
    share = gap / (excess + gap)
    p = np.exp(less) + share * (np.exp(more) - np.exp(less))
    with np.errstate(divide="ignore"):
        return np.where(p == np.exp(less), less, np.log(p))


def _scan(problem: Problem, ends: Floats, j: int) -> list[Floats]:
    """The stationary points with candidate j above its lower branch, and the corner where it has everything."""
    others = np.delete(np.arange(len(ends)), j)
    rest = Problem(problem.log_a[others], problem.lengths[others], problem.objective)

    def place(logit: Floats) -> tuple[Floats, Floats]:
        log_p = -np.logaddexp(0, -logit)
        slope = problem.log_slope(log_p, problem.log_a[j], problem.lengths[j])
        return log_p, lower_branch(rest, slope[:, None], ends[others])

    def excess(logit: Floats) -> Floats:
        log_p, log_rest = place(logit)
        return np.exp(log_rest).sum(-1) + np.expm1(log_p)

    def shortage(logit: Floats) -> Floats:
        return -excess(logit)

    start = LOWEST
    if ends[j] > LOWEST:
        start = ends[j] - math.log(-math.expm1(ends[j]))
    grid = np.concatenate([[start], _LOGITS[start < _LOGITS]])
    values = excess(grid)
    found: list[Floats] = []
    for i in np.flatnonzero((values[:-1] > 0) != (values[1:] > 0)):
        falling = values[i] > 0
        low, high = _bracket(excess if falling else shortage, float(grid[i]), float(grid[i + 1]))
        log_p, log_rest = place(np.array([low, high]))
        point = np.empty(len(ends))
        point[j], point[others] = log_p[1], log_rest[1]
        # The sign also changes where linear terms make the mass jump past 1: that is no point of the simplex.
        if abs(np.exp(point).sum() - 1) < _SAME:
            found.append(point)
    if values[-1] < 0:  # the others would have less still: this is as near to the corner as numbers go
        log_p, log_rest = place(grid[-1:])
        point = np.empty(len(ends))
        point[j], point[others] = log_p[0], log_rest[0]
        found.append(point)
    # Last, for of equal totals the first is taken: a point so near to the corner that no total tells them apart is
    # the stationary one.
    corner = np.full(len(ends), -np.inf)
    corner[j] = 0.0
    return [*found, corner]


def _bracket(function: Callable[[Floats], Floats], low: float, high: float) -> tuple[float, float]:
    """The neighbouring floats between which `function` goes from >= 0 (at `low`) to below 0 (at `high`)."""
    for _ in range(14):
        points = np.unique(np.linspace(low, high, _SECTIONS + 1))
        if len(points) <= 2:
            break
        below = function(points[1:-1]) < 0
        cut = int(np.argmax(below)) + 1 if below.any() else len(points) - 1
        low, high = float(points[cut - 1]), float(points[cut])
    return low, high


def _search(problem: Problem) -> list[Floats]:
    """Local maxima from many starts in logits (L-BFGS), for shapes that nothing is known of."""
    from scipy.optimize import minimize

    n = len(problem.log_a)
    rng = np.random.default_rng(0)

    def loss(logits: Floats) -> tuple[float, Floats]:
        log_p = logits - np.logaddexp.reduce(logits)
        pull = np.exp(problem.log_a + log_weight(problem.objective, log_p / problem.lengths))
        return -problem.total(log_p), -(pull - np.exp(log_p) * pull.sum())

    starts = [np.zeros(n), problem.log_a, *(4.0 * np.eye(n)[: min(n, 64)]), *(12.0 * np.eye(n)[: min(n, 64)])]
    starts += list(rng.normal(scale=3.0, size=(32, n)))
    points = []
    for start in starts:
        result = minimize(
            loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 0, "gtol": 1e-12}
        )
        points.append(result.x - np.logaddexp.reduce(result.x))
    return points
