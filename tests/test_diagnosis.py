"""A diagnosis: its numbers against float64 forwards, the objectives and closed forms; the rules of its advice."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from convexlm.diagnosis import (
    DERIVED,
    MEASURED,
    MEASURED_NOISE,
    REPORTED,
    RULES,
    Sample,
    advise,
    analyse_objective,
    compare,
)
from convexlm.diagnosis.cache import cache_path, load, store
from convexlm.diagnosis.measure import measure
from convexlm.diagnosis.rules import EVIDENCE
from convexlm.diagnosis.sample import sample_records
from convexlm.errors import UserError
from convexlm.instructions import load_records
from convexlm.objectives import Objective, get_objective, summarize
from convexlm.theory import optimum
from convexlm.tokenization import PromptSettings, tokenize_records
from diagnosis_helpers import (
    analysed,
    flat_sample,
    forward_by_hand,
    made_sample,
    make_checkpoint,
    make_data,
)
from training_helpers import tiny_tokenizer


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = make_data(tmp_path_factory.mktemp("data") / "d.jsonl", count=30)
    return tokenize_records(load_records(path), tiny_tokenizer(), PromptSettings(), None).rows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def load_model(folder, dtype=torch.float32):
    from convexlm.decoding.loading import load_model

    return load_model(folder, "cpu", dtype)


# --- measuring


@pytest.mark.parametrize("tied", [False, True])
def test_lengths_and_means_are_those_of_a_float64_forward(tmp_path, rows, tied):
    folder = make_checkpoint(tmp_path / "m", seed=2, tie_word_embeddings=tied)
    found = measure(load_model(folder), rows, eos_token_id=2)
    wanted = forward_by_hand(folder, rows)
    assert found.lengths.tolist() == [len(log_probs) for log_probs, _ in wanted]
    np.testing.assert_allclose(found.m, [log_probs.mean() for log_probs, _ in wanted], atol=2e-5)
    np.testing.assert_allclose(found.log_probs, np.concatenate([x for x, _ in wanted]), atol=5e-5)
    np.testing.assert_allclose(found.logit_norms, np.concatenate([x for _, x in wanted]), atol=2e-5)
    np.testing.assert_allclose(found.end_log_probs, [x[-1] for x, _ in wanted], atol=5e-5)
    assert np.ptp(found.m) > 2  # the records do differ


def test_the_batch_size_changes_nothing(checkpoint, rows):
    model = load_model(checkpoint)
    alone = measure(model, rows, batch_size=1)
    for size in (3, 7, 100, None):
        together = measure(model, rows, batch_size=size)
        np.testing.assert_allclose(together.log_probs, alone.log_probs, atol=2e-5)
        np.testing.assert_array_equal(together.lengths, alone.lengths)


def test_bfloat16_is_near_float32(checkpoint, rows):
    exact = measure(load_model(checkpoint), rows)
    rough = measure(load_model(checkpoint, torch.bfloat16), rows)
    assert rough.log_probs.dtype == np.float32
    assert np.abs(rough.m - exact.m).mean() < 0.1


@pytest.mark.parametrize("attribute", ["logits_scaling", "final_logit_softcapping"])
def test_models_that_change_their_logits(tmp_path, rows, attribute):
    """Granite divides its logits and Gemma 2 caps them, between the output layer and what a caller sees."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

    shape = {
        "vocab_size": 44,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
    }
    torch.manual_seed(0)
    if attribute == "logits_scaling":
        model = GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=3.0))
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=8, final_logit_softcapping=2.0))
    model.save_pretrained(tmp_path)
    wanted = np.concatenate([x for x, _ in forward_by_hand(tmp_path, rows)])
    np.testing.assert_allclose(measure(model.eval(), rows).log_probs, wanted, atol=5e-5)


