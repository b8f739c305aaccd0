"""`token_scores` against logits in float64."""

from __future__ import annotations

import pytest
import torch

from convexlm.diagnosis import measure as measuring
from convexlm.head import fused_objective, workspace
from convexlm.head_scores import token_scores
from convexlm.objectives import get_objective
from training_helpers import tiny_model


def from_logits(hidden, weight, labels, bias, scale, cap):
    """Log-probability and |d log p / d logits| by autograd, in float64."""
    z = hidden.double() @ weight.double().T
    z = z if bias is None else z + bias.double()
    z = z * scale
    z = (z if cap is None else cap * torch.tanh(z / cap)).requires_grad_()
    log_p = z.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    (gradient,) = torch.autograd.grad(log_p.sum(), z)
    return log_p.detach(), gradient.norm(dim=-1)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 7])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 5e-2)], ids=str
)
@pytest.mark.parametrize(("with_bias", "scale", "cap"), [(False, 1.0, None), (True, 0.5, 3.0), (False, -2.0, 10.0)])
def test_scores_are_those_of_full_logits(dtype, tolerance, with_bias, scale, cap, chunk_tokens):
    torch.manual_seed(1)
    hidden, weight = torch.randn(20, 8).to(dtype), torch.randn(33, 8).to(dtype)
    bias = torch.randn(33).to(dtype) if with_bias else None
    labels = torch.randint(0, 33, (20,))
    wanted, norms = from_logits(hidden, weight, labels, bias, scale, cap)
    got = token_scores(
        hidden, weight, labels, bias=bias, logit_scale=scale, logit_softcap=cap, chunk_tokens=chunk_tokens
    )
    torch.testing.assert_close(got.log_probs.double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.logit_norms.double(), norms, rtol=tolerance, atol=tolerance)
    assert got.log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_certain_tokens_norm_is_not_lost_in_rounding():
    # p of the label is 1 - 2e-6: computed as 1 - p from float32 sums, nothing of the norm would be left.
    weight = torch.eye(3)
    hidden = torch.tensor([[13.8, 0.0, 0.0]])
    got = token_scores(hidden, weight, torch.tensor([0]))
    _, norm = from_logits(hidden, weight, torch.tensor([0]), None, 1.0, None)
    assert float(norm) < 3e-6
    assert float(got.logit_norms) == pytest.approx(float(norm), rel=0.05)


def test_buffers_made_in_inference_mode_serve_outside_it():
    hidden, weight, labels = torch.randn(6, 4), torch.randn(5, 4), torch.arange(5).repeat(2)[:6]
    workspace.clear()
    with torch.inference_mode():
        inside = token_scores(hidden, weight, labels).log_probs.clone()
    hidden.requires_grad_()
    loss = fused_objective(hidden, weight, labels, torch.zeros_like(labels), get_objective("mle")).loss
    loss.backward()
    assert loss.item() == pytest.approx(-float(inside.mean()))


def test_no_tokens_have_no_scores():
    got = token_scores(torch.zeros(0, 4), torch.zeros(5, 4), torch.zeros(0, dtype=torch.long))
    assert got.log_probs.shape == got.logit_norms.shape == (0,)


@pytest.mark.parametrize("label", [-100, 5])
def test_a_label_outside_the_vocabulary_is_refused(label):
    with pytest.raises(ValueError, match="labels must lie in"):
        token_scores(torch.zeros(1, 4), torch.zeros(5, 4), torch.tensor([label]))


def test_diagnose_goes_through_the_head(monkeypatch):
    model, rows = tiny_model().eval(), []
    for n in (5, 9, 7):
        ids = torch.randint(4, 40, (n,), generator=torch.Generator().manual_seed(n)).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "record_id": str(n)})
    with torch.no_grad():
        whole_model = [measuring._measure_batch(model, [row], False, torch.device("cpu"))[0] for row in rows]
    calls = []

    def counted(hidden, *args, **kwargs):
        calls.append(len(hidden))
        return token_scores(hidden, *args, **kwargs)

    monkeypatch.setattr(measuring, "token_scores", counted)
    found = measuring.measure(model, rows)
    assert sum(calls[1:]) == found.lengths.sum() == 15  # the first call tries the shortest row
    for name, column in (("log_probs", 0), ("logit_norms", 1)):
        wanted = torch.cat([torch.from_numpy(one[column]) for one in whole_model])
        torch.testing.assert_close(torch.from_numpy(getattr(found, name)), wanted, rtol=1e-5, atol=1e-5)
