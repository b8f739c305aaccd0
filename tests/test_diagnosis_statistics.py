"""What a diagnosis computes of means: statistics, ratios, shares, a suggested k, comparisons."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from convexlm.diagnosis import (
    Sample,
    analyse,
    analyse_objective,
    compare,
)
from convexlm.objectives import get_objective, summarize
from convexlm.theory import optimum
from diagnosis_helpers import (
    flat_sample,
    made_sample,
)

FAMILY = [
    ("mle", {}),
    ("convex", {"k": 0.5}),
    ("convex", {"k": 3.0, "mle_mix": 0.2}),
    ("power", {"k": 0.5}),
    ("dft", {}),
    ("convex", {"k": 2.0, "level": "token"}),
]


@pytest.mark.parametrize("length_weighting", ["token", "sequence"])
@pytest.mark.parametrize(("name", "settings"), FAMILY)
def test_statistics_are_the_objectives_own(name, settings, length_weighting):
    """Mean weight, least weight, effective sample size and each record's share of the gradient, from autograd."""
    weights = np.resize([1.0, 2.0, 0.0, 0.5], 60)
    sample = made_sample(60, weights=weights)
    objective = get_objective(name, length_weighting=length_weighting, **settings)
    log_probs = torch.tensor(sample.log_probs, requires_grad=True)
    output = objective(
        log_probs,
        torch.ones(len(log_probs), dtype=torch.bool),
        sequence_ids=torch.tensor(sample.owners),
        sample_weights=torch.tensor(weights)[sample.owners],
    )
    wanted = summarize(output.statistics())
    found = analyse_objective(sample, objective)
    assert found["weight"]["mean"] == pytest.approx(wanted["weight_mean"], rel=1e-9)
    assert found["weight"]["min"] == pytest.approx(wanted["weight_min"], rel=1e-9)
    assert found["weight"]["effective_sample_size"] == pytest.approx(wanted["effective_sample_size"], rel=1e-9)
    (gradient,) = torch.autograd.grad(output.loss, log_probs)
    mass = np.add.reduceat(-gradient.numpy(), sample._starts)
    order = np.flatnonzero(weights > 0)[np.argsort(sample.m[weights > 0], kind="stable")]
    tenths = [mass[group].sum() / mass.sum() for group in np.array_split(order, 10)]
    np.testing.assert_allclose([row["share"] for row in found["by_p_bar"]], tenths, rtol=1e-9)
    # The loss's gradients are normalised alike, so their sums compare the updates.
    assert found["update_ratio"] == pytest.approx(mass.sum(), rel=1e-9)


@pytest.mark.parametrize(("name", "settings"), FAMILY)
def test_the_ratio_at_the_logits_is_that_of_autograd(name, settings):
    torch.manual_seed(0)
    logits = (3 * torch.randn(40, 11, dtype=torch.float64)).requires_grad_()
    log_probs = logits.log_softmax(-1)[torch.arange(40), torch.arange(40) % 11]
    lengths = np.array([4, 16, 10, 7, 3])
    owners = torch.tensor(np.repeat(np.arange(5), lengths))
    norms = []
    for place in range(40):
        (one,) = torch.autograd.grad(log_probs[place], logits, retain_graph=True)
        norms.append(one.norm().item())

    def size(objective):
        loss = objective(log_probs, torch.ones(40, dtype=torch.bool), sequence_ids=owners).loss
        return torch.autograd.grad(loss, logits, retain_graph=True)[0].norm().item()

    values = log_probs.detach().numpy()
    m = np.add.reduceat(values, np.cumsum(lengths) - lengths) / lengths
    sample = Sample(lengths=lengths, m=m, weights=np.ones(5), log_probs=values, logit_norms=np.array(norms))
    objective = get_objective(name, **settings)
    wanted = size(objective) / size(get_objective("mle"))
    assert analyse_objective(sample, objective)["logit_update_ratio"] == pytest.approx(wanted, rel=1e-9)


def test_shares_add_up_over_tenths_and_sources():
    sample = made_sample(203, sources=["abc"[i % 3] for i in range(203)])
    found = analyse_objective(sample, get_objective("convex", k=2.0))
    for part in ("by_p_bar", "by_length", "by_source"):
        for share in ("share", "mle_share", "logit_share", "mle_logit_share"):
            assert sum(row[share] for row in found[part]) == pytest.approx(1.0)
        assert sum(row["records"] for row in found[part]) == 203
    edges = [(row["from"], row["to"]) for row in found["by_p_bar"]]
    assert all(one[1] <= two[0] for one, two in zip(edges, edges[1:], strict=False))
    weights = [row["weight"] for row in found["by_p_bar"]]
    assert weights == sorted(weights)