def test_the_whole_models_logits_are_taken_where_its_parts_give_others(checkpoint, rows):
    model = load_model(checkpoint)
    plain = type(model).forward

    def doubled(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.logits = 2 * out.logits
        return out

    model.forward = doubled.__get__(model)
    logits = model(input_ids=torch.tensor([rows[0]["input_ids"]])).logits[0].double().log_softmax(-1)
    wanted = [logits[i - 1, label].item() for i, label in enumerate(rows[0]["labels"]) if label != -100]
    np.testing.assert_allclose(measure(model, rows).log_probs[: len(wanted)], wanted, atol=1e-4)


def test_the_whole_model_is_called_where_its_states_do_not_fit_the_output_layer(rows):
    from transformers import ElectraConfig, ElectraForCausalLM

    torch.manual_seed(0)
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "is_decoder": True}
    model = ElectraForCausalLM(ElectraConfig(vocab_size=100, hidden_size=32, embedding_size=16, **heads)).eval()
    logits = model(input_ids=torch.tensor([rows[0]["input_ids"]])).logits[0].double().log_softmax(-1)
    wanted = [logits[i - 1, label].item() for i, label in enumerate(rows[0]["labels"]) if label != -100]
    np.testing.assert_allclose(measure(model, rows).log_probs[: len(wanted)], wanted, atol=1e-4)


def test_out_of_memory_halves_the_batch(checkpoint, rows, monkeypatch):
    import convexlm.diagnosis.measure as module

    model, tried = load_model(checkpoint), []
    plain = module._measure_batch

    def small_memory(model, batch, project, device):
        tried.append(len(batch))
        if len(batch) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(model, batch, project, device)

    wanted = measure(model, rows)
    monkeypatch.setattr(module, "_measure_batch", small_memory)
    np.testing.assert_allclose(measure(model, rows, batch_size=16).log_probs, wanted.log_probs, atol=2e-5)
    assert max(tried) == 16
    monkeypatch.setattr(module, "_measure_batch", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(UserError, match="--max_length"):
        measure(model, rows)


def test_a_broken_model_is_refused_with_the_record(checkpoint, rows):
    model = load_model(checkpoint)
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(UserError, match=r"record d\.jsonl:1: .*no number"):
        measure(model, rows)


def test_the_cache_gives_back_what_was_stored_and_forgives_damage(tmp_path, monkeypatch, rows):
    monkeypatch.setenv("CONVEXLM_CACHE", str(tmp_path))
    path = cache_path("abc", rows, device="cuda:1", dtype="bfloat16")
    assert path.is_relative_to(tmp_path) and load(path) is None
    arrays = {"a": np.arange(5.0), "b": np.array([True])}
    store(path, arrays)
    found = load(path)
    assert found.keys() == arrays.keys() and (found["a"] == arrays["a"]).all()
    assert cache_path("abc", rows, device="cuda:0", dtype="bfloat16") == path
    others = [
        cache_path("abd", rows, device="cuda", dtype="bfloat16"),
        cache_path("abc", rows[1:], device="cuda", dtype="bfloat16"),
        cache_path("abc", rows[::-1], device="cuda", dtype="bfloat16"),
        cache_path("abc", rows, device="cpu", dtype="bfloat16"),
        cache_path("abc", rows, device="cuda", dtype="float32"),
    ]
    assert len({path, *others}) == 6
    path.write_bytes(path.read_bytes()[:40])
    assert load(path) is None


# --- sampling


def test_samples_are_drawn_by_seed_and_keep_the_datas_order(tmp_path):
    path = make_data(tmp_path / "d.jsonl", 100)
    first, again, other = (sample_records(path, max_records=20, seed=seed) for seed in (1, 1, 2))
    ids = [record.id for record in first.records]
    assert ids == [record.id for record in again.records] != [record.id for record in other.records]
    numbers = [int(name.split(":")[1]) for name in ids]
    assert numbers == sorted(set(numbers)) and len(numbers) == 20 and first.total == 100 and max(numbers) > 50
    assert len(sample_records(path, max_records=None).records) == 100
    with pytest.raises(UserError, match="--max_records"):
        sample_records(path, max_records=0)


def test_the_source_field_is_found_named_or_left(tmp_path):
    named = make_data(tmp_path / "a.jsonl", 20, source=lambda n: "ab"[n % 2], domain=lambda n: f"d{n % 3}")
    found = sample_records(named)
    assert found.source_field == "source" and found.sources == ["a", "b"] * 10
    assert sample_records(named, source_field="domain").sources[:3] == ["d0", "d1", "d2"]
    with pytest.raises(UserError, match="nowhere"):
        sample_records(named, source_field="nowhere")
    # Source sentences are no names of groups.
    sentences = make_data(tmp_path / "b.jsonl", 20, source=lambda n: f"sentence {n}")
    assert sample_records(sentences).sources is None
    partly = make_data(tmp_path / "c.jsonl", 20, dataset=lambda n: None if n % 2 else "web")
    assert sample_records(partly).sources == ["web", "(none)"] * 10


# --- statistics

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


# --- advice

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
