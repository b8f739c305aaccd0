"""Checkpoints that others made: adapters that lack weights or add tokens, ids that a model has no embedding for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    CartridgeConfig,
    LoraConfig,
    PeftModel,
    PolyConfig,
    PromptLearningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, XLNetConfig, XLNetLMHeadModel

from convexlm.decoding import checkpoint as checkpoint_module
from convexlm.decoding import decode_jobs, loading
from convexlm.decoding.checkpoint import check_checkpoint, is_adapter
from convexlm.errors import UserError
from convexlm.tokenization import PromptSettings, decode_text
from decoding_helpers import SOURCES, make_checkpoint, make_job, make_tokenizer, prompt_ids, read

if TYPE_CHECKING:
    from pathlib import Path

FEW = SOURCES[:4]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("loading") / "checkpoint-0", steps=0)


def answers(folder: Path, **options: Any) -> list[str]:
    settings = {"max_new_tokens": 8, **options}
    job = make_job(folder / f"out-{len(list(folder.glob('out-*')))}.jsonl", FEW, **settings)
    decode_jobs(folder, [job], device="cpu")
    return [row["hypothesis"] for row in read(job.output_file)]


def by_generate(model: Any, folder: Path) -> list[str]:
    tokenizer = make_tokenizer()
    found = []
    for ids in prompt_ids(folder, make_job(folder / "x.jsonl", FEW)):
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 2, "pad_token_id": 3}
        output = model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)
        found.append(decode_text(tokenizer, output[0, len(ids) :].tolist()))
    return found


def make_adapter(base: Path, folder: Path, tokens: int | None = None, **options: Any) -> Any:
    """An adapter whose answers are its own; the model that it was saved from."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    if tokens:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    settings = {"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(**settings | options, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model.eval()


def test_an_adapter_whose_file_lacks_weights_is_refused(checkpoint: Path, tmp_path: Path):
    """PEFT only warns of it, and what answers then is the base model, or half of the adapter."""
    make_adapter(checkpoint, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    half = {name: weight for name, weight in weights.items() if "layers.1." not in name}
    other = {name.replace(".model.layers", ".layers"): weight for name, weight in weights.items()}
    for lacking, count in ((half, 4), (other, 8)):
        save_file(lacking, tmp_path / "adapter_model.safetensors")
        with pytest.raises(UserError, match=rf"lacks {count} of its weights, such as .*layers\.1\..*lora_B\.weight"):
            answers(tmp_path)


def test_weights_of_layers_that_a_model_does_not_have_are_told(checkpoint: Path, tmp_path: Path):
    """transformers and PEFT leave them out: what answers then is another model."""
    shallow = tmp_path / "shallow"
    shutil.copytree(checkpoint, shallow)
    config = json.loads((shallow / "config.json").read_text())
    (shallow / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"9 are of layers that it does not have, such as model\.layers\.1\."):
        answers(shallow)
    weights = load_file(checkpoint / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1." not in name}
    kept["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # which older versions saved
    save_file(kept, shallow / "model.safetensors", metadata={"format": "pt"})
    assert answers(shallow)
    make_adapter(checkpoint, tmp_path / "adapter")
    named = tmp_path / "adapter" / "adapter_config.json"
    named.write_text(json.dumps({**json.loads(named.read_text()), "base_model_name_or_path": str(shallow)}))
    with pytest.raises(UserError, match=r"no place for 4 of its weights, such as .*layers\.1\..*lora_A\.weight"):
        answers(tmp_path / "adapter")


@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["embed_tokens", "lm_head"]}],
    ids=str,
)
def test_an_adapter_with_tokens_added_brings_their_embeddings(checkpoint: Path, tmp_path: Path, options: dict):
    model = make_adapter(checkpoint, tmp_path, tokens=430, **options)
    assert answers(tmp_path) == by_generate(model, tmp_path)


def test_what_does_not_fit_an_adapters_base_is_named(checkpoint: Path, tmp_path: Path):
    make_adapter(checkpoint, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name: torch.ones(3, 3) for name in weights}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="cannot be put on its base model .*size mismatch for base_model.*lora_A"):
        answers(tmp_path)


def test_which_of_a_model_and_an_adapter_a_folder_holds(checkpoint: Path, tmp_path: Path):
    """Its base model's config may lie beside an adapter; a whole model beside it would get it on top."""
    plain, mixed, second = tmp_path / "plain", tmp_path / "mixed", tmp_path / "second"
    model = make_adapter(checkpoint, plain)
    shutil.copytree(plain, mixed)
    shutil.copy(checkpoint / "config.json", mixed)
    assert is_adapter(mixed)
    assert answers(mixed) == answers(plain) == by_generate(model, plain)
    shutil.copy(checkpoint / "model.safetensors", mixed)
    with pytest.raises(UserError, match="a whole model and an adapter"):
        check_checkpoint(mixed)
    shutil.copytree(plain, second)
    config = json.loads((plain / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(plain)}))
    with pytest.raises(UserError, match="is an adapter, too"):
        answers(second)


