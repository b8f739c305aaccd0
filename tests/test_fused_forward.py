"""The fused head inside models' forwards: against their own logits, and what it relies on in transformers and TRL."""

from __future__ import annotations

import copy
import inspect
import re
import socket
import subprocess
import sys
import types
from pathlib import Path

import peft
import pytest
import torch
import transformers
import trl.trainer.utils as trl_utils
from transformers import AutoConfig, AutoModelForCausalLM

import fused_on_two
from convexlm import ConvexConfig, ConvexTrainer, fused_forward
from convexlm.collator import ROW, WEIGHT
from convexlm.fused_forward import HeadCall, add_fused_objective
from convexlm.objectives import get_objective, merge_statistics
from trainer_helpers import assert_same_weights, logged, make, trained
from training_helpers import STATISTICS, environment, rows, tiny_model

CONVEX = get_objective("convex", k=0.5)
SMALL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 4.0},
    "phi": {},  # its head has a bias
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "olmo2": {},
    "mixtral": {"output_router_logits": True, **EXPERTS},
    "granitemoe": {"output_router_logits": True, **LOCAL},
    "phimoe": {"output_router_logits": True, **LOCAL},
    "qwen3_moe": {"output_router_logits": True, "decoder_sparse_step": 1, **EXPERTS},
}


def family(name):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SMALL, **FAMILIES[name]})
    return AutoModelForCausalLM.from_config(config).eval()  # some have dropout


def batch(size=3, length=12, vocabulary=48):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, vocabulary, (size, length), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[0, 9:] = -100
    attention = torch.ones_like(ids)
    attention[0, 9:] = 0
    return {"input_ids": ids, "attention_mask": attention}, labels


def from_logits(logits, labels, objective=CONVEX, **kwargs):
    mask = labels[:, 1:] != -100
    log_probs = logits[:, :-1].double().log_softmax(-1)
    return objective(log_probs.gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1), mask, **kwargs)


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got, wanted, tolerance=1e-4):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= tolerance * value.norm() + 1e-7, name


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_loss_and_gradients_are_those_of_its_own_logits(name):
    model = family(name)
    inputs, labels = batch()
    own = model(**inputs)
    wanted = from_logits(own.logits, labels)
    experts = "output_router_logits" in FAMILIES[name]
    total = wanted.loss + (own.aux_loss if experts else 0)
    wanted_gradients = gradients(total, model)
    add_fused_objective(model)
    out = model(**inputs, labels=labels, fused_objective=HeadCall(CONVEX))
    torch.testing.assert_close(out.loss, wanted.loss.float(), rtol=2e-5, atol=1e-6, msg=f"{name}: loss {out.loss}")
    assert (out.aux_loss is not None) == experts
    assert_same(gradients(out.loss + (out.aux_loss if experts else 0), model), wanted_gradients)
    assert torch.equal(model(**inputs).logits, own.logits)


def test_trl_reads_no_config_name_that_is_unknown_here():
    source = inspect.getsource(trl_utils.add_fused_lm_head)
    names = set(re.findall(r'getattr\(text_config, "(\w+)"', source)) - {
        "output_router_logits",
        "router_aux_loss_coef",
    }
    known = {*fused_forward.FACTOR_NAMES, fused_forward.DIVISOR_NAME, fused_forward.SOFTCAP_NAME}
    assert names == known, (
        f"TRL's fused head reads {sorted(names)} from a model's config to form its logits, and convexlm.fused_forward "
        f"reads {sorted(known)}: bring the two together"
    )
    types = set(re.findall(r'model_type == "(\w+)"', source)) - {"gpt_oss"}
    assert types == {fused_forward.DIVISOR_IS_FACTOR}, f"TRL now treats {types} apart from other model types"
    for needed in ("base_model", "get_output_embeddings", "last_hidden_state", "load_balancing_loss_func"):
        assert needed in source, f"TRL's fused head no longer uses `{needed}`; see whether convexlm.fused_forward may"


