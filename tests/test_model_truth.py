"""What a checkpoint gives to all translations of a source, against a plain forward pass of each."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from convexlm.testsets import load_test_set
from convexlm.tinyworld import distribution_measures, translations
from convexlm.tinyworld.model_truth import SENTENCES, model_log_probs, truth_of_checkpoint
from convexlm.tinyworld.tokenizer import train_tokenizer
from convexlm.tokenization import PromptSettings


@pytest.fixture(scope="module")
def test_set():
    spec = {"name": "tiny", "kind": "tinyworld", "pairs": ["en-zh"], "size": SENTENCES + 3, "seed": 3}
    return load_test_set(spec, "en-zh", Path())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, test_set):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([*test_set.sources, *test_set.references[0]], vocab_size=600)
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **special, initializer_range=0.3))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    PromptSettings(template="alpaca", add_bos=True).save(folder)
    return folder


def test_log_probabilities_equal_a_forward_pass_of_each_alone(checkpoint, test_set):
    from convexlm.templates import get_template
    from convexlm.tokenization import load_tokenizer

    sources = test_set.sources[:3]
    candidates = [list(translations(source, "en-zh"))[:5] for source in sources]
    found = model_log_probs(checkpoint, sources, candidates, "en-zh")
    tokenizer = load_tokenizer(str(checkpoint))
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    instruction = "Translate the following sentences from English to Chinese."
    for source, texts, values in zip(sources, candidates, found, strict=True):
        assert list(values) == texts
        prompt = get_template("alpaca").fill({"instruction": instruction, "input": source})
        head = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]
        for text in texts:
            answer = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            with torch.no_grad():
                log_probs = model(torch.tensor([head + answer])).logits[0, len(head) - 1 : -1].log_softmax(-1)
            expected = log_probs.gather(1, torch.tensor(answer)[:, None]).sum().item()
            assert values[text] == pytest.approx(expected, abs=1e-4)


def test_measures_are_those_of_the_distributions_and_are_kept(checkpoint, test_set, tmp_path, monkeypatch):
    monkeypatch.setattr("convexlm.tinyworld.model_truth.SENTENCES", 2)  # fifty have fifty thousand translations
    cache = tmp_path / "truth.json"
    result = truth_of_checkpoint(checkpoint, test_set, cache)
    sources = test_set.sources[:2]
    truth = [translations(source, "en-zh") for source in sources]
    expected = distribution_measures(
        truth, model_log_probs(checkpoint, sources, [list(one) for one in truth], "en-zh")
    )
    assert result["num_sentences"] == 2 < SENTENCES < len(test_set.sources)
    for name in ("valid_mass", "mode_mass", "cross_entropy", "truth_entropy", "model_entropy"):
        assert result[name] == pytest.approx(expected[name], rel=1e-6)
        assert math.isfinite(result[name])
    assert result["kl_divergence"] >= 0
    kept = json.loads(cache.read_text(encoding="utf-8"))
    assert kept == result
    cache.write_text(json.dumps({**kept, "valid_mass": 0.5}), encoding="utf-8")
    assert truth_of_checkpoint(checkpoint, test_set, cache)["valid_mass"] == 0.5  # not measured again
    cache.write_text(json.dumps({**kept, "checkpoint_sha256": "other", "valid_mass": 0.5}), encoding="utf-8")
    assert truth_of_checkpoint(checkpoint, test_set, cache) == result
    other = truth_of_checkpoint(checkpoint, test_set, cache, "Say it in [TGT]:")  # as decoding was told to ask
    assert other["cross_entropy"] != result["cross_entropy"]
    assert truth_of_checkpoint(checkpoint, test_set, cache) == result
