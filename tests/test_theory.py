"""What `theory` says of optima: against brute force, algebra, and what must hold for any input."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from convexlm.objectives import Objective, get_objective, objective_names, register_objective
from convexlm.theory import (
    CLOSED_FORM,
    SOLVED,
    entropy,
    expected_loss,
    optimum,
)
from convexlm.theory.problem import Problem
from convexlm.theory.solver import solve

D = np.array([0.4, 0.3, 0.2, 0.1])
UNEQUAL = [5.0, 10.0, 10.0, 20.0]


# -- oracles: written from the formulas of the design, not from theory's code


def loss_of(p, d, lengths, name, k=None, weighting="token", mix=0.0, level="sequence"):
    """The expected loss in plain Python; a 0 probability of a candidate that the data has may give inf."""
    upper = lower = 0.0
    for p_i, d_i, T in zip(p, d, lengths, strict=True):
        if d_i == 0:
            continue
        m = math.log(p_i) / (1 if level == "token" else T) if p_i > 0 else -math.inf
        if name == "mle" or mix == 1:
            value = -m
        else:
            value = -math.expm1(k * m) / k if name == "convex" else (-m) ** k / k
            value = (1 - mix) * value + mix * -m if mix else value
        tokens = 1 if level == "token" else T
        upper += d_i * value * (tokens if weighting == "token" else tokens / T)
        lower += d_i * (T if weighting == "token" else 1)
    return upper / lower


def brute_force(d, lengths, *args, steps=60, **kwargs):
    """The best of a grid on the simplex, and of local searches from its best points."""
    n = len(d)
    grid = [np.diff([0, *cut, steps + n]) - 1 for cut in itertools.combinations(range(1, steps + n), n - 1)]
    points = [np.array(point) / steps for point in grid]
    scored = sorted(points, key=lambda p: loss_of(p, d, lengths, *args, **kwargs))
    starts = [*scored[:4], *(0.99 * np.eye(n) + 0.01 / n), *(0.9 * np.eye(n) + 0.1 / n)]

    def loss(logits):
        p = np.exp(logits - np.logaddexp.reduce(logits))
        return loss_of(p, d, lengths, *args, **kwargs)

    found = [(loss_of(p, d, lengths, *args, **kwargs), p) for p in scored[:1]]
    for start in starts:
        result = minimize(loss, np.log(start + 1e-6), method="BFGS", options={"gtol": 1e-10})
        found.append((result.fun, np.exp(result.x - np.logaddexp.reduce(result.x))))
    return min(found, key=lambda entry: entry[0])


CASES = [
    ("mle", None, [3, 3, 3]),
    ("mle", None, [2, 5, 9]),
    ("convex", 1.0, [3, 3, 3]),
    ("convex", 2.9, [3, 3, 3]),
    ("convex", 3.0, [3, 3, 3]),
    ("convex", 6.0, [3, 3, 3]),
    ("convex", 1.5, [2, 5, 9]),
    ("convex", 2.0, [2, 5, 9]),
    ("convex", 4.0, [2, 5, 9]),
    ("convex", 5.0, [2, 2, 9]),
    ("convex", 9.0, [2, 5, 9]),
    ("convex", 30.0, [2, 5, 9]),
    ("power", 1.0, [2, 5, 9]),
    ("power", 0.7, [3, 3, 3]),
    ("power", 0.5, [2, 5, 9]),
    ("power", 0.3, [3, 3, 3]),
    ("power", 0.2, [2, 5, 9]),
]


@pytest.mark.parametrize("weighting", ["token", "sequence"])
@pytest.mark.parametrize("mix", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("name", "k", "lengths"), CASES)
def test_nothing_on_the_simplex_is_better(name, k, lengths, mix, weighting):
    d = [0.5, 0.3, 0.2]
    settings_ = {} if k is None else {"k": k}
    best = optimum(d, lengths, name, length_weighting=weighting, mle_mix=mix, **settings_)
    least, where = brute_force(d, lengths, name, k, weighting, mix)
    mine = loss_of(best.probabilities, d, lengths, name, k, weighting, mix)
    assert mine <= least + 1e-9
    assert best.expected_loss == pytest.approx(mine, rel=1e-9)
    assert np.abs(best.probabilities - where).max() < 2e-3 or mine < least - 1e-12
    assert best.kkt_residual < 1e-9


@pytest.mark.parametrize("weighting", ["token", "sequence"])
@pytest.mark.parametrize(("k", "lengths"), [(0.6, [1, 1, 1]), (1.0, [1, 4, 7]), (0.6, [2, 5, 9]), (2.0, [3, 3, 3])])
def test_nothing_is_better_by_token(k, lengths, weighting):
    d = [0.5, 0.3, 0.2]
    best = optimum(d, lengths, "convex", k=k, level="token", length_weighting=weighting)
    least, _ = brute_force(d, lengths, "convex", k, weighting, level="token")
    assert loss_of(best.probabilities, d, lengths, "convex", k, weighting, level="token") <= least + 1e-9
    assert any("part at one token" in note for note in best.notes) == (lengths != [1, 1, 1])


@pytest.mark.parametrize("seed", range(12))
def test_many_candidates_against_searches(seed):
    rng = np.random.default_rng(seed)
    n = 7
    d, lengths = rng.dirichlet(np.ones(n)), rng.integers(1, 12, n).astype(float)
    name, k = [("convex", 3.0), ("convex", 6.5), ("power", 0.4)][seed % 3]
    mix = [0.0, 0.1][seed % 2]
    best = optimum(d, lengths, name, k=k, mle_mix=mix)
    for start in [*(np.eye(n) * 12), *(np.eye(n) * 3), *rng.normal(0, 3, (10, n))]:
        found = minimize(
            lambda z: loss_of(np.exp(z - np.logaddexp.reduce(z)), d, lengths, name, k, mix=mix),
            start,
            method="L-BFGS-B",
        )
        assert best.expected_loss <= found.fun + 1e-10


# -- closed forms


def test_maximum_likelihood_wants_the_data():
    best = optimum(D, 10, "mle")
    assert best.method == CLOSED_FORM
    assert best.probabilities == pytest.approx(D, abs=1e-15)
    assert best.temperature == 1
    assert best.entropy == pytest.approx(entropy(D), abs=1e-12)
    by_sequence = optimum(D, UNEQUAL, "mle", length_weighting="sequence").probabilities
    assert by_sequence == pytest.approx(D / UNEQUAL / (D / UNEQUAL).sum(), abs=1e-15)
    assert optimum(D, UNEQUAL, "mle", length_weighting="token").probabilities == pytest.approx(D, abs=1e-15)


@pytest.mark.parametrize("k", [0.001, 1.0, 5.0, 9.0, 9.99])
def test_convex_sharpens_to_a_temperature(k):
    best = optimum(D, 10, "convex", k=k)
    expected = (D / 0.4) ** (1 / (1 - k / 10))
    assert best.probabilities == pytest.approx(expected / expected.sum(), abs=1e-12)
    assert best.temperature == pytest.approx(1 - k / 10)
    assert (best.method, best.concave, best.notes) == (CLOSED_FORM, True, ())


def test_the_closed_form_is_what_the_solver_finds():
    for k, length in itertools.product([0.5, 2.0, 4.5], [5.0, 7.0]):
        solution = solve(Problem.of(D, np.full(4, length), get_objective("convex", k=k)))
        assert np.exp(solution.log_p) == pytest.approx(optimum(D, length, k=k).probabilities, abs=1e-13)
    for k in (7.0, 8.0):
        solution = solve(Problem.of(D, np.full(4, 7.0), get_objective("convex", k=k)))
        assert np.exp(solution.log_p) == pytest.approx([1, 0, 0, 0], abs=1e-13)


def test_unequal_lengths_follow_their_own_exponents():
    lengths, k = np.array(UNEQUAL), 2.0
    best = optimum(D, lengths, k=k)
    # p_i = (k d_i / lambda)^(T_i / (T_i - k)): lambda is the same whichever candidate it is read off.
    lam = k * D / best.probabilities ** ((lengths - k) / lengths)
    assert lam == pytest.approx(np.full(4, lam[0]), rel=1e-12)
    assert (best.method, best.temperature) == (SOLVED, None)
    by_sequence = optimum(D, lengths, k=k, length_weighting="sequence")
    lam = k * D / lengths / by_sequence.probabilities ** ((lengths - k) / lengths)
    assert lam == pytest.approx(np.full(4, lam[0]), rel=1e-12)
    assert np.abs(by_sequence.probabilities - best.probabilities).max() > 0.1


@pytest.mark.parametrize("k", [10.0, 10.5, 1e6])
def test_convex_collapses_from_k_equal_t(k):
    best = optimum(D, 10, k=k)
    assert best.probabilities.tolist() == [1, 0, 0, 0]
    assert (best.entropy, best.mode_mass, best.kkt_residual) == (0, 1, 0)
    assert best.concave == (k == 10)
    assert best.temperature == (0 if k == 10 else None)


def test_k_next_to_t():
    below = optimum(D, 10, k=math.nextafter(10.0, 0.0))
    assert below.probabilities.tolist() == [1, 0, 0, 0]
    assert np.isfinite(below.log_probabilities).all()
    # Ties stay ties at any exponent; a difference in the last digits is raised to a power of 10^15.
    assert optimum([0.4, 0.4, 0.2], 10, k=math.nextafter(10.0, 0.0)).probabilities == pytest.approx([0.5, 0.5, 0])
    unequal = optimum(D, [10, 10, 10, 10 + 1e-9], k=10 - 1e-9)
    assert unequal.kkt_residual < 1e-6
    assert unequal.probabilities.sum() == pytest.approx(1)


def test_ties_at_and_above_t():
    even = optimum([0.1, 0.45, 0.45], 5, k=5.0)
    assert even.probabilities == pytest.approx([0, 0.5, 0.5])
    assert any("any other split" in note for note in even.notes)
    one = optimum([0.1, 0.45, 0.45], 5, k=6.0)
    assert one.probabilities.tolist() == [0, 1, 0]
    assert any("2 candidates tie" in note for note in one.notes)
    assert one.mode_mass == 1
    power = optimum([0.5, 0.5], 5, "power", k=0.1)
    assert power.probabilities[0] > 0.99
    assert any("2 candidates tie" in note for note in power.notes)
    linear = optimum([0.3, 0.3, 0.4], [5, 5, 9], k=5.0)
    assert linear.probabilities[0] == pytest.approx(linear.probabilities[1])
    assert linear.probabilities.sum() == pytest.approx(1)


@pytest.mark.parametrize("length", [1, 10, 1000])
@pytest.mark.parametrize(("k", "nats"), [(1.0, 1.280), (0.5, 1.160), (0.2, 0.033)])
def test_figures_known_beforehand(k, nats, length):
    best = optimum(D, length, "power", k=k)
    assert best.entropy == pytest.approx(nats, abs=5e-4)
    p, u = best.probabilities, -best.log_probabilities
    ratio = p * u ** (1 - k) / D
    assert ratio == pytest.approx(np.full(4, ratio[0]), rel=1e-10)


def test_power_says_where_training_departs_from_the_formula():
    assert not any("parabola" in note for note in optimum(D, 10, "power", k=0.2).notes)
    assert any("parabola" in note for note in optimum(D, 100, "power", k=0.2).notes)
    assert optimum(D, 1, "power", k=0.01).probabilities[0] == 1


# -- properties


distributions = st.lists(st.floats(0.02, 1.0), min_size=2, max_size=6, unique=True).map(lambda x: np.array(x) / sum(x))


@settings(max_examples=40, deadline=None)
@given(distributions, st.data())
def test_order_does_not_matter(d, data):
    name, k = data.draw(st.sampled_from([("convex", 2.0), ("convex", 12.0), ("power", 0.5), ("power", 0.25)]))
    lengths = np.array(data.draw(st.lists(st.sampled_from([1.0, 3.0, 8.0]), min_size=len(d), max_size=len(d))))
    order = np.array(data.draw(st.permutations(range(len(d)))))
    one, other = optimum(d, lengths, name, k=k), optimum(d[order], lengths[order], name, k=k)
    assert other.expected_loss == pytest.approx(one.expected_loss, rel=1e-12)
    if np.abs(one.probabilities[order] - other.probabilities).max() > 1e-9:
        # Only two optima that are equally good may be told apart by order.
        swapped = expected_loss(d, other.probabilities[np.argsort(order)], lengths, name, k=k)
        assert swapped == pytest.approx(one.expected_loss, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(distributions, st.floats(0.5, 40), st.floats(0.5, 40), st.sampled_from([1.0, 5.0, 20.0, 100.0]))
def test_larger_k_is_sharper(d, k, other, length):
    low, high = sorted([k, other])
    soft, sharp = optimum(d, length, k=low), optimum(d, length, k=high)
    assert sharp.entropy <= soft.entropy + 1e-12 <= entropy(d) + 2e-12
    assert sharp.mode_mass >= soft.mode_mass - 1e-12 >= d.max() - 2e-12


@settings(max_examples=40, deadline=None)
@given(distributions, st.data())
def test_what_is_returned_is_a_stationary_distribution(d, data):
    lengths = data.draw(st.lists(st.sampled_from([1.0, 2.0, 7.0, 30.0]), min_size=len(d), max_size=len(d)))
    name = data.draw(st.sampled_from(["mle", "convex", "power"]))
    k = data.draw(st.floats(0.05, 1) if name == "power" else st.floats(0.01, 60))
    options = {"mle_mix": data.draw(st.sampled_from([0.0, 0.05, 0.5])), "length_weighting": "sequence"}
    best = optimum(d, lengths, name, **options, **({} if name == "mle" else {"k": k}))
    assert best.probabilities.min() >= 0
    assert best.probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert best.kkt_residual < 1e-8
    assert best.entropy >= 0
    assert (
        best.expected_loss
        <= expected_loss(d, d, lengths, name, **options, **({} if name == "mle" else {"k": k})) + 1e-12
    )


def test_an_optimum_that_no_total_tells_from_a_corner_is_stationary():
    best = optimum([0.9789675, 0.0210325], [1.0, 30.0], "convex", k=25.0, length_weighting="sequence")
    # Slopes d p^(k/T - 1) / T: 0.979 at the first, so log p of the second is 6 log((0.0210325 / 30) / 0.9789675).
    assert best.log_probabilities[1] == pytest.approx(6 * math.log(0.0210325 / 30 / 0.9789675), rel=1e-9)
    assert best.kkt_residual < 1e-8


# -- a user's own objective


@pytest.fixture
def own_objectives():
    @dataclass(frozen=True, kw_only=True)
    class SameAsConvex(Objective):
        k: float = 1.0

        def value(self, m):
            return (1 - (self.k * m).exp()) / self.k

        def weight(self, m):
            return (self.k * m).exp()

    @dataclass(frozen=True, kw_only=True)
    class Reciprocal(Objective):
        def value(self, m):
            return m / (m - 1)

        def weight(self, m):
            return 1 / (m - 1) ** 2

    @dataclass(frozen=True, kw_only=True)
    class Wrong(Objective):
        def value(self, m):
            return -m

        def weight(self, m):
            return torch.full_like(m, 2.0)

    from convexlm import objectives

    for name, cls in {"own-convex": SameAsConvex, "own-reciprocal": Reciprocal, "own-wrong": Wrong}.items():
        register_objective(name)(cls)
    yield
    for name in ("own-convex", "own-reciprocal", "own-wrong"):
        del objectives._registry[name]
    assert "own-convex" not in objective_names()


def test_registered_objectives_are_solved_numerically(own_objectives):
    for k, lengths in [(1.0, 5), (4.0, 5), (5.0, 5), (7.0, 5), (2.0, UNEQUAL), (7.0, UNEQUAL)]:
        own, ours = optimum(D, lengths, "own-convex", k=k), optimum(D, lengths, "convex", k=k)
        assert own.method == SOLVED
        assert own.probabilities == pytest.approx(ours.probabilities, abs=1e-8)
    objective = get_objective("own-reciprocal")
    best = optimum(D, UNEQUAL, objective)
    assert best.kkt_residual < 1e-9
    rng = np.random.default_rng(0)
    for p in [*rng.dirichlet(np.ones(4), 300), *rng.dirichlet(np.full(4, 0.1), 300)]:
        assert best.expected_loss <= expected_loss(D, p, UNEQUAL, objective) + 1e-12


def test_a_weight_that_is_not_the_slope_is_refused(own_objectives):
    with pytest.raises(ValueError, match="not minus the slope"):
        optimum(D, 5, "own-wrong")


# -- degenerate and wrong input


def test_degenerate_input():
    assert optimum([1.0], 7, "power", k=0.3).probabilities.tolist() == [1]
    assert optimum([0.0, 1.0], 7).probabilities.tolist() == [0, 1]
    with_zero = optimum([0.6, 0.0, 0.4], [4, 9, 4], k=2.0)
    assert with_zero.probabilities == pytest.approx([0.36 / 0.52, 0, 0.16 / 0.52])
    assert with_zero.kkt_residual < 1e-12
    assert optimum(D, 1, k=1.0).probabilities.tolist() == [1, 0, 0, 0]
    assert optimum(D + 1e-7, 10, k=5.0).probabilities.sum() == pytest.approx(1, abs=1e-15)
    assert optimum([1 - 1e-12, 1e-12], 10, "power", k=0.5).probabilities.sum() == 1
    many = optimum(np.full(300, 1 / 300), 20, "power", k=0.9)
    assert many.probabilities == pytest.approx(np.full(300, 1 / 300))


@pytest.mark.parametrize(
    ("d", "lengths", "message"),
    [
        ([], 5, "at least one"),
        ([[0.5, 0.5]], 5, "at least one"),
        ([0.5, 0.6], 5, r"sum to 1\.1"),
        ([0.5, 0.500002], 5, "sum to"),
        ([1.5, -0.5], 5, "probability 2 is -0.5"),
        ([math.nan, 1.0], 5, "probability 1 is nan"),
        ([math.inf, 0.0], 5, "probability 1 is inf"),
        (["a", "b"], 5, "must be numbers"),
        ([True, False], 5, "must be numbers"),
        ([0.5, 0.5], 0, "above 0"),
        ([0.5, 0.5], [3, -1], "above 0"),
        ([0.5, 0.5], math.nan, "above 0"),
        ([0.5, 0.5], [1, 2, 3], "3 lengths for 2"),
        ([0.5, 0.5], [], "0 lengths for 2"),
    ],
)
def test_wrong_input_is_refused(d, lengths, message):
    with pytest.raises(ValueError, match=message):
        optimum(d, lengths)


@pytest.mark.filterwarnings("error")
def test_a_k_that_overflows_says_nothing_on_stderr():
    assert optimum([0.4, 0.6], [1, 2], "convex", k=1e308).probabilities.tolist() == [0.0, 1.0]


def test_wrong_objectives_are_refused():
    with pytest.raises(ValueError, match="unknown objective"):
        optimum(D, 5, "concave")
    with pytest.raises(ValueError, match="k must be"):
        optimum(D, 5, "convex", k=-1.0)
    with pytest.raises(ValueError, match="go with an objective's name"):
        optimum(D, 5, get_objective("mle"), k=1.0)
