"""`diagnose` with objectives of a user's own: what is wrong in them is told, what is Convex's alone is not."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from convexlm.cli import main
from convexlm.diagnosis import Sample, analyse_objective
from convexlm.diagnosis.analyse import record_weights
from convexlm.objectives import Convex, Objective, get_objective
from convexlm.verbs.diagnose import _objectives, make_parser
from diagnosis_helpers import made_sample


@dataclass(frozen=True, kw_only=True)
class Straight(Objective):
    """Maximum likelihood but for what a test changes."""

    name = "straight"

    def value(self, m):
        return -m

    def weight(self, m):
        return torch.ones_like(m)


@dataclass(frozen=True, kw_only=True)
class Half(Straight):
    def weight(self, m):
        return torch.full_like(m, 0.5)


@dataclass(frozen=True, kw_only=True)
class Number(Straight):
    def weight(self, m):
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Constant(Straight):
    def value(self, m):
        return torch.zeros_like(m)


@dataclass(frozen=True, kw_only=True)
class Rising(Straight):
    """Its slope is right, and changes its sign at m = -1."""

    def value(self, m):
        return (m + 1) ** 2 - 1

    def weight(self, m):
        return -2 * (m + 1)


@dataclass(frozen=True, kw_only=True)
class Pole(Straight):
    """As wrong at m = 0 as `power` would be without its parabola."""

    def value(self, m):
        return 2 * (-m) ** 0.5

    def weight(self, m):
        return (-m) ** -0.5


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Half(), "weight(m) is not minus the slope of value(m)"),
        (Number(), "must be elementwise in m"),
        (Constant(), "has no slope"),
        (Rising(), "negative or no number at m = -0."),
        (Pole(level="token"), "negative or no number at m = 0"),
    ],
)
def test_an_objective_whose_weight_is_not_its_slope_is_refused(objective, message):
    sample = made_sample(50, mean=-0.5)
    zeros = np.zeros_like(sample.log_probs)
    sample = Sample(sample.lengths, sample.m, sample.weights, log_probs=zeros)
    with pytest.raises(ValueError, match=rf"objective `straight`: .*{re.escape(message)}"):
        analyse_objective(sample, objective)


def test_the_commands_tell_it_before_a_model_is_looked_for(tmp_path, capsys):
    plugin = tmp_path / "wrong_slope.py"
    plugin.write_text(
        "import torch\nfrom dataclasses import dataclass\n"
        "from convexlm.objectives import Objective, register_objective\n"
        "@register_objective('wrong-slope')\n@dataclass(frozen=True, kw_only=True)\nclass WrongSlope(Objective):\n"
        "    def value(self, m):\n        return m / (m - 1)\n"
        "    def weight(self, m):\n        return torch.ones_like(m)\n",
        encoding="utf-8",
    )
    words = ["--model_name_or_path", "nowhere", "--dataset", "nowhere", "--objective", "wrong-slope"]
    for verb in (["diagnose"], ["train", "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]):
        assert main([*verb, *words, "--plugins", str(plugin)]) == 2
        assert "`wrong-slope`: weight(m) is not minus the slope of value(m)" in capsys.readouterr().err


def test_what_is_convexs_alone_is_not_said_of_what_derives_from_it():
    @dataclass(frozen=True, kw_only=True)
    class Scaled(Convex):
        """Maximum likelihood, k times: no sharpening at all."""

        name = "scaled"

        def value(self, m):
            return -self.k * m

        def weight(self, m):
            return torch.full_like(m, self.k)

    found = analyse_objective(made_sample(), Scaled(k=8.0))
    assert found["optimum"] is None and found["k_for_ratio"] is None
    assert analyse_objective(made_sample(), get_objective("convex", k=8.0))["optimum"]["collapsed"]


def test_at_token_level_every_length_is_1():
    @dataclass(frozen=True, kw_only=True)
    class PerLength(Straight):
        """`convex` with k = T, which there is a weight for only where the lengths are known."""

        def for_lengths(self, lengths):
            assert lengths.dtype == torch.float64
            return get_objective("convex", k=float(lengths.max()), level=self.level)

    sample = made_sample(30)
    weights, units, _ = record_weights(sample, PerLength(level="token"))
    assert units == pytest.approx(np.exp(sample.log_probs))
    assert weights == pytest.approx(sample.per_record(np.exp(sample.log_probs)))
    longest = sample.lengths.max()
    assert record_weights(sample, PerLength())[0] == pytest.approx(np.exp(longest * sample.m))


def test_ks_that_differ_in_a_late_digit_are_both_shown():
    words = ["--model_name_or_path", "m", "--dataset", "d", "--k", "1", "1.0000001", "0.25"]
    found = _objectives(make_parser("convexlm diagnose").parse_args(words))
    assert [label for label, _ in found] == ["convex k=1", "convex k=1.0000001", "convex k=0.25"]
    assert [one.k for _, one in found] == [1.0, 1.0000001, 0.25]
