"""`ConvexConfig`: which objective its options describe, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from convexlm import ConvexConfig, Objective, get_objective, objectives, register_objective


def config(**settings):
    return ConvexConfig(output_dir="unused", use_cpu=True, report_to="none", **settings)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, get_objective("convex")),
        ({"objective": "mle"}, get_objective("mle")),
        ({"objective": "convex", "k": 2.5, "mle_mix": 0.1}, get_objective("convex", k=2.5, mle_mix=0.1)),
        ({"objective": "power", "k": 0.25}, get_objective("power", k=0.25)),
        ({"objective": "dft"}, get_objective("convex", level="token", k=1.0)),
        ({"length_weighting": "sequence"}, get_objective("convex", length_weighting="sequence")),
        ({"objective_kwargs": '{"k": 3.0}'}, get_objective("convex", k=3.0)),
        ({"objective_kwargs": {"k": 3.0}}, get_objective("convex", k=3.0)),
    ],
)
def test_options_make_an_objective(settings, wanted):
    assert config(**settings).build_objective() == wanted


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("nll", False), ("eval_nll", False), ("eval_news_nll", False), ("entropy", False), ("loss", False),
     ("token_accuracy", True), (None, None)],
)  # fmt: skip
def test_a_small_nll_is_the_better_one(metric, greater):
    assert config(metric_for_best_model=metric).greater_is_better is greater
    if metric:
        assert config(metric_for_best_model=metric, greater_is_better=not greater).greater_is_better is not greater


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"objective": "unknown"}, "unknown objective `unknown`; known: .*convex.*dft.*mle"),
        ({"k": 0.0}, "k must be"),
        ({"k": -1.0}, "k must be"),
        ({"objective": "power", "k": 1.5}, "k must be"),
        ({"objective": "mle", "k": 1.0}, "no setting `k`"),
        ({"objective": "dft", "k": 2.0}, "k=2.0 is not it"),
        ({"mle_mix": 1.5}, "mle_mix"),
        ({"level": "word"}, "level"),
        ({"k_warmup": 1.5}, "k_warmup"),
        ({"k_warmup": float("nan")}, "k_warmup"),
        ({"padding_side": "both"}, "padding_side"),
        ({"k": 1.0, "objective_kwargs": {"k": 1.0}}, "both as an option and in `objective_kwargs`"),
        ({"objective_kwargs": "[1]"}, "objective_kwargs"),
        ({"bf16": True, "fp16": True}, "fp16|bf16"),
    ],
)
def test_what_no_objective_could_honour_is_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        config(**settings)


@pytest.mark.parametrize(
    ("value", "weight", "reason"),
    [
        (lambda m: m, lambda m: -torch.ones_like(m), "weight\\(m\\) is negative or no number at m = -20"),
        (lambda m: 2 - m, torch.ones_like, "value\\(0\\) must be 0, not 2"),
        (lambda m: -m, lambda m: 2 * torch.ones_like(m), "weight\\(m\\) is not minus the slope"),
    ],
)
def test_an_objective_of_ones_own_falls_to_0(monkeypatch, value, weight, reason):
    own = type("Own", (Objective,), {"value": lambda _, m: value(m), "weight": lambda _, m: weight(m)})
    monkeypatch.setattr(objectives, "_registry", dict(objectives._registry))
    register_objective("own-shape")(own)
    with pytest.raises(ValueError, match=f"objective `own-shape`: {reason}"):
        config(objective="own-shape")


def test_a_warmup_that_would_change_nothing_is_refused(monkeypatch):
    own = type("Own", (Objective,), {"value": lambda _, m: -m, "weight": lambda _, m: torch.ones_like(m)})
    monkeypatch.setattr(objectives, "_registry", dict(objectives._registry))
    register_objective("own-still")(own)
    config(objective="own-still"), config(objective="mle", k_warmup=0.5), config(objective="dft", k_warmup=0.5)
    with pytest.raises(ValueError, match="`k_warmup` would change nothing, for objective `own-still` has no `at_warm"):
        config(objective="own-still", k_warmup=0.5)


def test_precision_follows_the_device_unless_it_is_asked_for():
    assert config().bf16 is False
    assert config(bf16=True).bf16 is True
    assert config(fp16=True).bf16 is False


@pytest.mark.parametrize("name", ["save_strategy", "eval_strategy", "logging_strategy"])
def test_the_false_that_yaml_makes_of_no_is_no(name):
    assert getattr(config(**{name: False}), name) == "no"
