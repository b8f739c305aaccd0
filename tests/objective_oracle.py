"""Objectives in Python floats and loops, written from the formulas, and batches to hold them against."""

from __future__ import annotations

import math

import torch

from convexlm.objectives import get_objective

FAMILY = [
    ("mle", {}),
    ("convex", {"k": 1e-6}),
    ("convex", {"k": 1.0}),
    ("convex", {"k": 3.0}),
    ("convex", {"k": 50.0}),
    ("power", {"k": 1.0}),
    ("power", {"k": 0.5}),
    ("power", {"k": 0.05}),
]
LEVELS = ["sequence", "token"]
WEIGHTINGS = ["token", "sequence"]
MIXES = [0.0, 0.3, 1.0]
EPS = 1e-4


def oracle_value(name, k, m):
    if name == "mle":
        return -m
    if name == "convex":
        return -math.expm1(k * m) / k
    u = -m
    if u < EPS:
        return EPS ** (k - 1) * (2 / k - 1) * u + EPS ** (k - 2) * (1 - 1 / k) * u * u
    return u**k / k


def oracle_weight(name, k, m):
    if name == "mle":
        return 1.0
    if name == "convex":
        return math.exp(k * m)
    u = -m
    if u < EPS:
        return EPS ** (k - 1) * (2 / k - 1) + 2 * EPS ** (k - 2) * (1 - 1 / k) * u
    return u ** (k - 1)


def oracle(rows, objective, sample_weights=None):
    """Loss, gradient (rows of floats) and weights of ragged rows of log-probabilities."""
    name, k, mix = objective.name, getattr(objective, "k", None), objective.mle_mix
    value = lambda m: (1 - mix) * oracle_value(name, k, m) + mix * -m  # noqa: E731
    weight = lambda m: (1 - mix) * oracle_weight(name, k, m) + mix  # noqa: E731
    sample_weights = sample_weights or [1.0] * len(rows)
    parts, gradient, denominator, units = 0.0, [], 0.0, []
    for row, a in zip(rows, sample_weights, strict=True):
        t = len(row)
        if t == 0 or a == 0:
            gradient.append([0.0] * t)
            continue
        share = a / t if objective.length_weighting == "sequence" else a
        denominator += a if objective.length_weighting == "sequence" else a * t
        points = row if objective.level == "token" else [math.fsum(row) / t] * t
        parts += share * math.fsum(value(m) for m in points)
        gradient.append([-share * weight(m) for m in points])
        units += [(a, weight(m)) for m in (points if objective.level == "token" else points[:1])]
    denominator = denominator or 1.0
    return parts / denominator, [[g / denominator for g in row] for row in gradient], units


def padded(rows, dtype=torch.float32, side="right", junk=float("nan"), extra=0):
    length = max(map(len, rows)) + extra
    log_probs = torch.full((len(rows), length), junk, dtype=dtype)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, row in enumerate(rows):
        places = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        log_probs[i, places] = torch.tensor(row, dtype=dtype)
        mask[i, places] = True
    return log_probs.requires_grad_(), mask


def random_rows(seed=0, lengths=(3, 1, 12, 40, 7), scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    # Rounded to float32 so that the oracle and float32 input mean the same numbers.
    return [(-scale * torch.rand(n, generator=generator) ** 2).tolist() for n in lengths]


def gradient(output, log_probs):
    return torch.autograd.grad(output.loss, log_probs, retain_graph=True)[0]


def run(objective, rows, side="right", **kwargs):
    log_probs, mask = padded(rows, side=side)
    output = objective(log_probs, mask, **kwargs)
    grad = gradient(output, log_probs)
    assert not grad[~mask].any()
    return output, [grad[i][mask[i]].tolist() for i in range(len(rows))]


def all_objectives():
    for name, settings in FAMILY:
        for level in LEVELS:
            for weighting in WEIGHTINGS:
                yield get_objective(name, level=level, length_weighting=weighting, **settings)


def ids_of(objective):
    return "-".join(str(v) for v in objective.to_dict().values())


def assert_close(got, wanted, rtol=1e-6, atol=0.0):
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(wanted, dtype=torch.float64), rtol=rtol, atol=atol
    )