def test_tokens_without_an_embedding_neither_pad_nor_end(checkpoint: Path, tmp_path: Path):
    """A [PAD] that only the tokenizer was given, -1 for none, and an EOS of a larger vocabulary."""
    expected = answers(shutil.copytree(checkpoint, tmp_path / "plain"), min_new_tokens=3)
    folder = shutil.copytree(checkpoint, tmp_path / "odd")
    tokenizer = make_tokenizer(pad=False)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 420
    tokenizer.save_pretrained(folder)
    for eos in ([2, 5000], -1):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert answers(folder, min_new_tokens=3) == expected


def test_a_prompt_with_a_token_without_an_embedding_is_one_line(checkpoint: Path, tmp_path: Path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["cat"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"sentence 2 has the token 420 \(`cat`\), and the model has .* of 420 only"):
        answers(folder)


def test_a_generation_config_that_cannot_be_read_is_refused(checkpoint: Path, tmp_path: Path):
    """transformers would go on without it, and without the EOS that only it names."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    for text, message in (
        ('{"eos_token_id": [2', "generation config cannot be read"),
        ('{"eos_token_id": "</s>"}', "no num"),
    ):
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            answers(folder)


@pytest.mark.parametrize(
    ("source", "template", "message"),
    [("\ud83d alone", "alpaca", "a lone surrogate"), ("", "chat", "refuses the messages: say something")],
)
def test_a_prompt_that_a_tokenizer_does_not_take_is_named(
    checkpoint: Path, tmp_path: Path, source: str, template: str, message: str
):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    tokenizer = make_tokenizer()
    refuse = "{% if not messages[0]['content'] %}{{ raise_exception('say something') }}{% endif %}"
    tokenizer.chat_template = refuse + "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    job = replace(make_job(tmp_path / "out.jsonl", ["house", source]), instruction="")
    with pytest.raises(UserError, match=f"^tiny en-de greedy: the prompt of sentence 1.*{message}"):
        decode_jobs(folder, [replace(job, settings=PromptSettings(template))], device="cpu")


def cartridge(base: Path, folder: Path) -> Any:
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), CartridgeConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    )
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model.eval()


def test_every_kind_of_virtual_tokens_is_refused_and_no_other():
    kinds = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    wanted = {kind for kind, config in kinds.items() if issubclass(config, PromptLearningConfig)} | {"CPT"}
    assert "CARTRIDGE" in wanted
    assert {kind for kind in [*kinds, "NONESUCH"] if checkpoint_module._has_virtual_tokens(kind)} == wanted


def test_a_kind_of_virtual_tokens_that_is_not_listed_is_known_from_peft(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint_module, "_VIRTUAL_TOKENS", ())
    assert checkpoint_module._has_virtual_tokens("CARTRIDGE")
    assert not checkpoint_module._has_virtual_tokens("LILY")


def test_adapters_whose_base_model_alone_would_answer_are_refused(checkpoint: Path, tmp_path: Path):
    cartridge(checkpoint, tmp_path / "cartridge")
    with pytest.raises(UserError, match=r"CARTRIDGE \(virtual tokens\) cannot be used here"):
        answers(tmp_path / "cartridge")
    make_adapter(checkpoint, tmp_path / "activated", alora_invocation_tokens=[40, 41])
    with pytest.raises(UserError, match=r"an activated LoRA .*cannot be merged.*run it with PEFT, or train a plain"):
        answers(tmp_path / "activated")


def test_an_adapter_that_works_outside_of_the_layers_is_found_by_trying(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whatever its kind is called: the base model alone gives other logits than PEFT's."""
    cartridge(checkpoint, tmp_path / "cartridge")
    monkeypatch.setattr(checkpoint_module, "_has_virtual_tokens", lambda kind: False)
    with pytest.raises(UserError, match="cannot be put on its base model .*kind CARTRIDGE works outside of the model"):
        answers(tmp_path / "cartridge")


def test_an_adapter_whose_layers_need_more_than_a_text_is_refused(checkpoint: Path, tmp_path: Path):
    """Poly's want to be told the task, which nobody does here."""
    config = PolyConfig(target_modules=["q_proj"], n_tasks=3, n_skills=2, r=2, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be put on its base model .*task_ids should not be None"):
        answers(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trying_an_adapter_leaves_the_model_and_the_random_state(checkpoint: Path, tmp_path: Path, dtype: Any):
    made = make_adapter(checkpoint, tmp_path / "adapter", lora_dropout=0.5)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "adapter")
    torch.set_rng_state(state)
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    loading._all_in_layers(whole)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())
    loaded, ids = loading.load_model(tmp_path / "adapter", "cpu", dtype), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        found, wanted = loaded(ids).logits.float(), made.to(dtype)(ids).logits.float()
    assert torch.allclose(found, wanted, atol=1e-4 if dtype == torch.float32 else 0.1)


def test_a_config_that_writes_no_limit_as_minus_one(tmp_path: Path):
    """XLNet has no limit of positions, and says -1."""
    torch.manual_seed(0)
    shape = {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32}
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=420, **shape, bos_token_id=1, eos_token_id=2, pad_token_id=3))
    assert model.config.max_position_embeddings == -1
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert len(answers(tmp_path, max_new_tokens=2)) == len(FEW)
