"""Models tried out before they decode: which of them our loops, or padding at the left, would lead astray."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from convexlm.decoding import Search
from convexlm.decoding.backends import hf
from convexlm.decoding.backends.hf import HuggingFaceBackend
from convexlm.decoding.generation import loops_differ, others_show, padding_shows, why_not
from convexlm.errors import UserError
from decoding_helpers import make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

EOS, PAD = [2], 0


def wild(kind: str, **changes: Any) -> Any:
    """A tiny model of any kind, its weights wide enough that attention and positions tell."""
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **sizes | changes), attn_implementation="eager"
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.35)
    return model


NEO: dict[str, Any] = {"num_layers": 2, "num_heads": 4, "window_size": 256, "max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("llama", {}, ""),
        ("gpt_neo", {**NEO, "attention_types": [[["global"], 2]]}, ""),
        ("gpt_neo", {**NEO, "attention_types": [[["global", "local"], 1]]}, "places of its window"),
        ("falcon", {"alibi": True, "new_decoder_architecture": False}, "ALiBi"),
        ("roberta", {"is_decoder": True, "pad_token_id": 1}, "other probabilities than alone"),
    ],
)
def test_models_that_read_positions_otherwise_are_left_to_generate(kind: str, changes: dict, reason: str):
    model = wild(kind, **changes)
    said = why_not(model) or loops_differ(model, {0, 1, 2})
    assert reason in said and bool(said) == bool(reason), said


def test_half_precision_is_no_difference():
    assert loops_differ(wild("llama").bfloat16(), {0, 2}) == ""
    assert "other probabilities" in loops_differ(
        wild("roberta", is_decoder=True, pad_token_id=1).bfloat16(), {0, 1, 2}
    )


RECURRENT: dict[str, Any] = {"head_dim": 8, "lru_width": 32, "attention_window_size": 64}


@pytest.mark.parametrize(
    ("kind", "changes", "shows", "others"),
    [
        ("llama", {}, False, False),
        ("mistral", {"sliding_window": 4, "num_key_value_heads": 2}, False, False),
        ("recurrent_gemma", {**RECURRENT, "block_types": ["recurrent", "attention"]}, True, False),
        ("rwkv", {"attention_hidden_size": 32}, True, True),
    ],
)
def test_prompts_go_together_where_neither_padding_nor_others_show(
    kind: str, changes: dict, shows: bool, others: bool
):
    backend = HuggingFaceBackend()
    backend.model, backend.eos_ids, backend.pad_id, backend.why_generate = wild(kind, **changes), EOS, PAD, "it asks"
    backend.model.generation_config = GenerationConfig()
    backend.one_length = padding_shows(backend.model, {PAD, *EOS}, PAD)
    backend.one_prompt = others_show(backend.model, {PAD, *EOS}, PAD)
    assert (backend.one_length, backend.one_prompt) == (shows, others)
    chance = random.Random(4)
    prompts = [[chance.randrange(3, 60) for _ in range(chance.randint(3, 12))] for _ in range(10)]
    prompts += [prompt[::-1] for prompt in prompts[:3]]
    search = Search(max_new_tokens=8)
    together = backend.generate(prompts, search)
    alone = [backend.generate([prompt], search)[0] for prompt in prompts]
    assert [found.token_ids for found in together] == [found.token_ids for found in alone]
    if others:
        with pytest.raises(UserError, match="give num_beams 1 and num_return_sequences 1"):
            backend.generate(prompts, Search(num_beams=2, max_new_tokens=8))
    assert [found.log_prob for found in together] == pytest.approx([found.log_prob for found in alone], abs=1e-3)


def test_prompts_on_both_sides_of_a_longrope_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture):
    """The longest text of a batch says which angles all have; no short trial shows it."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    wild("phi3", vocab_size=420, rope_parameters=rope, original_max_position_embeddings=16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    backend = HuggingFaceBackend()
    hf._say_slow.cache_clear()
    backend.load(tmp_path, "cpu", "float32")
    assert backend.why_generate
    said = "phi3: decoded by transformers' `generate`, which is slower than our loops, for it prepares the inputs"
    assert said in capsys.readouterr().err
    prompts = [list(range(5, 5 + length)) for length in (4, 30, 6, 14)]
    for search in (Search(max_new_tokens=6), Search(max_new_tokens=6, num_beams=2)):
        together = backend.generate(prompts, search)
        for prompt, found in zip(prompts, together, strict=True):
            (alone,) = backend.generate([prompt], search)
            assert found.token_ids == alone.token_ids
            assert found.log_prob == pytest.approx(alone.log_prob, abs=1e-3)
