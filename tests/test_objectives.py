"""The objectives against an implementation of their own in Python floats, and against what else is known of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys

import pytest
import torch

from convexlm.objectives import (
    Convex,
    Mle,
    Objective,
    get_objective,
    objective_names,
    register_objective,
    summarize,
    warmed_up,
)
from objective_oracle import (
    EPS,
    FAMILY,
    LEVELS,
    MIXES,
    WEIGHTINGS,
    all_objectives,
    assert_close,
    gradient,
    ids_of,
    oracle,
    oracle_value,
    oracle_weight,
    padded,
    random_rows,
    run,
)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("objective", all_objectives(), ids=ids_of)
def test_value_and_gradient_agree_with_an_independent_implementation(objective, mix):
    objective = dataclasses.replace(objective, mle_mix=mix)
    rows = [*random_rows(), [], torch.tensor([-1e-5, -2e-5]).tolist(), [-30.0, -0.5]]
    loss, grads, units = oracle(rows, objective)
    output, got = run(objective, rows)
    assert output.loss.dtype == torch.float32
    assert_close(output.loss.item(), loss)
    for row, wanted in zip(got, grads, strict=True):
        assert_close(row, wanted, atol=1e-40)  # float32 has no smaller numbers of full precision
    stats = summarize(output.statistics())
    count, total = math.fsum(a for a, _ in units), math.fsum(a * w for a, w in units)
    assert_close(stats["loss"], loss, rtol=1e-12)
    assert_close(stats["weight_mean"], total / count, rtol=1e-12)
    assert_close(stats["weight_min"], min(w for _, w in units), rtol=1e-12)
    assert_close(stats["effective_sample_size"], total**2 / count / math.fsum(a * w * w for a, w in units), rtol=1e-9)
    assert_close(stats["nll"], -math.fsum(sum(rows, [])) / len(sum(rows, [])), rtol=1e-12)
    assert stats["num_target_tokens"] == len(sum(rows, []))
    assert all(isinstance(v, float) for v in stats.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast_first(dtype):
    rows = random_rows(3)
    for objective in all_objectives():
        log_probs, mask = padded(rows, dtype)
        output = objective(log_probs, mask)
        exact, _ = padded(rows, dtype)
        exact = exact.detach().double().requires_grad_()
        wanted = objective(exact, mask)
        assert output.loss.dtype == torch.float32 and output.weights.dtype == torch.float32
        assert wanted.loss.dtype == torch.float64 and wanted.weights.dtype == torch.float64
        assert_close(output.loss.item(), wanted.loss.item(), rtol=1e-7)
        assert_close(gradient(output, log_probs), gradient(wanted, exact).to(dtype).double(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("mix", [0.0, 0.3])
@pytest.mark.parametrize("objective", all_objectives(), ids=ids_of)
def test_gradcheck(objective, mix):
    objective = dataclasses.replace(objective, mle_mix=mix)
    log_probs, mask = padded(random_rows(1, lengths=(3, 1, 5, 0)), torch.float64, junk=-1.0)
    ids = torch.tensor([[7, 7, 7, 0, 0], [1, 0, 0, 0, 0], [2, -3, 2, -3, 2], [0] * 5])
    weights = torch.tensor([1.0, 2.5, 0.5, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: objective(x, mask, sample_weights=weights).loss, log_probs)
    assert torch.autograd.gradcheck(lambda x: objective(x, mask, sequence_ids=ids).loss, log_probs)
    if objective.name == "mle" or getattr(objective, "k", 1) in (1.0, 3.0, 0.5):
        assert torch.autograd.gradgradcheck(lambda x: objective(x, mask).loss, log_probs, atol=1e-4)


@pytest.mark.parametrize("name,settings", FAMILY)
def test_weight_is_minus_the_slope_of_value(name, settings):
    objective = get_objective(name, **settings)
    points = [-0.0, -1e-9, -5e-5, -0.99e-4, -1e-4, -1.01e-4, -1e-2, -0.3, -0.5, -0.7, -3.0, -20.0, -1e4]
    m = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    value = objective.value(m)
    (slope,) = torch.autograd.grad(value.sum(), m)
    assert value[0] == 0
    assert (-slope).isfinite().all() and (objective.weight(m) >= 0).all()
    assert_close(-slope, objective.weight(m).detach(), rtol=1e-9)
    assert_close(value.detach(), [oracle_value(name, settings.get("k"), x) for x in points], rtol=1e-12)
    assert_close(objective.weight(m).detach(), [oracle_weight(name, settings.get("k"), x) for x in points], rtol=1e-12)


@pytest.mark.parametrize("k", [0.01, 0.1, 0.5, 0.9, 1.0])
def test_power_is_continuous_with_its_weight_where_the_parabola_ends(k):
    power = get_objective("power", k=k)
    m = torch.tensor([-EPS * (1 - 1e-9), -EPS * (1 + 1e-9)], dtype=torch.float64)
    assert_close(power.value(m)[0], power.value(m)[1], rtol=1e-7)
    assert_close(power.weight(m)[0], power.weight(m)[1], rtol=1e-6)
    u = torch.linspace(0, 2 * EPS, 101, dtype=torch.float64)
    assert (power.value(-u).diff() > 0).all()
    assert (power.weight(-u) > 0).all() and (power.weight(-u).diff() <= 0).all()


# Relations to other losses.


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_convex_with_a_small_k_is_nearly_mle(level, weighting):
    rows = random_rows(5)
    small, small_grad = run(get_objective("convex", k=1e-4, level=level, length_weighting=weighting), rows)
    mle, mle_grad = run(get_objective("mle", level=level, length_weighting=weighting), rows)
    assert_close(small.loss.item(), mle.loss.item(), rtol=1e-3)
    assert_close(sum(small_grad, []), sum(mle_grad, []), rtol=1e-3)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_power_with_k_1_is_mle(level, weighting):
    rows = [*random_rows(5), [-1e-6], [0.0, 0.0]]
    power, power_grad = run(get_objective("power", k=1, level=level, length_weighting=weighting), rows)
    mle, mle_grad = run(get_objective("mle", level=level, length_weighting=weighting), rows)
    assert_close(power.loss.item(), mle.loss.item())
    assert_close(sum(power_grad, []), sum(mle_grad, []))


@pytest.mark.parametrize("k", [0.5, 1.0, 3.0])
def test_gradient_is_the_reference_formula_s_over_k(k):
    """The paper's loss for a batch, from its maths: -sum_i T_i exp(k m_i) / sum_i T_i."""
    log_probs, mask = padded(random_rows(8), torch.float64, junk=0.0)
    lengths = mask.sum(1)
    mean = (log_probs * mask).sum(1) / lengths
    reference = -(lengths * (k * mean).exp()).sum() / lengths.sum()
    output = get_objective("convex", k=k)(log_probs, mask)
    wanted = torch.autograd.grad(reference, log_probs)[0] / k
    torch.testing.assert_close(gradient(output, log_probs), wanted, rtol=1e-12, atol=0)
    # Shift and scale: (reference + 1) / k.
    assert_close(output.loss.item(), (reference.item() + 1) / k, rtol=1e-12)


