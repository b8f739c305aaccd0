"""Models that are no causal language models are refused before they see their own targets."""

from __future__ import annotations

import types

import pytest
import torch
import transformers

from convexlm.causality import looks_ahead, refuse_looking_ahead
from test_fused_forward import family
from trainer_helpers import make
from training_helpers import rows, tiny_config, tiny_model

TOKENS = {"vocab_size": 44, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def encoder(**settings):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    return transformers.BertGenerationDecoder(transformers.BertGenerationConfig(**sizes, **TOKENS, **settings))


def encoder_decoder():
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in
             (("layers", 1), ("attention_heads", 4), ("ffn_dim", 32))}  # fmt: skip
    config = transformers.BartConfig(d_model=32, max_position_embeddings=64, **sizes, **TOKENS)
    return transformers.BartForConditionalGeneration(config)


OTHERS = {
    "encoder-decoder": (encoder_decoder, "BartForConditionalGeneration is an encoder-decoder, which is not supported"),
    "encoder": (encoder, r"\(bert-generation, BertGenerationDecoder\) is not causal: .*`is_decoder=True`"),
    "xlnet": (
        lambda: transformers.XLNetLMHeadModel(
            transformers.XLNetConfig(d_model=32, n_layer=1, n_head=4, d_inner=32, **TOKENS)
        ),
        "XLNetLMHeadModel\\) is not causal",
    ),
    "classifier": (
        lambda: transformers.LlamaForSequenceClassification(tiny_config()),
        "LlamaForSequenceClassification generates no text; give a causal language model",
    ),
    "backbone": (lambda: transformers.LlamaModel(tiny_config()), "LlamaModel generates no text"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_it_is_refused_in_one_line(tmp_path, kind):
    build, reason = OTHERS[kind]
    with pytest.raises(ValueError, match=reason) as caught:
        make(tmp_path, rows(4), model=build())
    assert "\n" not in str(caught.value)


def test_by_its_name_too(tmp_path):
    encoder_decoder().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        make(tmp_path / "out", rows(4), model=str(tmp_path / "model"))


def test_an_encoder_that_is_made_a_decoder_is_taken(tmp_path):
    make(tmp_path, rows(4), model=encoder(is_decoder=True))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_families_do_not_look_ahead(name, dtype):
    model = family(name).to(dtype)
    modes = [module.training for module in model.train().modules()]
    assert not looks_ahead(model)
    assert [module.training for module in model.modules()] == modes


def test_a_model_that_fails_on_the_rows_is_said(caplog):
    model = tiny_model()
    model.base_model.forward = lambda **_: 1 / 0
    accelerator = types.SimpleNamespace(autocast=torch.no_grad)
    refuse_looking_ahead(types.SimpleNamespace(is_fsdp_enabled=False, accelerator=accelerator), model)
    assert "could not run LlamaForCausalLM on two short rows to see that it is causal" in caplog.text
