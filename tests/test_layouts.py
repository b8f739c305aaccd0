"""Padding on either side, padding-free and packed batches are the same sum over records, or are refused."""

from __future__ import annotations

import importlib.util
import logging

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from convexlm.collator import ConvexCollator, keeps_packed_rows
from convexlm.record_separation import separates_in_its_source, separates_records
from test_fused_forward import FAMILIES, family
from trainer_helpers import make, one_step
from training_helpers import STATISTICS, WORDS, rows, tiny_model


@pytest.mark.parametrize("length_weighting", ["token", "sequence"])
def test_records_whose_first_token_is_labelled_give_the_same_step_in_every_layout(tmp_path, length_weighting):
    """As text, or whole chats, or with `completion_only_loss=False`: nothing predicts a record's first token."""
    data = [{**row, "labels": row["input_ids"]} for row in rows(8, weights=True)]
    settings = {"objective": "convex", "length_weighting": length_weighting, "per_device_train_batch_size": 8}
    wanted, logs = one_step(tmp_path, data, **settings)
    assert logs["num_target_tokens"] == sum(len(row["labels"]) - 1 for row in data if row["weight"])
    for layout in ({"padding_side": "left"}, {"packing": True}, {"padding_free": True}):
        gradients, got = one_step(tmp_path, data, **settings, **layout)
        for name in (*STATISTICS, "num_target_tokens"):
            torch.testing.assert_close(got[name], logs[name], rtol=1e-5, atol=1e-7, msg=f"{layout}: {name}")
        for name, value in wanted.items():
            torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-6, msg=f"{layout}: {name}")


@pytest.mark.parametrize("length_weighting", ["token", "sequence"])
def test_a_collator_of_ones_own_may_flatten_and_say_by_positions_alone_where_a_record_begins(
    tmp_path, length_weighting
):
    settings = {"length_weighting": length_weighting, "gradient_accumulation_steps": 2}
    wanted, wanted_log = one_step(tmp_path, rows(8), **settings)
    got, log = one_step(tmp_path, rows(8), given={"data_collator": DataCollatorWithFlattening()}, **settings)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-7)
    for name in STATISTICS:
        assert log[name] == pytest.approx(wanted_log[name], rel=1e-5), name


# -- models whose attention lets records see each other ---------------------------------------------------------------

SHAPE = {"vocab_size": WORDS, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DEEP = {"num_hidden_layers": 2, "num_attention_heads": 4}
MIXING = {
    "opt": {"ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": 32, **DEEP},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_oss": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4,
                "num_experts_per_tok": 2, "max_position_embeddings": 128, **DEEP},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "biogpt": {"intermediate_size": 48, **DEEP},
}  # fmt: skip
if Version(transformers.__version__) < Version("5.24"):  # which gives its mask the positions
    MIXING["falcon"] = DEEP


def mixing(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SHAPE, **MIXING[name]}))


def collators(model):
    keeps = keeps_packed_rows(model.config)
    return [ConvexCollator(0, padding_free=True), *([ConvexCollator(0, packed_rows=True)] if keeps else [])]


@pytest.mark.parametrize("name", MIXING)
def test_families_that_let_records_see_each_other_are_found_out(name):
    model = mixing(name)
    assert not any(separates_records(model, collator) for collator in collators(model))
    assert not separates_in_its_source(model)
    assert not separates_records(model.to(torch.bfloat16), ConvexCollator(0, padding_free=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_keep_records_apart_are_not(name):
    model = family(name)
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    for kind in {model.config._attn_implementation, "eager"}:
        model.set_attn_implementation(kind)
        for collator in collators(model):
            assert separates_records(model, collator) and separates_records(model, collator, autocast), kind
    assert separates_in_its_source(model)


@pytest.mark.parametrize(
    "layout", [{"packing": True}, {"padding_free": True}, {"packing": True, "padding_free": True}]
)
def test_the_trainer_refuses_such_a_model_in_one_line(tmp_path, layout):
    with pytest.raises(ValueError, match=r"attention \(opt, sdpa\) does not separate packed records") as caught:
        make(tmp_path, rows(8), model=mixing("opt"), **layout)
    assert "\n" not in str(caught.value)
    assert all(f"`{name}=False`" in str(caught.value) for name in layout)
    make(tmp_path, rows(8), model=mixing("opt"))


@pytest.mark.skipif(importlib.util.find_spec("causal_conv1d") is not None, reason="its package is installed")
@pytest.mark.parametrize("layout", [{"packing": True}, {"padding_free": True}])
def test_a_package_that_such_layers_need_is_named(tmp_path, layout):
    """transformers says so at the first step; reading the model's source would take it for one that keeps apart."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    linear = {f"linear_{name}": 2 if name.startswith("num") else 8 for name in
              ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")}  # fmt: skip
    config = Qwen3NextConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, shared_expert_intermediate_size=16, pad_token_id=0,
        layer_types=["linear_attention", "full_attention"], **experts, **linear,
    )  # fmt: skip
    with pytest.raises(ValueError, match="causal_conv1d.*; or use `") as caught:
        make(tmp_path, rows(8), model=Qwen3NextForCausalLM(config), **layout)
    assert "\n" not in str(caught.value)


def test_looking_at_a_model_leaves_it_and_random_numbers_as_they_were(tmp_path):
    model = tiny_model(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    before = {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert separates_records(model, ConvexCollator(0, padding_free=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(("name", "refused"), [("opt", True), ("llama", False)])
def test_weights_that_are_not_there_are_told_by_the_source(tmp_path, caplog, monkeypatch, name, refused):
    monkeypatch.setattr("convexlm.record_separation.is_whole", lambda *_: False)
    model = mixing("opt") if refused else tiny_model()
    with caplog.at_level(logging.WARNING, logger="convexlm"):
        if refused:
            with pytest.raises(ValueError, match="does not separate"):
                make(tmp_path, rows(8), model=model, packing=True)
        else:
            make(tmp_path, rows(8), model=model, packing=True)
    assert "was read from its source" in caplog.text


# -- virtual tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig, peft.PromptEncoderConfig])
def test_virtual_tokens_go_with_padding_on_the_right_only(tmp_path, kind):
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    for layout, mended in (
        ({"packing": True}, "packing=False"),
        ({"padding_free": True}, "padding_free=False"),
        ({"padding_side": "left"}, "padding_side='right'"),
    ):
        with pytest.raises(ValueError, match=mended) as caught:
            make(tmp_path, rows(8), given={"peft_config": config}, **layout)
        assert "\n" not in str(caught.value)
    make(tmp_path, rows(8), given={"peft_config": config})
