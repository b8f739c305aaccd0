"""Properties that hold for any batch, looked for by hypothesis."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from convexlm.objectives import get_objective, summarize

settings.register_profile("objectives", max_examples=60, deadline=None, derandomize=True)
PROFILE = settings.get_profile("objectives")


@st.composite
def objectives(draw, names=("mle", "convex", "power"), mixes=(0.0, 0.2, 1.0)):
    name = draw(st.sampled_from(names))
    chosen = {
        "level": draw(st.sampled_from(["sequence", "token"])),
        "length_weighting": draw(st.sampled_from(["sequence", "token"])),
        "mle_mix": draw(st.sampled_from(mixes)),
    }
    if name == "convex":
        chosen["k"] = draw(st.floats(1e-6, 50))
    if name == "power":
        chosen["k"] = draw(st.floats(0.05, 1))
    return get_objective(name, **chosen)


log_probabilities = st.one_of(st.floats(-8, 0), st.sampled_from([0.0, -1e-6, -1e-4, -100.0, -1e4]))
batches = st.lists(st.lists(log_probabilities, max_size=6), min_size=1, max_size=5)


def lay_out(rows, lefts=None, width=None, junk=float("nan")):
    lefts = lefts or [0] * len(rows)
    width = width or max(1, *(len(r) + left for r, left in zip(rows, lefts, strict=True)))
    log_probs = torch.full((len(rows), width), junk, dtype=torch.float64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, left) in enumerate(zip(rows, lefts, strict=True)):
        log_probs[i, left : left + len(row)] = torch.tensor(row, dtype=torch.float64)
        mask[i, left : left + len(row)] = True
    return log_probs.requires_grad_(), mask


def result(objective, log_probs, mask, **kwargs):
    output = objective(log_probs, mask, **kwargs)
    (gradient,) = torch.autograd.grad(output.loss, log_probs)
    assert not gradient[~mask].any()
    return output, gradient


def close(a, b):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-12, atol=1e-300)


def same_summary(a, b):
    for key, value in summarize(a.statistics()).items():
        close(summarize(b.statistics())[key], value)


@PROFILE
@given(objectives(), batches, st.randoms(use_true_random=False))
def test_row_order_does_not_matter(objective, rows, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    one, one_grad = result(objective, *lay_out(rows))
    other, other_grad = result(objective, *lay_out([rows[i] for i in order]))
    close(one.loss, other.loss)
    close(one_grad[order], other_grad)
    close(one.weights[order], other.weights)
    same_summary(one, other)


@PROFILE
@given(objectives(), batches, st.data())
def test_padding_and_prompts_do_not_matter(objective, rows, data):
    lefts = [data.draw(st.integers(0, 4)) for _ in rows]
    width = max(len(r) + left for r, left in zip(rows, lefts, strict=True)) + data.draw(st.integers(1, 3))
    junk = data.draw(st.floats(allow_nan=True, allow_infinity=True))
    one, one_grad = result(objective, *(a := lay_out(rows)))
    other, other_grad = result(objective, *(b := lay_out(rows, lefts, width, junk)))
    close(one.loss, other.loss)
    close(one_grad[a[1]], other_grad[b[1]])
    close(one.mean_log_probs, other.mean_log_probs)
    same_summary(one, other)


@PROFILE
@given(objectives(), batches, st.data())
def test_packing_and_the_values_of_ids_do_not_matter(objective, rows, data):
    names = data.draw(st.lists(st.integers(-(2**62), 2**62), min_size=len(rows), max_size=len(rows), unique=True))
    tokens = [(name, p) for name, row in zip(names, rows, strict=True) for p in row]
    tokens = data.draw(st.permutations(tokens))
    ids = torch.tensor([t[0] for t in tokens], dtype=torch.long)
    flat = torch.tensor([t[1] for t in tokens], dtype=torch.float64, requires_grad=True)
    one, _ = result(objective, *lay_out(rows))
    other, grad = result(objective, flat, torch.ones(len(tokens), dtype=torch.bool), sequence_ids=ids)
    close(one.loss, other.loss)
    same_summary(one, other)
    renamed = ids % 10007 if len(set((ids % 10007).tolist())) == len(set(ids.tolist())) else ids
    again, again_grad = result(objective, flat, torch.ones(len(tokens), dtype=torch.bool), sequence_ids=renamed)
    assert torch.equal(again.loss, other.loss) and torch.equal(grad, again_grad)
    assert torch.equal(again.mean_log_probs, other.mean_log_probs)


@PROFILE
@given(objectives(), batches, st.data())
def test_the_loss_never_rises_with_a_log_probability(objective, rows, data):
    assume(any(rows))
    i = data.draw(st.sampled_from([i for i, row in enumerate(rows) if row]))
    j = data.draw(st.integers(0, len(rows[i]) - 1))
    better = [list(row) for row in rows]
    better[i][j] = rows[i][j] * data.draw(st.floats(0, 0.99))
    one, grad = result(objective, *lay_out(rows))
    other, _ = result(objective, *lay_out(better))
    assert other.loss <= one.loss * (1 + 1e-14)
    assert (grad <= 0).all() and grad.isfinite().all()
    assert one.loss >= 0 and one.loss.isfinite()
    changed = abs(better[i][j] - rows[i][j]) > 1e-3 * abs(sum(map(sum, rows)))
    if changed and (objective.name != "convex" or objective.mle_mix > 0 or objective.k * max(map(abs, rows[i])) < 10):
        assert other.loss < one.loss


@PROFILE
@given(objectives(names=("convex",)), batches)
def test_convex_weights_lie_between_0_and_1(objective, rows):
    log_probs, mask = lay_out(rows)
    output, _ = result(objective, log_probs, mask)
    here = mask if objective.level == "token" else mask.any(1)
    assert (output.weights[here] <= 1).all() and (output.weights[here] >= objective.mle_mix * (1 - 1e-15)).all()
    moderate = (log_probs if objective.level == "token" else output.mean_log_probs) * objective.k > -700
    assert (output.weights[here & moderate] > 0).all()
    assert not output.weights[~here].any()
    stats = summarize(output.statistics())
    assert 0 <= stats["weight_min"] <= stats["weight_mean"] * (1 + 1e-12) <= 1 + 1e-9
    assert 0 <= stats["effective_sample_size"] <= 1


@PROFILE
@given(objectives(), batches, st.data())
def test_sample_weights_act_as_repetitions(objective, rows, data):
    counts = [data.draw(st.integers(0, 3)) for _ in rows]
    repeated = [row for row, n in zip(rows, counts, strict=True) for _ in range(n)] or [[]]
    one, _ = result(objective, *lay_out(rows), sample_weights=torch.tensor(counts))
    other, _ = result(objective, *lay_out(repeated))
    close(one.loss, other.loss)
    a, b = summarize(one.statistics()), summarize(other.statistics())
    for key in set(a) - {"num_target_tokens"}:
        close(a[key], b[key])


@PROFILE
@given(objectives(), batches, st.floats(0.01, 100))
def test_a_common_sample_weight_changes_nothing(objective, rows, weight):
    one, grad = result(objective, *lay_out(rows))
    other, other_grad = result(objective, *lay_out(rows), sample_weights=torch.full((len(rows),), weight))
    close(one.loss, other.loss)
    close(grad, other_grad)


@PROFILE
@given(objectives(mixes=(0.0,)), batches, st.floats(0, 1))
def test_mixing_is_linear(objective, rows, a):
    pure, _ = result(objective, *lay_out(rows))
    mle, _ = result(dataclasses.replace(objective, mle_mix=1.0), *lay_out(rows))
    mixed, _ = result(dataclasses.replace(objective, mle_mix=a), *lay_out(rows))
    torch.testing.assert_close(mixed.loss, (1 - a) * pure.loss + a * mle.loss, rtol=1e-9, atol=1e-12)