def test_sequence_weighting_with_one_sequence_is_token_weighting():
    rows = random_rows(2, lengths=(9,))
    token, token_grad = run(get_objective("convex", k=2), rows)
    sequence, sequence_grad = run(get_objective("convex", k=2, length_weighting="sequence"), rows)
    assert_close(token.loss.item(), sequence.loss.item())
    assert_close(token_grad[0], sequence_grad[0])


def test_dft_has_the_gradient_of_its_formula():
    log_probs, mask = padded(random_rows(9), torch.float64, junk=0.0)
    formula = -(log_probs.exp().detach() * log_probs * mask).sum() / mask.sum()
    output = get_objective("dft")(log_probs, mask)
    torch.testing.assert_close(
        gradient(output, log_probs), torch.autograd.grad(formula, log_probs)[0], rtol=1e-12, atol=0
    )


# Settings and registry.


def test_dft_is_token_level_convex_with_k_1():
    assert get_objective("dft") == get_objective("convex", level="token", k=1.0)
    assert get_objective("dft", k=1, length_weighting="sequence", mle_mix=0.1).mle_mix == 0.1
    with pytest.raises(ValueError, match="level='sequence' is not it"):
        get_objective("dft", level="sequence")
    with pytest.raises(ValueError, match="k=2"):
        get_objective("dft", k=2)


def test_names_and_settings_round_trip():
    assert {"mle", "convex", "power", "dft"} <= set(objective_names())
    for objective in all_objectives():
        settings = json.loads(json.dumps(objective.to_dict()))
        assert get_objective(**settings) == objective
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_objective("convex").k = 2.0


