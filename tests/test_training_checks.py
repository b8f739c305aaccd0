"""`convexlm train` says in one line, before the first step, what a training cannot be run with."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from convexlm.collator import check_weight
from convexlm.errors import UserError
from convexlm.instructions import load_records
from convexlm.metrics_file import read_metrics
from convexlm.training_checks import say_if_the_same
from training_helpers import WORDS, tiny_model, tiny_tokenizer, train, write_model_files, write_records


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_model_files(folder / "model")
    write_records(folder / "data.jsonl", 8)
    write_records(folder / "eval.jsonl", 6, seed=3)
    lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    (folder / "nothing.jsonl").write_text("".join(json.dumps({**line, "weight": 0}) + "\n" for line in lines))
    lines[3]["weight"] = 1e39
    (folder / "heavy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines[3] = {"prompt": "w1", "completion": " ".join(["w2"] * 40)}
    (folder / "long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copyfile(folder / "nothing.jsonl", folder / "evalnothing.jsonl")
    return folder


def run(files, folder, **options):
    given = {"config_name": "model", "tokenizer_name": "model", "dataset": "data.jsonl", "max_steps": 2,
             "save_steps": 2, "per_device_train_batch_size": 4, **options}  # fmt: skip
    return train(folder, **{key: value for key, value in given.items() if value is not None})


def refused(files, folder, capsys, **options):
    assert run(files, folder, **options) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "error:" in line]
    assert out == "" and not list(folder.glob("checkpoint-*"))
    return line


@pytest.fixture(autouse=True)
def here(files, monkeypatch):
    monkeypatch.chdir(files)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size must be at least 1, not 0"),
        ({"per_device_eval_batch_size": 0}, "--per_device_eval_batch_size must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps must be at least 1"),
        ({"pad_to_multiple_of": 0}, "--pad_to_multiple_of must be at least 1"),
        ({"eval_accumulation_steps": 0}, "--eval_accumulation_steps must be at least 1"),
        ({"dataloader_prefetch_factor": 0, "dataloader_num_workers": 1}, "--dataloader_prefetch_factor must be at"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers must not be negative, it is -1"),
        ({"dataloader_persistent_workers": True}, "--dataloader_persistent_workers needs workers"),
        ({"max_steps": 0}, "--max_steps 0 trains nothing"),
        ({"max_steps": -1, "num_train_epochs": 0}, "--num_train_epochs must be finite and above 0, not 0"),
        ({"max_steps": -1, "num_train_epochs": "nan"}, "--num_train_epochs must be finite"),
        ({"learning_rate": "nan"}, "--learning_rate must be finite"),
        ({"neftune_noise_alpha": -5}, "--neftune_noise_alpha must be finite and not negative"),
        ({"optim": "adamw_torch", "adam_beta1": 2}, "--optim adamw_torch with its settings: Invalid beta"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "--lr_scheduler_type cosine_with_min_lr with its"),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": '{"foo": 1}'}, "argument 'foo'"),
        ({"warmup_steps": 2}, "--warmup_steps: the schedule constant has no warmup; give constant_with_warmup"),
        ({"lr_scheduler_kwargs": '{"min_lr": 1}'}, "--lr_scheduler_kwargs: the schedule constant takes none"),
        ({"lr_scheduler_type": "linear", "warmup_steps": 1.5}, "--warmup_steps is a number of steps or, below 1,"),
        ({"gradient_checkpointing_kwargs": '{"foo": 1}'}, "no setting `foo`"),
        ({"accelerator_config": '{"split_batches": true}'}, "--accelerator_config with split_batches"),
        ({"activation_offloading": True}, "--activation_offloading moves"),
        ({"eval_dataset": "eval.jsonl"}, "--eval_dataset without --eval_strategy"),
        ({"eval_on_start": True}, "--eval_on_start needs --eval_dataset"),
        ({"metric_for_best_model": "bleu"}, "--metric_for_best_model bleu: not measured"),
        ({"metric_for_best_model": "nll"}, "--metric_for_best_model nll: not measured without --eval_dataset"),
        ({"dataset": "nothing.jsonl"}, "nothing.jsonl: every record has the weight 0"),
        (
            {"eval_dataset": "evalnothing.jsonl", "eval_strategy": "steps"},
            "evalnothing.jsonl: every record has the weight 0, so there is nothing to evaluate on",
        ),
        ({"dataset": "heavy.jsonl"}, "heavy.jsonl, line 4: `weight` must be at most 3.4"),
        ({"per_device_train_batch_size": 9, "dataloader_drop_last": True}, "8 records, packed or not, make no whole"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_with_is_told_at_the_start(files, tmp_path, capsys, options, said):
    assert said in refused(files, tmp_path / "run", capsys, **options)


@pytest.mark.parametrize(
    ("package", "options"),
    [
        ("tensorboard", {"report_to": "tensorboard"}),
        ("bitsandbytes", {"optim": "adamw_8bit"}),
        ("liger_kernel", {"use_liger_kernel": True}),
    ],
    ids=str,
)
def test_a_package_that_is_not_installed_is_named_before_the_model_is_loaded(
    files, tmp_path, capsys, monkeypatch, package, options
):
    if importlib.util.find_spec(package) is not None:
        pytest.skip("it is installed")
    monkeypatch.setattr("convexlm.training.model_to_train", lambda *_: pytest.fail("a model was loaded"))
    line = refused(files, tmp_path / "run", capsys, **options)
    assert f"--{next(iter(options))}" in line and "install" in line


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
@pytest.mark.parametrize(
    "schedule",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'},
        {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": '{"num_decay_steps": 1}',
            "warmup_steps": 1,
        },
    ],
    ids=str,
)
def test_what_can_be_trained_with_is(files, tmp_path, optim, schedule):
    assert run(files, tmp_path / "run", optim=optim, **schedule) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"report_to": "wandbb"}, "--report_to wandbb: transformers does not know it; there are azure_ml"),
        ({"use_peft": True, "lora_r": 0}, "--lora_r must be at least 1, not 0"),
        ({"use_peft": True, "lora_dropout": 1.0}, "--lora_dropout must be at least 0 and below 1, not 1.0"),
        ({"attn_implementation": "flex_attention"}, "flex_attention: torch has no backward pass of it on a CPU"),
    ],
    ids=str,
)
def test_what_no_data_are_needed_for_is_told_before_they_are_read(files, tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.setattr("convexlm.training_data.prepare_data", lambda *_, **__: pytest.fail("data were read"))
    assert said in refused(files, tmp_path / "run", capsys, **options)


def saved(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return {"config_name": None, "tokenizer_name": None, "model_name_or_path": folder}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"lora_target_modules": ["q_proj", "vproj"]},
            "--lora_target_modules: the model has no module `vproj`; did you",
        ),
        (
            {"lora_target_modules": "q_proj", "lora_modules_to_save": "lmhead"},
            "no module `lmhead`; did you mean lm_head",
        ),
        ({"lora_target_modules": "self_attn.q_proj", "lora_modules_to_save": "xyz"}, "no module `xyz`; it has "),
    ],
    ids=str,
)
def test_every_module_named_for_an_adapter_is_in_the_model(files, tmp_path, capsys, options, said):
    """PEFT trains those that it finds, and says nothing of the others."""
    tiny_model().save_pretrained(tmp_path / "base")
    adapter = {"config_name": None, "model_name_or_path": str(tmp_path / "base"), "use_peft": True, "lora_r": 2}
    assert said in refused(files, tmp_path / "run", capsys, **adapter, **options)
    assert not (tmp_path / "run").exists()


def test_adapters_on_modules_of_the_model_are_trained(files, tmp_path):
    names = {"lora_target_modules": ["self_attn.q_proj", "v_proj"], "lora_modules_to_save": "lm_head"}
    tiny_model().save_pretrained(tmp_path / "base")
    adapter = {"config_name": None, "model_name_or_path": str(tmp_path / "base"), "use_peft": True, "lora_r": 2}
    assert run(files, tmp_path / "run", **adapter, **names) == 0
    assert run(files, tmp_path / "all", **adapter, lora_target_modules="all-linear") == 0


def test_trl_selective_checkpointing_is_trained(files, tmp_path):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"selective": true}'}
    assert run(files, tmp_path / "run", **options) == 0


def test_a_tokenizer_larger_than_the_model_is_told_where_the_data_need_it(files, tmp_path, capsys):
    small = saved(tiny_model(vocab_size=20), tmp_path / "small")
    assert "the model has embeddings for 20 tokens" in refused(files, tmp_path / "run", capsys, **small)
    (tmp_path / "few.jsonl").write_text('{"prompt": "w1", "completion": "w2"}\n' * 8)
    assert run(files, tmp_path / "run", dataset=tmp_path / "few.jsonl", **small) == 0


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_records_longer_than_the_learned_positions_are_told(files, tmp_path, capsys, kind):
    torch.manual_seed(0)
    shape = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=32, **shape))
    else:
        model = OPTForCausalLM(
            OPTConfig(hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2,
                      max_position_embeddings=32, **shape)
        )  # fmt: skip
    given = {**saved(model, tmp_path / "model"), "dataset": "long.jsonl"}
    line = refused(files, tmp_path / "run", capsys, **given)
    assert "a record has 43 tokens, more than the 32 positions" in line and "--max_length 32" in line
    line = refused(files, tmp_path / "run", capsys, streaming=True, **given)
    assert "records may be longer than the 32 positions" in line
    assert run(files, tmp_path / "run", max_length=32, **given) == 0


def test_loading_options_that_no_model_takes_and_adapters_are_told(files, tmp_path, capsys):
    model = saved(tiny_model(), tmp_path / "model")
    line = refused(files, tmp_path / "run", capsys, model_init_kwargs='{"foo": 1}', **model)
    assert "'foo'" in line and "--model_init_kwargs" in line
    adapter = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj"]}
    assert run(files, tmp_path / "lora", **model, **adapter) == 0
    capsys.readouterr()
    line = refused(files, tmp_path / "run", capsys, **{**model, "model_name_or_path": tmp_path / "lora/checkpoint-2"})
    assert "an adapter; merge it" in line and "--merge_adapter" in line


def test_the_whole_evaluation_set_is_evaluated_however_few_records_are_trained_on(files, tmp_path):
    made = {"eval_dataset": "eval.jsonl", "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.0}
    found = []
    for records in (2, 8):
        assert run(files, tmp_path / str(records), max_records=records, **made) == 0
        found += [
            line["eval_num_target_tokens"] for line in read_metrics(tmp_path / str(records)) if "eval_loss" in line
        ]
    assert found[0] == found[1]


def test_evaluating_on_the_training_data_is_told(files, tmp_path, capfd):
    shutil.copyfile(files / "data.jsonl", files / "copied.jsonl")
    made = {"eval_strategy": "steps", "max_steps": 1}
    for name, told in (("copied.jsonl", True), ("eval.jsonl", False)):
        assert run(files, tmp_path / name, eval_dataset=name, **made) == 0
        assert (f"  {name}: what is evaluated on is what is trained on\n" in capfd.readouterr().err) is told
    for content, told in ((None, True), ("a", True), ("b", False)):  # of names on the hub, and by content
        say_if_the_same({"name": "hub/data", "content": "a"}, {"name": "hub/data", "content": content})
        assert bool(capfd.readouterr().err) is told


@pytest.mark.parametrize("key", ["tools", "chat_template_kwargs"])
@pytest.mark.parametrize("kind", ["messages", "prompt_completion"])
def test_what_a_chat_template_would_not_get_is_refused(tmp_path, key, kind):
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    row = {"messages": [user, answer]} if kind == "messages" else {"prompt": [user], "completion": [answer]}
    path = tmp_path / "data.jsonl"
    value = [{"type": "function"}] if key == "tools" else {"enable_thinking": False}
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, key: value}) + "\n")
    with pytest.raises(UserError, match=rf"data.jsonl, line 2: `{key}` is not handed to the chat template"):
        load_records(path, template="chat")
    path.write_text(json.dumps({**row, key: None}) + "\n")
    assert load_records(path, template="chat")


def test_a_weight_that_float32_cannot_hold_is_refused():
    check_weight(3e38)
    with pytest.raises(ValueError, match="float32's largest"):
        check_weight(1e39)


# -- a generation config that transformers would not save


@pytest.fixture(scope="module")
def trained_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"temperature": 0.6, "top_p": 0.9},
            "it sets temperature and top_p without sampling; set `do_sample` to true",
        ),
        ({"length_penalty": 2.0}, "it sets length_penalty without beam search; set `num_beams` above 1 there"),
    ],
    ids=str,
)
def test_a_generation_config_that_cannot_be_saved_is_told_before_the_first_step(
    trained_model, files, tmp_path, capsys, config, said
):
    """The Trainer gives it the tokenizer's pad token, and what was changed has to be valid to be saved."""
    folder = tmp_path / "model"
    shutil.copytree(trained_model, folder)
    written = {"bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.31.0", **config}
    (folder / "generation_config.json").write_text(json.dumps(written))
    options = {"config_name": None, "tokenizer_name": None, "model_name_or_path": folder}
    line = refused(files, tmp_path / "run", capsys, **options)
    assert f"generation_config.json of {folder}: not valid, so no checkpoint could be saved: " in line and said in line
    # An adapter is saved without it, and one that is not changed is saved as it was.
    assert run(files, tmp_path / "adapter", **options, use_peft=True) == 0
    (folder / "generation_config.json").write_text(json.dumps({**written, "pad_token_id": 0}))
    assert run(files, tmp_path / "unchanged", **options) == 0
