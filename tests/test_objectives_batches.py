"""Batches: hostile ones, and one number however the batch is laid out, split or weighted."""

from __future__ import annotations

import math

import pytest
import torch

from convexlm.objectives import get_objective, merge_statistics, summarize
from objective_oracle import (
    EPS,
    all_objectives,
    assert_close,
    gradient,
    ids_of,
    oracle,
    padded,
    random_rows,
    run,
)

# Hostile batches.


@pytest.mark.parametrize("objective", all_objectives(), ids=ids_of)
def test_nothing_but_masked_positions(objective):
    for junk in (float("nan"), float("inf"), -float("inf"), 3.0):
        for shape in ((3, 4), (1, 1), (0, 4), (2, 0), (5,), (0,)):
            log_probs = torch.full(shape, junk, requires_grad=True)
            mask = torch.zeros(shape, dtype=torch.bool)
            for ids in (None, torch.zeros(shape, dtype=torch.long)):
                output = objective(log_probs, mask, sequence_ids=ids)
                assert output.loss.item() == 0 and output.loss.requires_grad
                assert not gradient(output, log_probs).any()
                assert output.num_tokens == 0 and output.num_sequences == 0 and output.normalizer == 0
                assert not any(summarize(output.statistics()).values())
                summary = summarize(output.statistics(), empty=math.nan)
                assert summary.pop("num_target_tokens") == 0 and all(math.isnan(x) for x in summary.values())
                assert objective(log_probs, mask, sequence_ids=ids, normalizer=0).loss.item() == 0
                assert objective(log_probs, mask, sequence_ids=ids, normalizer=7).loss.item() == 0


@pytest.mark.parametrize("objective", all_objectives(), ids=ids_of)
def test_hostile_log_probabilities_give_finite_losses_and_gradients(objective):
    batches = [
        [[0.0]],
        [[-1e4]],
        [[0.0] * 7, [-1e4] * 7, [0.0, -1e4]],
        [[-1e-30], torch.tensor([-EPS]).tolist(), [0.0]],
        [[-0.5] * 4000, [-1e4] * 4000, [0.0] * 4000, torch.tensor([-0.001]).tolist() * 3999],
    ]
    for rows in batches:
        loss, grads, _ = oracle(rows, objective)
        output, got = run(objective, rows)
        assert output.loss.isfinite() and output.loss >= 0
        assert_close(output.loss.item(), loss)
        assert_close(sum(got, []), sum(grads, []), atol=1e-40)
        assert all(math.isfinite(v) for v in summarize(output.statistics()).values())


def test_minus_infinity_gives_no_nan_gradient():
    for objective in all_objectives():
        log_probs = torch.tensor([[-math.inf, -1.0], [-1.0, -2.0]], requires_grad=True)
        output = objective(log_probs, torch.ones(2, 2, dtype=torch.bool))
        assert not gradient(output, log_probs).isnan().any()