@pytest.mark.parametrize(
    "name,settings,message",
    [
        ("nope", {}, "unknown objective `nope`; known: .*convex.*dft.*mle.*power"),
        ("mle", {"k": 1.0}, "objective `mle` has no setting `k`; it has: level, length_weighting, mle_mix"),
        ("convex", {"kk": 1.0}, "no setting `kk`; it has: .*k"),
        ("convex", {"k": 0}, "k must be a finite number"),
        ("convex", {"k": -1.0}, "k must be a finite number"),
        ("convex", {"k": math.inf}, "k must be a finite number"),
        ("convex", {"k": math.nan}, "k must be a finite number"),
        ("convex", {"k": "1"}, "k must be a finite number"),
        ("convex", {"k": True}, "k must be a finite number"),
        ("convex", {"k": None}, "k must be a finite number"),
        ("power", {"k": 1.5}, "k must be a finite number"),
        ("power", {"k": 0.0}, "k must be a finite number"),
        ("mle", {"level": "word"}, "level must be 'sequence' or 'token', not 'word'"),
        ("mle", {"length_weighting": None}, "length_weighting must be"),
        ("mle", {"mle_mix": 1.5}, "mle_mix must be a finite number in"),
        ("mle", {"mle_mix": -0.1}, "mle_mix must be a finite number in"),
    ],
)
def test_bad_settings_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        get_objective(name, **settings)


OUTSIDE = """
from dataclasses import dataclass

from convexlm.objectives import Objective, register_objective


@register_objective("reciprocal")
@dataclass(frozen=True, kw_only=True)
class Reciprocal(Objective):
    sharpness: float = 1.0

    def value(self, m):
        return m / (self.sharpness * m - 1)

    def weight(self, m):
        return 1 / (self.sharpness * m - 1) ** 2
"""


def test_an_objective_of_one_s_own_takes_under_15_lines(tmp_path, monkeypatch):
    assert len([line for line in OUTSIDE.splitlines() if line.strip()]) < 15
    (tmp_path / "my_objective.py").write_text(OUTSIDE, encoding="utf-8")
    from convexlm import objectives

    monkeypatch.setattr(objectives, "_registry", dict(objectives._registry))
    for _ in range(2):  # a module may be loaded again, as notebooks do
        spec = importlib.util.spec_from_file_location("my_objective", tmp_path / "my_objective.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "my_objective", module)
        spec.loader.exec_module(module)
    own = get_objective("reciprocal", sharpness=2.0, mle_mix=0.25)
    assert "reciprocal" in objective_names() and own.to_dict()["name"] == "reciprocal"
    log_probs, mask = padded(random_rows(4), torch.float64, junk=-1.0)
    output = own(log_probs, mask)
    m = (log_probs * mask).sum(1) / mask.sum(1)
    wanted = (mask.sum(1) * (0.75 * m / (2 * m - 1) - 0.25 * m)).sum() / mask.sum()
    assert_close(output.loss.item(), wanted.item(), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x: own(x, mask).loss, log_probs)
    assert_close(output.weights, (0.75 / (2 * m - 1) ** 2 + 0.25).detach(), rtol=1e-12)
    assert warmed_up(own, 0.5) is own


def test_registration_refuses_what_would_mislead():
    with pytest.raises(ValueError, match="exists already"):
        register_objective("convex")(type("Other", (Objective,), {}))
    with pytest.raises(ValueError, match="exists already"):
        register_objective("dft")(type("Other", (Objective,), {}))
    with pytest.raises(ValueError, match="not a subclass"):
        register_objective("other")(dict)
    with pytest.raises(ValueError, match="put @dataclass"):
        register_objective("other")(type("Other", (Objective,), {"__annotations__": {"j": "float"}, "j": 1.0}))
    with pytest.raises(NotImplementedError, match="must define value"):
        Objective()(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))


def test_an_objective_that_is_not_elementwise_is_refused():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Averaged(Objective):
        def value(self, m):
            return -m.mean()

        def weight(self, m):
            return torch.ones_like(m)

    with pytest.raises(ValueError, match=r"each of the 2 numbers m, not \(\) and \(2,\); it must be elementwise"):
        Averaged()(torch.full((2, 3), -1.0), torch.ones(2, 3, dtype=torch.bool))


def test_warm_up_goes_from_maximum_likelihood_to_the_objective():
    convex = get_objective("convex", k=4.0, mle_mix=0.1, length_weighting="sequence")
    assert warmed_up(convex, 0) == Mle(mle_mix=0.1, length_weighting="sequence")
    assert warmed_up(convex, 0.25) == dataclasses.replace(convex, k=1.0)
    assert warmed_up(convex, 1.0) == convex
    power = get_objective("power", k=0.5, level="token")
    assert warmed_up(power, 0) == dataclasses.replace(power, k=1.0)
    assert warmed_up(power, 0.5) == dataclasses.replace(power, k=0.75)
    assert warmed_up(power, 1) == power
    assert warmed_up(Mle(), 0.3) == Mle()
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="fraction"):
            warmed_up(Mle(), bad)
    rows = random_rows(6)
    losses = [run(warmed_up(Convex(k=1.0), f), rows)[0].loss.item() for f in (0, 1e-13, 1e-9, 1e-3)]
    assert_close(losses, [losses[0]] * 4, rtol=1e-3)