def test_transformers_still_has_what_is_relied_on():
    model = tiny_model()
    assert isinstance(transformers.PreTrainedModel.base_model, property), "`base_model` is no property any more"
    assert model.base_model is model.model, "`base_model` is not the backbone any more"
    assert model.get_output_embeddings() is model.lm_head, "`get_output_embeddings()` is not the head any more"
    states = model.model(input_ids=torch.tensor([[1, 5, 6]])).last_hidden_state
    torch.testing.assert_close(model.lm_head(states), model(input_ids=torch.tensor([[1, 5, 6]])).logits)
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    names = list(inspect.signature(load_balancing_loss_func).parameters)
    assert names[:4] == ["gate_logits", "num_experts", "top_k", "attention_mask"], f"aux loss now takes {names}"


def test_experts_that_cannot_be_counted_are_refused(tmp_path, monkeypatch):
    model = family("qwen3_moe")
    odd = types.SimpleNamespace(model_type="odd", num_experts_per_tok=2)
    monkeypatch.setattr("convexlm.trainer.experts_of", lambda _: fused_forward.experts_of(odd))
    with pytest.raises(ValueError, match="router_aux_loss_coef=0.0"):
        make(tmp_path, rows(4), model=model)
    make(tmp_path, rows(4), model=model, router_aux_loss_coef=0.0)


def test_a_family_of_experts_without_any_is_told_so(tmp_path):
    """As Doge, whose experts are off by default and whose coefficient is not."""
    dense = lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model("doge", **SMALL))  # noqa: E731
    with pytest.raises(ValueError, match=r"\(doge\) gives no router logits, .*`router_aux_loss_coef=0.0`"):
        make(tmp_path, rows(4), model=dense())
    run = trained(tmp_path, rows(4), model=dense(), max_steps=1, objective="mle", router_aux_loss_coef=0.0)
    torch.testing.assert_close(logged(run, "loss"), logged(run, "nll"), rtol=1e-6, atol=0)


def test_models_without_a_linear_head_are_refused():
    with pytest.raises(ValueError, match="no linear output layer"):
        add_fused_objective(tiny_model().model)
    model = tiny_model()
    add_fused_objective(model)
    with pytest.raises(ValueError, match="needs `labels`"):
        model(input_ids=torch.tensor([[1, 2]]), fused_objective=HeadCall(CONVEX))


