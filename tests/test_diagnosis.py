"""A diagnosis: what it measures against float64 forwards; its cache and its samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from convexlm.diagnosis.cache import cache_path, load, store
from convexlm.diagnosis.measure import measure
from convexlm.diagnosis.sample import sample_records
from convexlm.errors import UserError
from convexlm.instructions import load_records
from convexlm.tokenization import PromptSettings, tokenize_records
from diagnosis_helpers import (
    forward_by_hand,
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
