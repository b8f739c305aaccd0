"""A diagnosis's advice: each rule speaks in its case and only there."""

from __future__ import annotations

import numpy as np
import pytest

from convexlm.diagnosis import (
    DERIVED,
    MEASURED,
    MEASURED_NOISE,
    REPORTED,
    RULES,
    advise,
    analyse_objective,
    compare,
)
from convexlm.diagnosis.rules import EVIDENCE
from convexlm.objectives import Objective, get_objective
from diagnosis_helpers import (
    analysed,
    flat_sample,
    made_sample,
)

GOOD = np.linspace(0.3, 0.85, 400)
BY_HALVES, IN_TURN = np.repeat([0.0, 1.0], 200), np.tile([0.0, 1.0], 200)


def _case(
    p_bars=GOOD,
    name="convex",
    *,
    reading=None,
    end_p=None,
    after=None,
    length=50,
    sources=None,
    right=None,
    **settings,
):
    sample = flat_sample(p_bars, length=length, sources=sources, right=right)
    analysis = analysed(sample, name, **settings)
    if reading:
        analysis["reading"] = reading
    if end_p is not None:
        analysis["end_p"] = end_p
    if after is not None:
        analysis["comparison"] = compare(sample, flat_sample(after, length=length))
    return analysis


# rule -> (a case in which it speaks, one near to it in which it does not, what it must say)
CASES = {
    "few-records": (_case([0.5] * 199), _case([0.5] * 200), "199"),
    "cut-records": (
        _case(reading={"lost_share": 0.1, "max_length": 64}),
        _case(reading={"lost_share": 0.05, "max_length": 64}),
        "64",
    ),
    "unknown-data": (_case([0.09] * 300), _case([0.11] * 300), "0.09"),
    "half-known-data": (_case([0.11] * 300), _case([0.31] * 300), "0.11"),
    "known-data": (_case([0.95] * 300), _case([0.89] * 300), "0.95"),
    "p-bar-tells": (_case(right=BY_HALVES), _case(right=IN_TURN), "100%"),
    "p-bar-misleads": (_case(right=1 - BY_HALVES), _case(right=IN_TURN), "0%"),
    "p-bar-is-blind": (_case(right=IN_TURN), _case(right=BY_HALVES), "50%"),
    "small-update": (_case([0.17] * 300, k=2.0), _case([0.4] * 300, k=2.0), "0.029"),
    "small-update-token": (_case([0.3] * 300, "dft"), _case([0.5] * 300, "dft"), "0.3"),
    "few-carry": (_case([0.02] * 280 + [0.9] * 20, k=2.0), _case(k=1.0), "7%"),
    "learning-rate": (_case([0.4] * 300, k=1.0), _case([0.6] * 300, k=1.0), "0.4"),
    "clipping": (_case([0.4] * 300, k=1.0), _case([0.6] * 300, k=1.0), "0.4"),
    "large-weights": (_case([0.999] * 300, "power", k=0.5), _case([0.5] * 300, "power", k=0.5), "31.6"),
    "get-nothing": (_case([0.005] * 9 + [0.5] * 291, k=1.0), _case([0.005] * 6 + [0.5] * 294, k=1.0), "9 records"),
    "starved-source": (
        _case([0.1] * 60 + [0.8] * 240, k=2.0, sources=["new"] * 60 + ["old"] * 240),
        _case([0.7] * 60 + [0.8] * 240, k=2.0, sources=["new"] * 60 + ["old"] * 240),
        "`new`",
    ),
    "length-weighting": (
        _case([0.5] * 400, length=[5, 100] * 200),
        _case([0.5] * 400, length=[50, 60] * 200),
        "Token and sequence",
    ),
    "collapse": (_case(k=4.0, length=[4] + [50] * 399), _case(k=4.0, length=[5] + [50] * 399), "1 records"),
    "one-hot-tokens": (_case(name="dft"), _case(k=0.9, level="token"), "k = 1"),
    "no-sharpening": (_case(k=1.0, length=100), _case(k=1.0, length=10), "1.010"),
    "new-end-token": (_case(name="dft", end_p=0.01), _case(name="convex", end_p=0.01), "0.01"),
    "nothing-against": (_case(k=1.0), _case(k=4.0), "effective sample size"),
    "given-up": (_case(after=[0.2] * 40 + list(GOOD[40:])), _case(after=GOOD), "rose by"),
    "forgetting": (_case(after=GOOD * 0.9), _case(after=np.minimum(GOOD * 1.1, 1)), "10 of 10"),
}


def _told(analysis):
    return {one.rule: one for one in advise(analysis)}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule_speaks_in_its_case_and_only_there(rule):
    speaks, silent, said = CASES[rule.name]
    one = _told(speaks)[rule.name]
    assert said in one.finding
    assert (one.objective == "") == (rule.about != "objective")
    assert rule.name not in _told(silent)


def test_rules_say_what_they_rest_on_and_promise_nothing():
    assert len({rule.name for rule in RULES}) == len(RULES) and {rule.name for rule in RULES} == set(CASES)
    assert {rule.evidence for rule in RULES} == set(EVIDENCE) == {DERIVED, REPORTED, MEASURED, MEASURED_NOISE}
    for rule in RULES:
        assert rule.about in ("data", "objective", "compare")
        text = f"{rule.finding} {rule.advice} {rule.reason}".lower()
        assert not any(word in text for word in ("will improve", "will help", "guarantee", "always better", "proves"))
        if rule.evidence == REPORTED:
            assert "users" in text
        if rule.evidence == MEASURED:
            assert "made-up corpus" in text and "no evidence about your model" in text


def test_a_named_k_is_offered_only_if_smaller():
    assert "take k <= 0.78, or mle_mix 0.1" in _told(_case([0.17] * 300, k=2.0))["small-update"].advice
    mixed = _told(_case([0.17] * 300, k=2.0, mle_mix=0.01))["small-update"].advice
    assert "take mle_mix 0.1" in mixed


def test_a_k_that_makes_weights_more_even_is_smaller_for_convex_and_larger_for_power():
    sure_of_one = [0.9999999] + [0.2] * 299
    assert (
        "Take a k nearer to 1 or mle_mix"
        in _told(analysed(flat_sample(sure_of_one), "power", k=0.1))["few-carry"].advice
    )
    convex = _told(analysed(flat_sample(sure_of_one), "convex", k=8.0))
    assert "Take a smaller k or mle_mix" in convex["few-carry"].advice
    assert "take a smaller k, mle_mix" in convex["get-nothing"].advice


def test_maximum_likelihood_and_objectives_of_ones_own_are_analysed(monkeypatch):
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Mine(Objective):
        name = "mine"

        def value(self, m):
            return m / (m - 1)

        def weight(self, m):
            return 1 / (m - 1) ** 2

    sample = made_sample(300)
    found = analyse_objective(sample, Mine())
    assert found["weight"]["mean"] == pytest.approx((1 / (sample.m - 1) ** 2).mean())
    assert _told({**analysed(sample), "objectives": [{"label": "mine", **found}]})
    mle = analyse_objective(sample, get_objective("mle"))
    assert mle["update_ratio"] == mle["weight"]["effective_sample_size"] == 1.0
    assert {one.rule for one in advise(analysed(flat_sample(GOOD), "mle"))} <= {"length-weighting"}
