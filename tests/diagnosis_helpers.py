"""A tiny model, its data and an independent forward, for the tests of `convexlm diagnose`."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from convexlm.diagnosis import Sample, analyse
from convexlm.objectives import get_objective
from training_helpers import tiny_model, tiny_tokenizer


def make_checkpoint(folder, seed=0, **changes):
    """A checkpoint whose distributions are far from uniform, so that records differ."""
    tiny_model(seed, **{"initializer_range": 0.5, **changes}).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def make_data(path, count=40, seed=1, longest=9, **extra):
    """JSON Lines of prompt and completion; `extra` maps a field to a function of the record's number."""
    draw = random.Random(seed)
    spell = lambda n: " ".join(f"w{draw.randrange(40)}" for _ in range(n))  # noqa: E731
    records = []
    for number in range(count):
        record = {"prompt": spell(draw.randint(1, 6)), "completion": spell(draw.randint(1, longest))}
        records.append({**record, **{name: value(number) for name, value in extra.items()}})
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return Path(path)


def forward_by_hand(folder, rows):
    """Every row's target log-probabilities and logit gradient norms, one row at a time in float64, by autograd."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    found = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].detach().requires_grad_()
        log_probs, norms = [], []
        for place, label in enumerate(row["labels"]):
            if label == -100:
                continue
            log_p = logits[place - 1].log_softmax(-1)[label]
            (gradient,) = torch.autograd.grad(log_p, logits)
            log_probs.append(log_p.item())
            norms.append(gradient.norm().item())
        found.append((np.array(log_probs), np.array(norms)))
    return found


def made_sample(n=400, seed=0, *, mean=-1.0, spread=0.5, lengths=(5, 60), sources=None, weights=None):
    """A sample with token log-probabilities drawn at random around each record's own mean."""
    draw = np.random.default_rng(seed)
    t = draw.integers(*lengths, size=n)
    own = mean + spread * draw.standard_normal(n)
    log_probs = -np.abs(np.repeat(own, t) * draw.gamma(2.0, 0.5, size=t.sum()))
    m = np.add.reduceat(log_probs, np.cumsum(t) - t) / t
    return Sample(
        lengths=t,
        m=m,
        weights=np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64),
        sources=sources,
        log_probs=log_probs,
        logit_norms=1 - np.exp(log_probs),
    )


def flat_sample(p_bars, length=20, sources=None, weights=None, right=None):
    """Records of one length whose tokens all have the record's p̄."""
    m = np.log(np.asarray(p_bars, dtype=np.float64))
    n = len(m)
    t = np.broadcast_to(np.asarray(length), (n,)).astype(np.int64)
    return Sample(
        lengths=t,
        m=m,
        weights=np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64),
        sources=sources,
        right=right,
        log_probs=np.repeat(m, t),
    )


def analysed(sample, name="convex", **settings):
    """The analysis of one objective."""
    return analyse(sample, [(name, get_objective(name, **settings))])
