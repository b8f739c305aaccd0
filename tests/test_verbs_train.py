"""`convexlm train` end to end on a small file, and the one line it says where it cannot."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch

from convexlm import cli
from convexlm.metrics_file import read_metrics
from training_helpers import tiny_config, tiny_model, tiny_tokenizer, train, words, write_model_files, write_records


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_model_files(folder / "model")
    records = [
        {"instruction": f"w{i} w{i + 1}", "input": "w9" if i % 2 else "", "output": f"w{i + 2} w{i}"}
        for i in range(12)
    ]
    (folder / "alpaca.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    write_records(folder / "pairs.jsonl", 8)
    broken = (folder / "alpaca.jsonl").read_text(encoding="utf-8").replace('{"instruction": "w4', '{"instruction: "w4')
    (folder / "broken.jsonl").write_text(broken, encoding="utf-8")
    return folder


def new_model(files):
    return {"config_name": files / "model", "tokenizer_name": files / "model"}


SHORT = {
    "max_steps": 3,
    "save_steps": 3,
    "per_device_train_batch_size": 4,
    "max_length": 128,
    "save_only_model": False,
}


def test_a_bos_that_the_tokenizer_does_not_put_is_told(files, tmp_path, capsys):
    """Where a model that somebody else trained gets one; not of a new model, nor where it was asked for."""
    nothing = {"dataset": files / "none.jsonl", **SHORT}
    told = "prompts begin with the BOS token `<s>`, which this tokenizer does not add by itself"
    shutil.copytree(files / "model", tmp_path / "model")
    tiny_model().save_pretrained(tmp_path / "model")
    assert train(tmp_path / "out", model_name_or_path=tmp_path / "model", **nothing) == 2
    assert told in capsys.readouterr().err
    assert train(tmp_path / "out", model_name_or_path=tmp_path / "model", add_bos=True, **nothing) == 2
    assert train(tmp_path / "out", **new_model(files), **nothing) == 2
    assert told not in capsys.readouterr().err


def test_new_model_then_its_checkpoint_then_lora_then_resume(files, tmp_path, capsys):
    data = files / "alpaca.jsonl"
    first = tmp_path / "first"
    assert train(first, "--json", dataset=data, **new_model(files), **SHORT) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["checkpoints"] == ["checkpoint-3"] and result["records"] == 12 and result["steps"] == 3
    checkpoint = result["last_checkpoint"]
    assert json.loads((first / "checkpoint-3" / "convexlm.json").read_text())["prompt"]["template"] == "alpaca"

    second = tmp_path / "second"
    assert train(second, "--json", dataset=data, model_name_or_path=checkpoint, objective="mle", **SHORT) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    assert read_metrics(second)[0]["nll"] != read_metrics(first)[0]["nll"]

    lora = tmp_path / "lora"
    options = {
        "model_name_or_path": checkpoint,
        "use_peft": True,
        "lora_r": 2,
        "lora_target_modules": ["q_proj", "v_proj"],
    }
    assert train(lora, "--json", dataset=data, **options, **SHORT) == 0
    assert (lora / "checkpoint-3" / "adapter_model.safetensors").is_file()
    capsys.readouterr()

    longer = {**SHORT, "max_steps": 5}
    assert train(first, "--json", dataset=data, **new_model(files), **longer) == 2
    assert "--resume" in capsys.readouterr().err
    assert train(first, "--json", "--resume", dataset=data, **new_model(files), **longer) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 5
    assert [line["step"] for line in read_metrics(first)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dataset": "missing.jsonl"}, "missing.jsonl"),
        ({"dataset": "broken.jsonl"}, "broken.jsonl, line 5"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"k": 0}, "k must be"),
        ({"k": -2}, "k must be"),
        ({"k": "much"}, "k"),
        ({"objective": "hinge"}, "unknown objective `hinge`"),
        ({"template": "nothing"}, "nothing"),
        ({"bf16": True, "fp16": True}, "fp16"),
        ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"optim": "no_such_optimizer"}, "no_such_optimizer"),
        ({"max_length": 1}, "max_length"),
        ({"max_records": 0}, "max_records"),
        ({"model_name_or_path": "both"}, "not both"),
        ({"resume_from_checkpoint": "nosuch"}, "--resume_from_checkpoint: not heeded"),
        ({"auto_find_batch_size": True}, "--auto_find_batch_size: not heeded"),
        ({"bf16_full_eval": True}, "--bf16_full_eval: not heeded"),
        ({"bf16_full_eval": True, "use_cpu": False}, "--bf16_full_eval: not heeded"),
        ({"load_best_model_at_end": True}, "but found Evaluation strategy: no, Save strategy: steps"),
        ({"enable_jit_checkpoint": True}, "--enable_jit_checkpoint: not heeded"),
        ({"lora_r": 8, "lora_target_modules": ["q_proj"]}, "--lora_r: without --use_peft true there is no adapter"),
        ({"lora_target_modules": ["q_proj"]}, "--lora_target_modules: without --use_peft true"),
        ({"use_dora": True}, "--use_dora: without --use_peft true"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_told_in_one_line(files, tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.chdir(files)
    given = {"dataset": "alpaca.jsonl", **new_model(files), **SHORT, **options}
    assert train(tmp_path / "run", **given) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error:" in line]
    assert out == "" and len(lines) == 1 and said in lines[0]
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bf16_without_a_gpu_says_what_to_give(files, tmp_path, capsys):
    options = {"dataset": files / "alpaca.jsonl", **new_model(files), **SHORT, "bf16": True, "use_cpu": False}
    assert train(tmp_path / "run", **options) == 2
    assert "error: --bf16 true: there is no GPU here that has bf16; leave it out, or give --use_cpu true" in (
        capsys.readouterr().err
    )


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_a_deepspeed_file_without_deepspeed(files, tmp_path, capsys):
    (tmp_path / "ds.json").write_text('{"train_batch_size": "auto"}', encoding="utf-8")
    options = {"dataset": files / "alpaca.jsonl", **new_model(files), **SHORT, "deepspeed": tmp_path / "ds.json"}
    assert train(tmp_path / "run", **options) == 2
    assert "error: --deepspeed: DeepSpeed is not installed (pip install deepspeed)" in capsys.readouterr().err


def test_missing_options_are_named(files, tmp_path, capsys):
    assert cli.main(["train", *words(dataset=files / "alpaca.jsonl")]) == 2
    assert "--output_dir" in capsys.readouterr().err
    assert train(tmp_path / "run", dataset=files / "alpaca.jsonl") == 2
    assert "error: --model_name_or_path is missing" in capsys.readouterr().err


def test_modules_for_an_adapter_of_which_the_model_has_none(files, tmp_path, capsys):
    shutil.copytree(files / "model", tmp_path / "model")
    tiny_model().save_pretrained(tmp_path / "model")
    options = {"model_name_or_path": tmp_path / "model", "use_peft": True, "lora_target_modules": ["foo", "fi"]}
    assert train(tmp_path / "run", dataset=files / "alpaca.jsonl", **options, **SHORT) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "--lora_target_modules: the model has no module" in line and "`foo`" in line and "`fi`" in line


@pytest.mark.parametrize("epochs", [{"num_train_epochs": 3}, {}], ids=str)
def test_a_dry_run_tells_the_settings_of_the_objective_and_what_max_steps_overrides(files, tmp_path, capsys, epochs):
    options = {"dataset": files / "alpaca.jsonl", **new_model(files), **SHORT, **epochs}
    assert train(tmp_path / "run", "--dry_run", "--json", **options) == 0
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert plan["steps"] == 3
    settings = {"objective": "convex", "k": 1.0, "level": "sequence", "length_weighting": "token", "mle_mix": 0.0}
    assert settings.items() <= plan["options"].items()
    told = "--max_steps 3 counts, and --num_train_epochs is not heeded beside it"
    assert (told in err) is bool(epochs)


def test_epochs_count_where_no_steps_are_given(files, tmp_path, capsys):
    options = {"dataset": files / "alpaca.jsonl", **new_model(files), **SHORT, "max_steps": -1}
    for epochs, steps in (({"num_train_epochs": 2}, 6), ({}, 9)):
        assert train(tmp_path / "run", "--dry_run", "--json", **options, **epochs) == 0
        assert json.loads(capsys.readouterr().out)["steps"] == steps


def test_assistant_turns_that_are_context_are_counted(tmp_path, capsys):
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}assistant "
    tiny_tokenizer(template).save_pretrained(tmp_path / "model")
    tiny_config().save_pretrained(tmp_path / "model")
    turns = [{"role": role, "content": "w1 w2"} for role in ("user", "assistant") * 2]
    rows = [{"messages": turns}, {"messages": turns[:2]}, {"messages": turns}]
    split = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    told = "2 records have assistant turns before the last, which are context and not trained on"
    for name, lines in (("turns", rows), ("turns", rows), ("split", split)):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        options = {"dataset": data, "dataset_cache_dir": tmp_path / "cache", "template": "chat"}
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        assert train(run, **options, **new_model(tmp_path), **{**SHORT, "max_steps": 1}) == 0
        assert (told in capsys.readouterr().err) is (name == "turns"), "what is given as a prompt is meant as one"