def test_rows_without_targets_come_out_with_zeros_unless_ids_are_given():
    log_probs, mask = padded([[-1.0, -2.0], [], [-3.0]])
    output = get_objective("convex")(log_probs, mask)
    assert output.weights.shape == output.mean_log_probs.shape == (3,)
    assert output.weights[1] == 0 and output.mean_log_probs.tolist() == [-1.5, 0.0, -3.0]
    assert output.lengths.tolist() == [2, 0, 1]
    assert output.num_tokens == 3 and output.num_sequences == 2
    assert not output.weights.requires_grad and not output.mean_log_probs.requires_grad
    with_ids = get_objective("convex")(log_probs, mask, sequence_ids=torch.zeros(3, 2, dtype=torch.int32))
    assert with_ids.mean_log_probs.tolist() == [-1.5, -3.0]
    token = get_objective("dft")(log_probs, mask)
    assert token.weights.shape == (3, 2) and (token.weights[~mask] == 0).all()
    assert_close(token.weights[mask], [math.exp(-1), math.exp(-2), math.exp(-3)])


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"log_probs": torch.zeros(2, 3, 4)}, "log_probs must be floating"),
        ({"log_probs": torch.zeros(2, 3, dtype=torch.long)}, "log_probs must be floating"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask must be bool"),
        ({"mask": torch.ones(2, 3)}, "mask must be bool"),
        ({"sequence_ids": torch.zeros(3, dtype=torch.long)}, "sequence_ids must be"),
        ({"sequence_ids": torch.zeros(2, 3)}, "sequence_ids must be integers"),
        ({"sample_weights": torch.tensor([1.0, -1.0])}, "finite and not negative"),
        ({"sample_weights": torch.tensor([1.0, math.nan])}, "finite and not negative"),
        ({"sample_weights": torch.tensor([1.0, math.inf])}, "finite and not negative"),
        ({"sample_weights": torch.ones(3)}, "sample_weights must be"),
        ({"sample_weights": torch.tensor([[1.0, 2, 1], [1, 1, 1]])}, "differ within a sequence"),
        ({"sample_weights": torch.ones(2), "sequence_ids": torch.zeros(2, 3).long()}, "sample_weights must be"),
        ({"normalizer": -1.0}, "normalizer must be a finite number"),
        ({"normalizer": math.nan}, "normalizer must be a finite number"),
        ({"normalizer": torch.tensor(-2)}, "normalizer must be a finite number"),
        ({"normalizer": torch.ones(2)}, "normalizer must have one element"),
    ],
)
def test_what_cannot_be_a_batch_is_refused(arguments, message):
    arguments = {"log_probs": torch.zeros(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool), **arguments}
    with pytest.raises(ValueError, match=message):
        get_objective("convex")(**arguments)


# One number however the batch is laid out.


def pack(rows, order, junk_ids=True, dtype=torch.float32):
    """Flat log-probabilities, mask and ids of the rows in that order, with a masked prompt before each."""
    log_probs, mask, ids = [], [], []
    for i in order:
        log_probs += [math.nan, math.inf, *rows[i]]
        mask += [False, False, *[True] * len(rows[i])]
        ids += [-1 if junk_ids else i, i, *[i] * len(rows[i])]
    return torch.tensor(log_probs, dtype=dtype).requires_grad_(), torch.tensor(mask), torch.tensor(ids)


@pytest.mark.parametrize("objective", all_objectives(), ids=ids_of)
def test_packed_padded_and_flat_are_the_same(objective):
    rows = [*random_rows(11), []]
    order = [2, 0, 5, 4, 1, 3]
    right, grads = run(objective, rows)
    left, left_grads = run(objective, rows, side="left")
    flat, mask, ids = pack(rows, order)
    others = [(flat, mask, ids), (flat[None], mask[None], ids[None])]
    # Two packed rows, whose ids may start afresh in each (a sequence is known by its row and id) or go on.
    a, b = pack(rows, order[:3]), pack(rows, order[3:])
    half = max(len(a[0]), len(b[0]))
    stack = [
        torch.stack([torch.nn.functional.pad(x[i].detach(), (0, half - len(x[i]))) for x in (a, b)]) for i in range(3)
    ]
    afresh = stack[2].clone()
    afresh[1] = torch.tensor([{1: 2, 3: 5, 4: 0}.get(int(v), 9) for v in afresh[1]])
    stack[0].requires_grad_()
    others += [(stack[0], stack[1], stack[2]), (stack[0], stack[1], afresh)]
    assert_close(left.loss.item(), right.loss.item())
    assert_close(sum(left_grads, []), sum(grads, []))
    wanted = torch.tensor(sum((grads[i] for i in order), []))
    for log_probs, layout_mask, layout_ids in others:
        output = objective(log_probs, layout_mask, sequence_ids=layout_ids)
        assert_close(output.loss.item(), right.loss.item())
        grad = gradient(output, log_probs)
        assert_close(grad[layout_mask], wanted)
        assert not grad[~layout_mask].any()
        assert output.num_tokens == right.num_tokens and output.num_sequences == right.num_sequences
        means = [right.mean_log_probs[i].item() for i in order if rows[i]]
        assert_close(output.mean_log_probs, means)
        for key, value in summarize(right.statistics()).items():
            assert_close(summarize(output.statistics())[key], value, rtol=1e-12)