def test_length_weighting_by_hand():
    sample = flat_sample([0.5, 0.5], length=[10, 30])
    found = analyse_objective(sample, get_objective("convex", k=1.0))["length_weighting"]
    assert found["by_length"]["token"] == pytest.approx([0.25, 0.75])
    assert found["by_length"]["sequence"] == pytest.approx([0.5, 0.5])
    assert found["moved"] == pytest.approx(0.25)


def test_records_that_get_nothing_and_the_extremes():
    sample = flat_sample([0.001] * 5 + [0.2] * 60 + [0.9] * 35, weights=[1.0] * 99 + [0.0])
    found = analyse_objective(sample, get_objective("convex", k=1.0))
    assert found["gets_nothing"]["count"] == 5
    assert found["gets_nothing"]["share"] == pytest.approx(5 / 99)
    assert len(found["neglected"]) == len(found["favoured"]) == 20
    assert {row["index"] for row in found["neglected"][:5]} == set(range(5))
    assert all(row["weight"] == pytest.approx(0.9) for row in found["favoured"])
    assert 99 not in {row["index"] for row in found["favoured"] + found["neglected"]}  # it has no weight of its own


def test_exponents_are_those_of_theory():
    lengths = np.array([2, 4, 8, 100])
    found = analyse_objective(flat_sample([0.5] * 4, length=lengths), get_objective("convex", k=4.0))["optimum"]
    assert found["collapsed"] == 2 and found["collapsed_share"] == 0.5 and found["shortest"] == 2
    d = np.array([0.6, 0.4])
    for length, exponent in ((8, found["exponent"]["1"]), (100, found["exponent"]["0"])):
        p = np.asarray(optimum(d, length, "convex", k=4.0).probabilities)
        assert math.log(p[0] / p[1]) / math.log(d[0] / d[1]) == pytest.approx(exponent, rel=1e-6)
    assert analyse_objective(made_sample(20), get_objective("dft"))["optimum"]["collapsed"] == 20
    for name, settings in (("mle", {}), ("power", {}), ("convex", {"mle_mix": 0.1})):
        assert analyse_objective(made_sample(20), get_objective(name, **settings))["optimum"] is None


def test_the_k_for_a_wanted_ratio():
    sample = flat_sample([0.1] * 10)
    found = analyse_objective(sample, get_objective("convex", k=4.0))["k_for_ratio"]
    assert found == pytest.approx(math.log(0.25) / math.log(0.1), abs=0.01)
    assert analyse_objective(sample, get_objective("convex", k=found))["update_ratio"] >= 0.25
    assert analyse_objective(flat_sample([0.9999] * 10), get_objective("convex", k=4.0))["k_for_ratio"] is None


def test_sources_may_be_an_array():
    names = ["a", "b", "a", "b"]
    found = [analyse(flat_sample([0.1, 0.5, 0.3, 0.9], sources=given), []) for given in (names, np.array(names))]
    assert found[0] == found[1] and found[1]["data"]["sources"] == {"a": 2, "b": 2}
    with pytest.raises(ValueError, match="of one length"):
        flat_sample([0.1, 0.5, 0.3], sources=np.array(names))


def test_samples_that_cannot_be_are_refused():
    ones = np.ones(3)
    for changes in (
        {"m": np.zeros(2)},
        {"m": np.array([0.0, np.nan, -1.0])},
        {"lengths": np.array([1, 0, 2])},
        {"weights": np.zeros(3)},
        {"weights": -ones},
        {"log_probs": np.zeros(4)},
    ):
        with pytest.raises(ValueError):
            Sample(**{"lengths": np.array([1, 1, 1]), "m": -ones, "weights": ones, **changes})
    bare = Sample(lengths=np.array([1, 1, 1]), m=-ones, weights=ones)
    assert analyse_objective(bare, get_objective("convex"))["logit_update_ratio"] is None
    with pytest.raises(ValueError, match="token"):
        analyse_objective(bare, get_objective("dft"))


def test_comparison_by_hand():
    before = flat_sample(np.linspace(0.1, 0.9, 20), sources=["x", "y"] * 10)
    after = flat_sample(np.linspace(0.05, 0.95, 20))
    found = compare(before, after)
    assert [row["records"] for row in found["by_p_bar"]] == [2] * 10
    lowest = found["by_p_bar"][0]
    assert lowest["nll_before"] == pytest.approx(-before.m[:2].mean())
    assert lowest["nll_after"] == pytest.approx(-after.m[:2].mean())
    assert lowest["worse"] == 1.0 and found["by_p_bar"][-1]["worse"] == 0.0
    assert [row["source"] for row in found["by_source"]] == ["x", "y"]
    with pytest.raises(ValueError):
        compare(before, flat_sample([0.5] * 3))
