"""An objective that depends on the length: `for_lengths`, by the plugin of the evidence's experiment on length."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from convexlm.diagnosis.analyse import record_weights
from convexlm.head import fused_objective
from convexlm.objectives import get_objective
from convexlm.theory import optimum

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "evidence"))

import tempered  # noqa: E402, F401

ROWS = [[-0.3, -2.0, -0.01], [-1.0], [-0.5] * 12, [-4.0, -3.0]]


def run(objective, rows):
    flat = torch.tensor([x for row in rows for x in row], dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([number for number, row in enumerate(rows) for _ in row])
    output = objective(flat, torch.ones(len(flat), dtype=torch.bool), sequence_ids=ids)
    output.loss.backward()
    return output, flat.grad


@pytest.mark.parametrize("mix", [0.0, 0.3])
@pytest.mark.parametrize("weighting", ["token", "sequence"])
def test_tempered_is_its_formula(weighting, mix):
    c = 0.2
    output, gradient = run(get_objective("tempered", c=c, length_weighting=weighting, mle_mix=mix), ROWS)
    tokens = sum(map(len, ROWS))
    loss, wanted = 0.0, []
    for row in ROWS:
        p, length = math.exp(sum(row)), len(row)
        share = length / tokens if weighting == "token" else 1 / len(ROWS)
        loss += share * ((1 - mix) * (1 - p**c) / (c * length) - mix * sum(row) / length)
        wanted += [-share / length * ((1 - mix) * p**c + mix)] * length
    assert output.loss.item() == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(gradient, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)


def test_at_one_length_it_is_convex():
    rows = [[-0.3, -2.0, -0.01], [-1.0, -0.2, -0.7]]
    for one, other in ((("tempered", {"c": 0.5}), ("convex", {"k": 1.5})),):
        got, wanted = (run(get_objective(name, **settings), rows) for name, settings in (one, other))
        assert got[0].loss.item() == pytest.approx(wanted[0].loss.item(), rel=1e-14)
        torch.testing.assert_close(got[1], wanted[1], rtol=1e-14, atol=0)


def test_its_optimum_is_one_temperature_at_any_lengths():
    d, lengths, c = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64), [2, 5, 9, 20], 0.5
    scores = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    objective = get_objective("tempered", c=c)
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    counts = torch.tensor(lengths, dtype=torch.float64)
    descent = torch.optim.LBFGS(
        [scores], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        descent.zero_grad()
        tokens = (scores.log_softmax(0) / counts)[ids]
        loss = objective(tokens, torch.ones(len(ids), dtype=torch.bool), sequence_ids=ids, sample_weights=d[ids]).loss
        loss.backward()
        return loss

    descent.step(closure)
    wanted = d ** (1 / (1 - c))
    torch.testing.assert_close(scores.softmax(0).detach(), wanted / wanted.sum(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [3, 64])
def test_the_head_gives_the_same_number(chunk):
    torch.manual_seed(0)
    lengths = [3, 1, 12, 2]
    hidden = torch.randn(sum(lengths), 8, dtype=torch.float64)
    weight, labels = torch.randn(11, 8, dtype=torch.float64), torch.randint(11, (sum(lengths),))
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    objective = get_objective("tempered", c=0.1)
    found = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:  # 3 tokens a chunk: the third sequence takes the recomputing path
            loss = fused_objective(h, w, labels, ids, objective, chunk_tokens=chunk).loss
        else:
            log_probs = (h @ w.t()).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
            loss = objective(log_probs, torch.ones_like(labels, dtype=torch.bool), sequence_ids=ids).loss
        loss.backward()
        found.append((loss.detach(), h.grad, w.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_theory_refuses_it_and_diagnose_honours_it():
    with pytest.raises(ValueError, match="depends on the length"):
        optimum([0.5, 0.5], [3, 9], get_objective("tempered", c=0.1))

    class Few:
        m, lengths, weights = np.array([-1.0, -1.0]), np.array([3, 9]), np.ones(2)

    weights, _, _ = record_weights(Few, get_objective("tempered", c=0.1))
    np.testing.assert_allclose(weights, np.exp([-0.3, -0.9]))