def test_interleaved_sequences_are_told_apart():
    ids = torch.tensor([[5, -2, 5, -2, 5, 10**12, 0]])
    log_probs = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0]])
    mask = torch.tensor([[True] * 6 + [False]])
    output = get_objective("convex")(log_probs, mask, sequence_ids=ids)
    assert output.mean_log_probs.tolist() == [-3.0, -3.0, -6.0]
    assert output.lengths.tolist() == [3, 2, 1]


@pytest.mark.parametrize("objective", all_objectives(), ids=ids_of)
def test_micro_batches_with_the_global_normalizer_add_up(objective):
    rows = [*random_rows(12), [], *random_rows(13, lengths=(2, 5))]
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, 3.0, 1.0, 1.5])
    for sample_weights in (None, weights):
        whole, grads = run(objective, rows, sample_weights=sample_weights)
        for normalizer in (whole.normalizer, whole.normalizer.item()):
            loss, got, statistics = 0.0, [], None
            for part in (slice(0, 1), slice(1, 5), slice(5, 6), slice(6, 8)):
                w = None if sample_weights is None else sample_weights[part]
                output, part_grads = run(objective, rows[part], normalizer=normalizer, sample_weights=w)
                loss += output.loss.item()
                got += part_grads
                new = output.statistics()
                statistics = new if statistics is None else merge_statistics(statistics, new)
            assert_close(loss, whole.loss.item())
            assert_close(sum(got, []), sum(grads, []), atol=1e-45)
            for key, value in summarize(whole.statistics()).items():
                assert_close(summarize(statistics)[key], value, rtol=1e-12)


def test_a_zero_normalizer_for_a_batch_with_targets_shows():
    log_probs, mask = padded([[-1.0]])
    assert not get_objective("mle")(log_probs, mask, normalizer=0).loss.isfinite()


@pytest.mark.parametrize("objective", all_objectives(), ids=ids_of)
def test_a_sample_weight_is_a_number_of_repetitions(objective):
    rows = random_rows(14)
    counts = [2, 0, 1, 3, 1]
    rows[1] = [math.nan] * 3  # weight 0: whatever it holds is out
    repeated = [row for row, n in zip(rows, counts, strict=True) for _ in range(n)]
    wanted, repeated_grads = run(objective, repeated)
    output, grads = run(objective, rows, sample_weights=torch.tensor(counts))
    assert_close(output.loss.item(), wanted.loss.item())
    assert_close(output.normalizer.item(), wanted.normalizer.item())
    assert grads[1] == [0.0] * 3
    position = 0
    for grad, n in zip(grads, counts, strict=True):
        if n:
            assert_close(grad, (torch.tensor(repeated_grads[position]).double() * n), atol=1e-40)
        position += n
    for key, value in summarize(wanted.statistics()).items():
        if key != "num_target_tokens":
            assert_close(summarize(output.statistics())[key], value, rtol=1e-12)
    assert output.num_sequences == 4 and output.num_tokens == sum(
        len(r) for r, n in zip(rows, counts, strict=True) if n
    )
    # Packed, the weight stands at every token; at masked places it may be anything.
    log_probs, mask, ids = pack(rows, range(5), junk_ids=False)
    per_token = torch.tensor([float(counts[i]) for i in ids]).masked_fill(~mask, math.nan)
    packed = objective(log_probs, mask, sequence_ids=ids, sample_weights=per_token)
    assert_close(packed.loss.item(), wanted.loss.item())
    assert_close(gradient(packed, log_probs)[mask], torch.tensor(sum(grads, [])))
    assert packed.statistics().keys() == output.statistics().keys()
    for key, value in packed.statistics().items():
        assert_close(value, output.statistics()[key], rtol=1e-12)


def test_statistics_are_detached_scalars():
    log_probs, mask = padded(random_rows(0))
    for objective in all_objectives():
        for value in objective(log_probs, mask).statistics().values():
            assert value.dtype == torch.float64 and value.shape == () and not value.requires_grad
