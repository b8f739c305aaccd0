"""Models whose own logits are not what the fused head takes for them are told before the first step."""

from __future__ import annotations

import logging

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from convexlm.fused_forward import HeadCall, add_fused_objective
from convexlm.head_agreement import beside_the_head, difference
from convexlm.objectives import get_objective
from test_fused_forward import (
    CONVEX,
    FAMILIES,
    SMALL,
    assert_same,
    batch,
    family,
    from_logits,
    gradients,
    with_adapter,
)
from trainer_helpers import make
from training_helpers import WORDS, rows, tiny_model

# Families between whose states and logits stands more than a factor and a cap.
OTHERS = {
    "modernbert-decoder": {"cls_token_id": 1, "sep_token_id": 2},
    "bert": {"is_decoder": True},
    "roberta": {"is_decoder": True},
    "electra": {"is_decoder": True, "embedding_size": 16},
}
# Families with names of their own for what they do to logits.
NAMED = {
    "recurrent_gemma": {"logits_soft_cap": 2.0, "num_key_value_heads": 1, "lru_width": 32, "num_hidden_layers": 3},
    "xlstm": {"output_logit_soft_cap": 2.0, "num_blocks": 2, "num_heads": 4, "chunk_size": 16,
              **dict.fromkeys(set(SMALL) - {"vocab_size", "hidden_size", "num_hidden_layers"})},
}  # fmt: skip
BF16 = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731


def made(name, settings, vocabulary=48):
    torch.manual_seed(0)
    given = {key: value for key, value in {**SMALL, "vocab_size": vocabulary, **settings}.items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **given)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 0.5)
    return model


def patched(model):
    add_fused_objective(model)
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_a_family_with_other_logits_is_refused_in_one_line(tmp_path, name):
    model = made(name, OTHERS[name], WORDS)
    with pytest.raises(
        ValueError, match=rf"logits \({name}, \w+\).*take another model.*as_compute_loss_func"
    ) as caught:
        make(tmp_path, rows(4), model=model, objective="mle")
    assert "\n" not in str(caught.value)
    assert beside_the_head(model)


@pytest.mark.parametrize("name", OTHERS)
def test_it_is_refused_by_its_parameters_where_the_weights_are_not_there(tmp_path, monkeypatch, name):
    monkeypatch.setattr("convexlm.head_agreement.is_whole", lambda *_: False)
    with pytest.raises(ValueError, match="belongs to neither"):
        make(tmp_path, rows(4), model=made(name, OTHERS[name], WORDS))
    make(tmp_path, rows(4), model=tiny_model())


@pytest.mark.parametrize("name", NAMED)
def test_a_familys_own_names_are_known(name):
    model = made(name, NAMED[name])
    inputs, labels = batch()
    wanted = from_logits(model(**inputs, use_cache=False).logits, labels)
    wanted_gradients = gradients(wanted.loss, model)
    out = patched(model)(**inputs, labels=labels, fused_objective=HeadCall(CONVEX))
    torch.testing.assert_close(out.loss, wanted.loss.float(), rtol=2e-5, atol=1e-6)
    assert_same(gradients(out.loss, model), wanted_gradients)
    assert difference(model) is None


@pytest.mark.parametrize("tied", [False, True])
def test_a_divisor_and_rows_without_a_logit_as_inkling_has_them(tied):
    """Of a Llama whose head does what Inkling's does: the family itself is large at any setting."""
    model = tiny_model(tie_word_embeddings=tied)
    model.config.logits_mup_width_multiplier, model.config.unpadded_vocab_size = 3.0, 40
    plain = type(model.lm_head).forward
    model.lm_head.forward = lambda states: plain(model.lm_head, states / 3.0)[..., :40]
    inputs, labels = batch(vocabulary=40)
    wanted = from_logits(model(**inputs).logits, labels)
    wanted_gradients = gradients(wanted.loss, model)
    out = patched(model)(**inputs, labels=labels, fused_objective=HeadCall(CONVEX))
    torch.testing.assert_close(out.loss, wanted.loss.float(), rtol=2e-5, atol=1e-6)
    assert_same(gradients(out.loss, model), wanted_gradients)
    assert difference(model) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_agree_are_not_refused(name):
    model = patched(family(name))
    assert difference(model) is None and difference(model, BF16) is None
    assert difference(model.to(torch.bfloat16)) is None
    assert beside_the_head(model) is None


@pytest.mark.parametrize("large", [1.0, 30.0])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere"])
def test_large_logits_are_no_reason(name, large):
    model = patched(family(name))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(large)
    assert difference(model) is None and difference(model, BF16) is None
    assert difference(model.to(torch.bfloat16)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [{"final_logit_softcapping": None}, {"final_logit_softcapping": 4.0}], ids=str)
def test_a_cap_that_is_not_the_models_is_found_out(change, dtype):
    model = family("gemma2")
    own = model.config.final_logit_softcapping
    for key, value in change.items():
        setattr(model.config, key, value)
    add_fused_objective(model)
    model.config.final_logit_softcapping = own
    assert "differ" in difference(model.to(dtype))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "lora_dropout": 0.5},
    ],
    ids=str,
)
def test_adapters_are_no_reason(tmp_path, config):
    given = {"peft_config": peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **config)}
    base = make(tmp_path, rows(4), given=given).model.get_base_model()
    assert difference(base) is None and beside_the_head(base) is None


def test_an_adapter_on_the_head_is_no_reason_and_one_that_the_head_does_not_know_says_so():
    base = with_adapter(peft.LoraConfig(r=4, lora_dropout=0.5, target_modules=["lm_head"])).get_base_model()
    assert difference(base) is None and difference(base, BF16) is None and beside_the_head(base) is None
    base = with_adapter(peft.LoraConfig(r=4, use_dora=True, target_modules=["lm_head"])).get_base_model()
    with pytest.raises(ValueError, match="adapter on the output layer"):
        difference(base)


def test_looking_leaves_the_model_and_random_numbers_as_they_were():
    model = patched(tiny_model(attention_dropout=0.5).train())
    model.model.layers[0].eval()
    before = {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert difference(model) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(value, before[name]), name


def test_a_model_that_fails_on_the_row_is_asked_for_its_parameters(tmp_path, caplog):
    class Odd(type(tiny_model())):
        def forward(self, *args, **kwargs):
            raise ValueError("needs more than tokens")

    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, logger="convexlm"):
        make(tmp_path, rows(4), model=Odd(tiny_model().config))
    assert "could not run Odd on a short row" in caplog.text and "needs more than tokens" in caplog.text


def test_masked_and_broken_logits():
    """A token that the model masks is compared on the others; weights that give no number are the first step's."""
    model = patched(tiny_model())
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    assert difference(model) is None
    model = patched(tiny_model())
    plain = model.lm_head.forward
    masked = torch.zeros(WORDS)
    masked[4:20] = -torch.inf
    model.lm_head.forward = lambda states: plain(states) + masked
    assert "differ" in difference(model)


def test_the_fused_loss_of_a_family_with_other_logits_is_indeed_another():
    """What the refusal is for."""
    model = made("bert", OTHERS["bert"])
    inputs, labels = batch()
    own = from_logits(model(**inputs).logits, labels, get_objective("mle")).loss
    fused = patched(model)(**inputs, labels=labels, fused_objective=HeadCall(get_objective("mle"))).loss
    assert abs(own - fused) > 0.1
