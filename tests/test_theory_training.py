"""What `theory` says, against gradient descent with the real objectives; and what a convex function alone does."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from convexlm.objectives import get_objective
from convexlm.theory import climb_plain_power, expected_loss, local_optima_plain_power, log_gradient_factor, optimum

D = np.array([0.4, 0.3, 0.2, 0.1])


def descend(logits, loss_of_log_p):
    """Follow the gradient of a loss in softmax logits to its end; the probabilities there."""
    logits = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=400, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=0
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_of_log_p(logits.log_softmax(0))
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(0).numpy()


def descend_plainly(logits, loss_of_log_p, rate):
    """Gradient descent with one fixed rate: no momentum, no line search; the probabilities where it comes to rest."""
    logits = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        (gradient,) = torch.autograd.grad(loss_of_log_p(logits.log_softmax(0)), logits)
        if float(gradient.abs().max()) < 1e-9:
            return logits.detach().softmax(0).numpy()
        with torch.no_grad():
            logits -= rate * gradient
    raise AssertionError("gradient descent has not come to rest")


def train_table(d, lengths, objective, start=None, descend=descend):
    """A softmax over the candidates, trained on the whole distribution with the objective itself; all tokens alike."""
    T = torch.tensor(lengths, dtype=torch.float64)
    mask = torch.arange(int(max(lengths))) < T[:, None]
    weights = torch.tensor(d)

    def loss(log_p):
        return objective((log_p / T)[:, None].expand(mask.shape), mask, sample_weights=weights).loss

    return descend(np.zeros(len(d)) if start is None else np.log(start), loss)


# -- against training


@pytest.mark.parametrize("weighting", ["token", "sequence"])
@pytest.mark.parametrize(
    ("name", "options", "lengths"),
    [
        ("mle", {}, [3, 5, 5, 8]),
        ("convex", {"k": 1.0}, [5, 5, 5, 5]),
        ("convex", {"k": 4.0}, [5, 5, 5, 5]),
        ("convex", {"k": 2.0}, [3, 5, 5, 8]),
        ("convex", {"k": 20.0, "mle_mix": 0.3}, [3, 5, 5, 8]),
        ("power", {"k": 0.5}, [3, 5, 5, 8]),
        ("power", {"k": 0.2}, [1, 1, 1, 1]),
    ],
)
def test_a_table_trained_with_the_objective_ends_there(name, options, lengths, weighting):
    objective = get_objective(name, length_weighting=weighting, **options)
    best = optimum(D, lengths, objective)
    # Where there may be several optima, descent is to end at the global one only if it starts near it.
    start = None if best.concave else 0.5 * best.probabilities + 0.125
    trained = train_table(D, lengths, objective, start)
    assert trained == pytest.approx(best.probabilities, abs=1e-6)


@pytest.mark.parametrize("weighting", ["token", "sequence"])
@pytest.mark.parametrize(
    ("name", "options", "lengths", "rate"),
    [
        ("mle", {}, [3, 5, 5, 8], 5.0),
        ("convex", {"k": 1.0}, [5, 5, 5, 5], 10.0),
        ("convex", {"k": 2.0}, [3, 5, 5, 8], 20.0),
        ("power", {"k": 0.5}, [3, 5, 5, 8], 10.0),
    ],
)
def test_plain_gradient_descent_ends_there(name, options, lengths, rate, weighting):
    objective = get_objective(name, length_weighting=weighting, **options)

    def descend(logits, loss):
        return descend_plainly(logits, loss, rate)

    trained = train_table(D, lengths, objective, descend=descend)
    assert trained == pytest.approx(optimum(D, lengths, objective).probabilities, abs=1e-7)


def test_token_level_training_ends_at_the_token_optimum():
    # Candidates of 2 to 4 tokens that part at the first: what follows it has probability 1 and log-probability 0.
    d, lengths = torch.tensor(D), [2, 4, 3, 3]
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    for weighting in ("token", "sequence"):
        objective = get_objective("convex", k=0.5, level="token", length_weighting=weighting)

        def loss(log_p, objective=objective):
            after = torch.zeros(4, 3, dtype=torch.float64)
            return objective(torch.cat([log_p[:, None], after], 1), mask, sample_weights=d).loss

        assert descend(np.zeros(4), loss) == pytest.approx(optimum(D, lengths, objective).probabilities, abs=1e-6)


def test_training_above_t_stays_at_a_wrong_vertex():
    """With k > T the optimum is the mode, but each vertex holds who starts near it."""
    objective = get_objective("convex", k=9.0)
    wrong = train_table(D, [3, 3, 3, 3], objective, np.array([0.03, 0.03, 0.91, 0.03]))
    assert wrong[2] > 0.99
    assert optimum(D, 3, objective).probabilities[0] == 1


def test_expected_loss_is_the_loss_of_a_batch():
    p = np.array([0.1, 0.2, 0.3, 0.4])
    for name, level, weighting in itertools.product(
        ["mle", "convex", "power"], ["sequence", "token"], ["token", "sequence"]
    ):
        objective = get_objective(name, level=level, length_weighting=weighting, mle_mix=0.2)
        lengths = torch.tensor([2, 3, 5, 4])
        mask = torch.arange(5) < lengths[:, None]
        log_probs = torch.zeros(4, 5, dtype=torch.float64)
        log_p = torch.tensor(p).log()
        if level == "token":
            log_probs[:, 0] = log_p
        else:
            log_probs += (log_p / lengths)[:, None]
        out = objective(log_probs, mask, sample_weights=torch.tensor(D))
        assert expected_loss(D, p, lengths.numpy(), objective) == pytest.approx(float(out.loss), rel=1e-12)


# -- why a convex function alone does not do


def test_plain_power_ends_at_the_wrong_vertex():
    end = climb_plain_power(D, [0.05, 0.05, 0.85, 0.05])
    assert end.probabilities[2] > 0.9997
    assert climb_plain_power(D, [0.25, 0.25, 0.25, 0.25]).probabilities[0] > 0.999
    # The composition from the same start finds the one optimum there is.
    objective = get_objective("convex", k=2.0)
    trained = train_table(D, [5, 5, 5, 5], objective, np.array([0.05, 0.05, 0.85, 0.05]))
    assert trained == pytest.approx(optimum(D, 5, objective).probabilities, abs=1e-6)


def test_every_vertex_holds_plain_power():
    assert local_optima_plain_power(D) == [0, 1, 2, 3]
    assert local_optima_plain_power(D, 1.0) == [0]
    rng = np.random.default_rng(0)
    for j in local_optima_plain_power(D):
        near = 0.999 * np.eye(4)[j] + 0.001 * rng.dirichlet(np.ones(4), 200)
        assert ((D * near**2).sum(-1) < D[j]).all()


def test_the_plain_gradient_vanishes_with_the_length():
    m = -1.5
    for length, order in [(1, 1.0), (20, 1.0), (5, 2.0)]:
        log_p = torch.tensor(m * length, dtype=torch.float64, requires_grad=True)
        (log_p.exp() ** order).backward()
        assert log_gradient_factor(m, length, order) == pytest.approx(math.log(float(log_p.grad)))
    assert log_gradient_factor(m, 500) < math.log(5e-324)  # less than any double
    for length in (1, 500):  # the composition's weight is the same at any length
        out = get_objective("convex", k=1.0)(torch.full((1, length), m), torch.ones(1, length, dtype=torch.bool))
        assert float(out.weights) == pytest.approx(math.exp(m))


def test_wrong_climbs_are_refused():
    for call in (
        lambda: climb_plain_power(D, [0.5, 0.5]),
        lambda: climb_plain_power(D, [1.0, 0, 0, 0]),
        lambda: climb_plain_power(D, D, order=0.5),
        lambda: local_optima_plain_power(D, math.nan),
        lambda: log_gradient_factor(0.1, 5),
    ):
        with pytest.raises(ValueError):
            call()
