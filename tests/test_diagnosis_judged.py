"""Judged records: how p̄ parts right from wrong, against brute force and simulation, and what the command shows."""

from __future__ import annotations

import json

import numpy as np
import pytest

from convexlm.cli import main
from convexlm.diagnosis import Sample
from convexlm.diagnosis.judged import couples_right_above, describe_judged
from convexlm.diagnosis.sample import sample_records
from convexlm.errors import UserError
from diagnosis_helpers import analysed, flat_sample, made_sample, make_checkpoint, make_data


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVEXLM_CACHE", str(tmp_path / "cache"))


def by_definition(right, wrong):
    """The share of couples, and DeLong's variance, one couple at a time."""
    table = np.array([[(r > w) + 0.5 * (r == w) for w in wrong] for r in right], dtype=np.float64)
    share = table.mean()
    variance = table.mean(1).var(ddof=1) / len(right) + table.mean(0).var(ddof=1) / len(wrong)
    return share, variance


@pytest.mark.parametrize("seed", range(4))
def test_the_share_of_couples_is_that_of_brute_force_with_ties(seed):
    draw = np.random.default_rng(seed)
    right, wrong = draw.integers(0, 12, size=60).astype(float), draw.integers(-4, 9, size=35).astype(float)
    share, (low, high) = couples_right_above(right, wrong)
    wanted, variance = by_definition(right, wrong)
    assert share == pytest.approx(wanted, abs=1e-12)
    assert (high - low) / 2 == pytest.approx(1.959964 * variance**0.5, rel=1e-6)
    turned, (other_low, other_high) = couples_right_above(wrong, right)
    assert turned == pytest.approx(1 - share) and (other_low, other_high) == pytest.approx((1 - high, 1 - low))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(0)
    truth = 0.7602499389065233  # of two normal distributions whose means are one standard deviation apart
    hits = 0
    for _ in range(400):
        _, (low, high) = couples_right_above(draw.standard_normal(60) + 1, draw.standard_normal(40))
        hits += low <= truth <= high
    assert 0.91 <= hits / 400 <= 0.985


def test_extremes_stay_in_bounds():
    assert couples_right_above(np.array([1.0]), np.array([0.0, 2.0])) == (0.5, (0.0, 1.0))
    assert couples_right_above(np.full(15, 0.5), np.full(15, 0.5)) == (0.5, (0.0, 1.0))
    share, (low, high) = couples_right_above(np.arange(20.0), np.array([0.5, 1.5]))
    assert 0 <= low <= share <= high <= 1


def test_couples_that_all_agree_prove_the_less_the_fewer_they_are():
    """DeLong's variance is zero there. All agree with a probability of at most A to the power of the rarer side."""
    for size in (2, 5, 300):
        share, (low, high) = couples_right_above(np.arange(size) + 400.0, np.arange(400.0))
        assert (share, high) == (1.0, 1.0) and low**size == pytest.approx(0.025)
        share, interval = couples_right_above(np.arange(400.0), np.arange(size) + 400.0)
        assert share == 0.0 and interval == pytest.approx((0.0, 1 - low))


def test_figures_by_hand_without_the_unjudged_and_those_of_weight_0():
    p_bars = [0.9, 0.8, 0.2, 0.1, 0.5, 0.95, 0.05]
    right = np.array([1, 0, 1, 0, np.nan, 0, 1])
    sample = flat_sample(p_bars, length=[10, 4, 10, 6, 9, 9, 9], weights=[1, 1, 1, 1, 1, 0, 0], right=right)
    found = describe_judged(sample)
    assert (found["right"], found["wrong"], found["unjudged"]) == (2, 2, 1)
    assert found["p_bar_ranks_right"] == 0.75 and found["length_ranks_right"] == 1.0
    assert found["p_bar_median"] == pytest.approx({"right": 0.55, "wrong": 0.45})
    assert found["mean_tokens"] == {"right": 10.0, "wrong": 5.0}
    half = next(row for row in found["dropping"] if row["dropped"] == 0.5)
    assert half == {"dropped": 0.5, "wrong_left": 0.5, "wrong_dropped": 0.5, "right_dropped": 0.5}
    most = found["dropping"][-1]
    assert (most["wrong_left"], most["wrong_dropped"], most["right_dropped"]) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize(("name", "settings"), [("convex", {"k": 2.0}), ("dft", {}), ("power", {"k": 0.5})])
def test_what_wrong_records_get_is_what_their_source_gets(name, settings):
    plain = made_sample(300, seed=3)
    right = np.random.default_rng(1).integers(0, 2, size=300).astype(float)
    known = {
        "lengths": plain.lengths,
        "m": plain.m,
        "weights": plain.weights,
        "log_probs": plain.log_probs,
        "logit_norms": plain.logit_norms,
    }
    named = Sample(**known, right=right, sources=["right" if x else "wrong" for x in right])
    (entry,) = analysed(named, name, **settings)["objectives"]
    source = next(row for row in entry["by_source"] if row["source"] == "wrong")
    for key in ("share", "mle_share", "logit_share", "mle_logit_share"):
        assert entry["wrong"][key] == pytest.approx(source[key], abs=1e-12)
    # Records that nobody has judged change nothing of it.
    right[200:] = np.nan
    few = {key: value[:200] for key, value in known.items() if key in ("lengths", "m", "weights")}
    tokens = int(plain.lengths[:200].sum())
    few |= {key: known[key][:tokens] for key in ("log_probs", "logit_norms")}
    (with_others,) = analysed(Sample(**known, right=right), name, **settings)["objectives"]
    (alone,) = analysed(Sample(**few, right=right[:200]), name, **settings)["objectives"]
    assert with_others["wrong"] == pytest.approx(alone["wrong"], rel=1e-9)


