"""How much a batch may hold: by the GPU's memory and the model's keys and values, and what the user says first."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

from convexlm.decoding import decode_jobs
from convexlm.decoding.backends.hf import HuggingFaceBackend, cached_bytes
from convexlm.decoding.batching import MAX_SENTENCES, TOKEN_BUDGET, tokens_that_fit
from decoding_helpers import SOURCES, make_checkpoint, make_job, read

if TYPE_CHECKING:
    from pathlib import Path

SMALL = {"vocab_size": 32, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, intermediate_size=16),
    "grouped": LlamaConfig(**SMALL, intermediate_size=16, num_key_value_heads=2),
    "own head size": Gemma2Config(**SMALL, intermediate_size=16, num_key_value_heads=2, head_dim=8),
    "gpt2": GPT2Config(vocab_size=32, n_embd=48, n_layer=3, n_head=4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(CONFIGS))
def test_bytes_of_a_token_are_those_that_its_cache_has(name: str, dtype: torch.dtype):
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype)
    cache = model(torch.zeros(2, 5, dtype=torch.long), use_cache=True).past_key_values
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    assert cached_bytes(model) == held / 10


def test_a_config_that_does_not_tell_gives_no_number():
    config = types.SimpleNamespace(hidden_size=8, get_text_config=lambda: types.SimpleNamespace(hidden_size=8))
    assert cached_bytes(types.SimpleNamespace(config=config, dtype=torch.float32)) is None


@pytest.mark.parametrize(
    ("memory", "weights", "low", "high"),
    [
        (150_754_820_096, 13_476_839_424, 100_000, 110_000),  # H200
        (25_650_000_000, 13_476_839_424, 8_000, 10_000),  # 24 GB
        (12_000_000_000, 13_476_839_424, 1024, 1024),  # less than the weights: halving has to find out
    ],
)
def test_a_7b_llama_gets_what_fits(memory: int, weights: int, low: int, high: int):
    assert low <= tokens_that_fit(memory, weights, 524_288) <= high


def test_on_a_gpu_the_memory_says_and_on_a_cpu_it_does_not(monkeypatch: pytest.MonkeyPatch):
    backend = HuggingFaceBackend()
    backend.model = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float32)
    assert backend.room() == (TOKEN_BUDGET, MAX_SENTENCES)
    there: Any = types.SimpleNamespace(
        device=torch.device("cuda:0"),
        config=backend.model.config,
        dtype=torch.float32,
        parameters=backend.model.parameters,
    )
    weights = 4 * sum(p.numel() for p in backend.model.parameters())
    card = types.SimpleNamespace(total_memory=weights + 100_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    backend.model = there
    assert backend.room() == (40_000_000 // (2 * 3 * 48 * 4), 512)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_batches_are_what_the_backend_has_room_for_unless_the_user_says(tmp_path: Path, num_processes: int):
    checkpoint = make_checkpoint(tmp_path / "checkpoint-1", steps=1)
    whole = make_job(tmp_path / "whole.jsonl", SOURCES, max_new_tokens=24)
    decode_jobs(checkpoint, [whole], num_processes=num_processes)
    small = make_job(tmp_path / "small.jsonl", SOURCES, max_new_tokens=24)
    sizes: list[int] = []
    decode_jobs(checkpoint, [small], token_budget=1, progress=lambda state: sizes.append(state.done))
    assert [row["hypothesis"] for row in read(whole.output_file)] == [
        row["hypothesis"] for row in read(small.output_file)
    ]
    assert set(range(1, len(SOURCES) + 1)) <= set(sizes), "one sentence at a time"
