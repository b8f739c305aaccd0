"""Label smoothing at the fused head against torch's and transformers' on full logits, and through the trainer."""

from __future__ import annotations

import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

from convexlm.fused_forward import HeadCall, add_fused_objective
from convexlm.label_smoothing import smoothing_term
from convexlm.objectives import get_objective
from test_fused_forward import batch, family
from trainer_helpers import assert_same_weights, logged, make, trained
from training_helpers import rows

MLE = get_objective("mle")


def both(name, factor, call=None, dtype=torch.float64):
    """Loss and gradients from torch's own smoothing over the model's logits, then output and gradients of the head."""
    model = family(name).to(dtype)
    inputs, labels = batch()
    outputs = model(**inputs)
    flat = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(*flat, label_smoothing=factor)
    # transformers' adds up in float32.
    theirs = LabelSmoother(epsilon=factor)(outputs, labels.clone(), shift_labels=True)
    if dtype == torch.float64:
        torch.testing.assert_close(theirs, expected, rtol=1e-6, atol=0)
    expected.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    add_fused_objective(model)
    out = model(**inputs, labels=labels, fused_objective=call or HeadCall(MLE, label_smoothing=factor))
    out.loss.backward()
    return expected.detach(), wanted, out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# A bias (phi), tied embeddings (qwen2), factors on the logits (cohere, granite).
@pytest.mark.parametrize("name", ["llama", "phi", "qwen2", "cohere", "granite"])
@pytest.mark.parametrize("factor", [0.1, 1.0])
def test_loss_and_gradients_are_those_of_full_logits(name, factor):
    expected, wanted, out, got = both(name, factor)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)
    assert got.keys() == wanted.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-9, atol=1e-12)


def test_statistics_are_those_without_smoothing():
    _, _, out, _ = both("llama", 0.3)
    _, _, plain, _ = both("llama", 0.0, HeadCall(MLE))
    assert out.statistics == plain.statistics and out.loss != plain.loss


def test_small_chunks_the_recomputing_path_and_half_precision_change_nothing_beyond_rounding():
    expected, *_ = both("llama", 0.1)
    for options in ({"chunk_tokens": 3}, {"recompute": True}):
        _, _, out, _ = both("llama", 0.1, HeadCall(MLE, label_smoothing=0.1, **options))
        torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    _, _, out, _ = both("llama", 0.1, dtype=torch.bfloat16)
    torch.testing.assert_close(out.loss.double(), expected, rtol=2e-2, atol=0)


def test_weights_count_as_repetitions_and_a_normalizer_replaces_the_own_one():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(16, 8, generator=generator, dtype=torch.float64)
    labels = torch.tensor([3, 0, 15, 3])
    three = torch.tensor(3.0)
    weighted = smoothing_term(
        states, weight, labels, 0.2, three, sample_weights=torch.tensor([2.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    )
    again = torch.tensor([0, 0, 1, 3])
    torch.testing.assert_close(weighted, smoothing_term(states[again], weight, labels[again], 0.2, three))
    torch.testing.assert_close(smoothing_term(states, weight, labels, 0.2, three * 2) * 2, smoothing_term(
        states, weight, labels, 0.2, three))  # fmt: skip
    nothing = smoothing_term(states[:0], weight, labels[:0], 0.2, torch.tensor(0.0))
    assert nothing == 0


def test_training_does_not_depend_on_how_the_batch_is_split_or_laid_out(tmp_path):
    common = {"objective": "mle", "label_smoothing_factor": 0.1}
    whole = trained(tmp_path / "whole", rows(24), per_device_train_batch_size=6, **common)
    split = trained(
        tmp_path / "split", rows(24), per_device_train_batch_size=2, gradient_accumulation_steps=3, **common
    )
    flat = trained(tmp_path / "flat", rows(24), per_device_train_batch_size=6, padding_free=True, **common)
    assert_same_weights(whole, split)
    assert_same_weights(whole, flat)
    # The loss that is logged has the smoothing in it, `nll` has not.
    assert ((logged(whole, "loss") - logged(whole, "nll")).abs() > 1e-3).all()
    plain = trained(tmp_path / "plain", rows(24), per_device_train_batch_size=6, objective="mle")
    with pytest.raises(AssertionError):
        assert_same_weights(whole, plain)


def test_what_is_not_smoothed_is_refused(tmp_path):
    for settings in ({"objective": "convex"}, {"objective": "mle", "length_weighting": "sequence"}):
        with pytest.raises(ValueError, match="goes with `objective='mle'`"):
            make(tmp_path, rows(4), label_smoothing_factor=0.1, **settings)
    with pytest.raises(ValueError, match="from 0 to below 1"):
        make(tmp_path, rows(4), objective="mle", label_smoothing_factor=1.5)
    model = family("gemma2")
    with pytest.raises(ValueError, match="caps its logits"):
        make(tmp_path, rows(4), model=model, objective="mle", label_smoothing_factor=0.1)
    add_fused_objective(model)
    inputs, labels = batch()
    with pytest.raises(ValueError, match="caps its logits"):
        model(**inputs, labels=labels, fused_objective=HeadCall(MLE, label_smoothing=0.1))