def test_without_judged_records_there_is_nothing_to_say():
    assert describe_judged(flat_sample([0.5, 0.6])) is None
    assert describe_judged(flat_sample([0.5, 0.6], right=np.array([1.0, 1.0]))) is None
    assert describe_judged(flat_sample([0.5, 0.6], weights=[1, 0], right=np.array([1.0, 0.0]))) is None
    with pytest.raises(ValueError, match="right"):
        flat_sample([0.5, 0.6], right=np.array([1.0]))


def test_the_field_is_read_in_its_forms_and_refused_otherwise(tmp_path):
    forms = [True, False, 1, 0, 1.0, None]
    data = make_data(tmp_path / "d.jsonl", 6, good=lambda n: forms[n])
    assert sample_records(data, judged_field="good").judged == [True, False, True, False, True, None]
    assert sample_records(data).judged is None
    for value, said in (("yes", "'yes'"), (2, "'2'"), (float("nan"), "'nan'"), ([], "'[]'")):
        make_data(tmp_path / "bad.jsonl", 3, good=lambda n, value=value: value if n == 1 else True)
        with pytest.raises(UserError, match="bad.jsonl:2 has ") as caught:
            sample_records(tmp_path / "bad.jsonl", judged_field="good")
        assert said in str(caught.value)
    with pytest.raises(UserError, match="none of them has true"):
        sample_records(data, judged_field="goood")
    with pytest.raises(UserError, match=r"none of them has .*; raise --max_records"):
        sample_records(data, judged_field="good", max_records=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def test_the_command_shows_it_as_json_text_and_page(capsys, checkpoint, tmp_path):
    data = make_data(tmp_path / "d.jsonl", 50, clean=lambda n: n % 3 > 0 if n < 40 else None)
    page = tmp_path / "p.html"
    words = ["diagnose", "--model_name_or_path", str(checkpoint), "--dataset", str(data), "--judged_field", "clean"]
    assert main([*words, "--objective", "convex", "dft", "--k", "1", "--page", str(page)]) == 0
    text = capsys.readouterr().out
    assert "judged by `clean`: 26 right, 14 wrong, 10 not judged" in text
    assert "what wrong ones get" in text and "least likely dropped" in text and "p̄ ranks a right record" in text
    html = page.read_text(encoding="utf-8")
    assert '<section id="judged"' in html and 'href="#judged"' in html and "wrong among the rest" in html
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    judged = found["data"]["judged"]
    assert (judged["right"], judged["wrong"], judged["unjudged"]) == (26, 14, 10)
    assert found["reading"]["judged_field"] == "clean"
    assert main([*words[:-1], "cleann"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_measured_record_can_be_written_and_filtered_by(capsys, checkpoint, tmp_path):
    data, file = make_data(tmp_path / "d.jsonl", 30), tmp_path / "new" / "r.jsonl"
    words = ["diagnose", "--model_name_or_path", str(checkpoint), "--dataset", str(data), "--records_file", str(file)]
    assert main([*words, "--k", "1", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "measured" not in found and found["records_file"] == str(file)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [row["id"] for row in rows] == [f"d.jsonl:{line}" for line in range(1, 31)]
    assert found["data"]["num_target_tokens"] == sum(row["tokens"] for row in rows)
    nll = -sum(row["tokens"] * row["log_prob"] for row in rows) / sum(row["tokens"] for row in rows)
    assert found["data"]["nll"] == pytest.approx(nll, rel=1e-6)
    for row in rows:
        assert row["p_bar"] == pytest.approx(np.exp(row["log_prob"]))
        assert row["weights"] == pytest.approx({"convex k=1": row["p_bar"], "convex k=2": row["p_bar"] ** 2})
    before = data.read_bytes()
    assert main([*words[:-1], str(tmp_path / "new" / ".." / "d.jsonl")]) == 2  # the data themselves
    assert "is the file of --dataset" in capsys.readouterr().err and data.read_bytes() == before
    assert main([*words, "--page", str(file)]) == 2
    assert "is the file of --page" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path)]) == 2
    assert "--records_file" in capsys.readouterr().err


def test_without_the_field_nothing_is_said_of_it(capsys, checkpoint, tmp_path):
    data = make_data(tmp_path / "d.jsonl", 20, clean=lambda n: n % 2 > 0)
    page = tmp_path / "p.html"
    words = ["diagnose", "--model_name_or_path", str(checkpoint), "--dataset", str(data), "--page", str(page)]
    assert main(words) == 0
    assert "judged" not in capsys.readouterr().out and "judged" not in page.read_text(encoding="utf-8")