def test_packed_rows_and_record_weights():
    model = tiny_model()
    inputs, labels = batch(vocabulary=44)
    ids = torch.tensor([0] * 6 + [1] * 6).expand(3, 12)
    weights = torch.tensor([0.5] * 6 + [2.0] * 6).expand(3, 12)
    for objective in (CONVEX, get_objective("convex", length_weighting="sequence"), get_objective("dft")):
        shifted = {"sequence_ids": ids[:, 1:], "sample_weights": weights[:, 1:]}
        wanted = from_logits(model(**inputs).logits, labels, objective, normalizer=99.0, **shifted)
        wanted_gradients = gradients(wanted.loss, model)
        patched = tiny_model()
        add_fused_objective(patched)
        for chunk_tokens, recompute in ((None, False), (2, False), (None, True)):
            call = HeadCall(objective, 99.0, ids, weights, recompute=recompute, chunk_tokens=chunk_tokens)
            out = patched(**inputs, labels=labels, fused_objective=call)
            torch.testing.assert_close(out.loss, wanted.loss.float(), rtol=1e-5, atol=1e-7)
            assert_same(gradients(out.loss, patched), wanted_gradients)
            for name, value in wanted.statistics().items():
                torch.testing.assert_close(out.statistics[name], value.detach(), rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_and_compilation():
    inputs, labels = batch(vocabulary=44)
    results = []
    for change in ("none", "checkpointing", "compiled"):
        model = tiny_model().train()
        add_fused_objective(model)
        if change == "checkpointing":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        called = torch.compile(model, backend="eager") if change == "compiled" else model
        out = called(**inputs, labels=labels, fused_objective=HeadCall(CONVEX))
        results.append((out.loss.detach(), gradients(out.loss, model)))
    for loss, grads in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        assert_same(grads, results[0][1])
    torch._dynamo.reset()


def with_adapter(config):
    model = tiny_model()
    add_fused_objective(model)
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


@pytest.mark.parametrize("train_head", [False, True])
def test_lora(train_head):
    model = with_adapter(
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"] if train_head else None)
    )
    inputs, labels = batch(vocabulary=44)
    wanted = gradients(from_logits(model(**inputs).logits, labels).loss, model)
    got = gradients(model(**inputs, labels=labels, fused_objective=HeadCall(CONVEX)).loss, model)
    assert_same(got, wanted)
    assert any("lm_head" in name for name in got) == train_head


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_prompt_learning_aligns_the_batch_at_its_end(kind):
    config = {
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    }[kind]
    model = with_adapter(config)
    inputs, labels = batch(vocabulary=44)
    labels[1] = inputs["input_ids"][1]  # its first token too, which counts nowhere
    weights = torch.tensor([[1.0], [0.5], [3.0]]).expand(3, 12)
    logits = model(**inputs).logits[:, -12:]
    wanted = from_logits(logits, labels, sample_weights=weights[:, 0])
    wanted_gradients = gradients(wanted.loss, model)
    call = HeadCall(CONVEX, sample_weights=weights)
    out = model(**inputs, labels=labels, fused_objective=call)
    torch.testing.assert_close(out.loss, wanted.loss.float(), rtol=1e-5, atol=0)
    assert_same(gradients(out.loss, model), wanted_gradients)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("also", [[], ["q_proj"]], ids=str)
def test_lora_on_the_head(also, bf16):
    model = with_adapter(peft.LoraConfig(r=4, lora_alpha=12, target_modules=["lm_head", *also]))
    inputs, labels = batch(vocabulary=44)
    call = {"labels": labels, "fused_objective": HeadCall(CONVEX)}
    wanted = gradients(from_logits(model(**inputs).logits, labels).loss, model)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(**inputs, **call)
    got = gradients(out.loss, model)
    assert_same(got, wanted, tolerance=4e-2 if bf16 else 1e-4)
    assert any("lm_head.lora_A" in name for name in got) and any("lm_head.lora_B" in name for name in got)
    with torch.no_grad():
        with model.disable_adapter():
            without = model(**inputs, **call).loss
            torch.testing.assert_close(without, from_logits(model(**inputs).logits, labels).loss.float())
        assert abs(without - out.loss) > 1e-3
        model.merge_adapter()
        merged = model(**inputs, **call).loss
        torch.testing.assert_close(merged, out.loss.detach(), rtol=1e-2 if bf16 else 1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:`lora_bias")
@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_other_adapters_on_the_head_are_refused(settings):
    model = with_adapter(peft.LoraConfig(r=4, target_modules=["lm_head"], **settings))
    inputs, labels = batch(vocabulary=44)
    with pytest.raises(ValueError, match="adapter on the output layer"):
        model(**inputs, labels=labels, fused_objective=HeadCall(CONVEX))


def test_generation_and_saving_are_what_they_were(tmp_path):
    plain, patched = tiny_model().eval(), tiny_model().eval()
    add_fused_objective(patched)
    inputs, labels = batch(vocabulary=44)
    patched(**inputs, labels=labels, fused_objective=HeadCall(CONVEX)).loss.backward()
    assert "forward" not in patched.lm_head.__dict__
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(plain.generate(**inputs, **options), patched.generate(**inputs, **options))
    patched.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, plain(**inputs).logits)
    with pytest.raises(ValueError, match="not_an_argument"):
        patched.generate(**inputs, not_an_argument=1, **options)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_deep_copy_of_a_trained_model_has_weights_of_its_own(tmp_path, adapter):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    trainer = make(tmp_path, rows(4), given={"peft_config": config} if adapter else None)
    kept = copy.deepcopy(trainer.model)
    inputs, labels = batch(vocabulary=44)
    wanted = kept(**inputs).logits
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
    assert torch.equal(kept(**inputs).logits, wanted) and wanted.abs().max() > 0.1
    own = kept(**inputs, labels=labels, fused_objective=HeadCall(CONVEX)).loss
    torch.testing.assert_close(own, from_logits(wanted, labels).loss.float())


def test_the_head_is_as_before_after_an_error():
    model = tiny_model()
    add_fused_objective(model)
    inputs, labels = batch(vocabulary=44)
    with pytest.raises(ValueError, match="normalizer"):
        model(**inputs, labels=labels, fused_objective=HeadCall(CONVEX, normalizer=-1.0))
    assert "forward" not in model.lm_head.__dict__
    assert model(**inputs).logits.shape == (3, 12, 44)


class FullPath(ConvexTrainer):
    """The trainer with TRL's head for the log-probabilities, and the objective of them."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        weights, _ = inputs.pop(WEIGHT, None), inputs.pop(ROW, None)
        out = model(**inputs, use_cache=False, fused_lm_head=True)
        mask, ids = out.label_mask, inputs.get("seq_idx")
        if ids is None:
            ids = torch.zeros_like(inputs["labels"])
        weights = None if weights is None else weights[:, 1:]
        scored = self.objective(out.log_probs, mask, ids[:, 1:], num_items_in_batch, weights)
        counts = mask.double() if weights is None else weights * mask
        statistics = scored.statistics()
        statistics["correct"] = (out.is_top1 * counts).sum().double()
        statistics["entropy_sum"] = (out.entropy.detach() * counts).sum().double()
        kept = self._statistics["train"]
        self._statistics["train"] = statistics if kept is None else merge_statistics(kept, statistics)
        return scored.loss


@pytest.mark.parametrize(
    "head", [{}, {"head": "recompute"}, {"head_chunk_tokens": 11}, {"head_chunk_tokens": 2}], ids=str
)
@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "convex"},
        {"objective": "convex", "length_weighting": "sequence", "packing": True},
        {"objective": "power", "padding_free": True},
        {"objective": "dft", "bf16": True},
        {"objective": "mle", "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_the_trainer_goes_the_way_it_went_with_trls_head(tmp_path, settings, head):
    data = rows(21, weights=True)
    settings = {**settings, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    got = trained(tmp_path / "fused", data, **settings, **head)
    wanted = trained(tmp_path / "full", data, cls=FullPath, **settings)
    tolerance = 2e-2 if settings.get("bf16") else 1e-5
    for name in ("loss", "grad_norm", *STATISTICS[1:]):
        if name in ("token_accuracy", "weight_min") and settings.get("bf16"):
            continue  # a rounding decides
        torch.testing.assert_close(logged(got, name), logged(wanted, name), rtol=tolerance, atol=1e-7, msg=name)
    assert_same_weights(got, wanted, rtol=tolerance, atol=1e-2 * tolerance + 1e-6)


@pytest.mark.parametrize(
    ("options", "message"), [({"head": "full"}, "`head` is"), ({"head_chunk_tokens": 0}, "at least 1")]
)
def test_options_of_the_head_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ConvexConfig(output_dir=str(tmp_path), use_cpu=True, **options)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("on-two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    script = Path(fused_on_two.__file__)
    settings = {**environment(), "PYTHONPATH": str(script.parent)}
    done = subprocess.run(
        [*command, str(script), str(folder)], env=settings, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("form", fused_on_two.FORMS)
def test_two_processes_give_the_gradients_of_one(form, on_two):
    model = tiny_model()
    add_fused_objective(model)
    fused_on_two.gradients(model, *fused_on_two.batch(), scale=1.0)
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = torch.load(on_two / f"{form}.pt")
    # However many chunks the batch has. The backward pass has the head's gradient already; FSDP gathers what it freed.
    assert tuple(found.pop("gathers").tolist()) == fused_on_two.FORMS[form]
    assert_same(found, wanted)
