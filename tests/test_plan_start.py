"""What a training refuses at its start its dry run refuses, too, in the same line; its steps are the training's."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest

import cli_helpers
from convexlm import cli
from convexlm.errors import UserError
from convexlm.plan_training import plan_lines, plan_training

if TYPE_CHECKING:
    from pathlib import Path

_offline = pytest.fixture(autouse=True)(cli_helpers.offline)


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def write_data(tmp_path: Path, count: int) -> Path:
    """Records whose prompts and answers are of many lengths."""
    draw = random.Random(1)
    rows = [
        {"instruction": "x" * draw.randint(1, 24), "input": "", "output": "y" * draw.randint(1, 24)}
        for _ in range(count)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path / "data.json"


def options(model: Path, tmp_path: Path, count: int, **more: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(model),
        "dataset": str(write_data(tmp_path, count)),
        "output_dir": str(tmp_path / "out"),
        "template": "prompt_no_alpaca",
        "use_cpu": True,
        "objective": "mle",
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "save_strategy": "no",
        "report_to": "none",
        **more,
    }


def words(values: dict[str, Any]) -> list[str]:
    return ["train", *(word for key, value in values.items() for word in (f"--{key}", str(value)))]


CASES: list[tuple[dict[str, Any], str]] = [
    ({"eval_dataset": "DATA"}, "--eval_dataset without --eval_strategy is never evaluated"),
    ({"eval_dataset": "nosuch.json", "eval_strategy": "epoch"}, "nosuch.json: no such file"),
    ({"dataset": "nosuch.json"}, "nosuch.json: no such file"),
    (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        "--lr_scheduler_type cosine_with_min_lr with its --lr_scheduler_kwa",
    ),
    ({"objective": "convex", "label_smoothing_factor": 0.1}, "`label_smoothing_factor` goes with"),
    ({"objective": "convex", "packing": True, "packing_strategy": "wrapped"}, "`packing_strategy='wrapped'` cuts"),
    ({"loss_type": "dft"}, "`loss_type='dft'` is TRL's"),
    ({"output_dir": "HELD"}, "holds checkpoints already; give --resume"),
    ({"use_peft": True, "lora_target_modules": "foo"}, "--lora_target_modules: the model has no module `foo`"),
    ({"use_peft": True, "lora_modules_to_save": "foo"}, "--lora_modules_to_save: the model has no module `foo`"),
    ({"use_peft": True, "lora_target_modules": "input_layernorm"}, "Target module LlamaRMSNorm"),
    ({"streaming": True}, "--streaming needs --max_steps"),
    ({"shuffle_buffer": 3}, "--shuffle_buffer is for --streaming"),
    ({"model_name_or_path": "BARE"}, "no weights in safetensors format there"),
    ({"attn_implementation": "flex_attention"}, "--attn_implementation flex_attention: torch has no backward pass"),
    ({"activation_offloading": True}, "--activation_offloading moves activations"),
    ({"fp16": True, "dtype": "float16"}, "--dtype float16 with fp16"),
    (
        {"packing": True, "max_length": 30, "dataloader_drop_last": True, "per_device_train_batch_size": 64},
        "no whole b",
    ),
]


@pytest.mark.parametrize(("given", "said"), CASES, ids=[said[:30] for _, said in CASES])
def test_a_dry_run_refuses_what_the_training_does(
    tiny_llama: Path, tmp_path: Path, given: dict[str, Any], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "held" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "bare").mkdir()
    for file in tiny_llama.iterdir():
        if file.suffix == ".json":
            (tmp_path / "bare" / file.name).write_bytes(file.read_bytes())
    places = {"DATA": tmp_path / "data.json", "HELD": tmp_path / "held", "BARE": tmp_path / "bare"}
    given = {key: str(places[value]) if value in places else value for key, value in given.items()}
    values = options(tiny_llama, tmp_path, 12, **given)
    capfd.readouterr()
    told = []
    for more in (["--dry_run"], []):
        assert cli.main([*words(values), *more]) == cli.EXIT_USER_ERROR
        out, err = capfd.readouterr()
        assert out == ""
        told.append(err.rstrip("\n").split("\n"))
    dry, real = told
    assert len(dry) == 1 and said in dry[0]
    assert dry[0] == real[-1]


def test_a_dry_run_refuses_rows_that_the_model_cannot_take(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=8, n_layer=1, n_head=1)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    values = options(tmp_path, tmp_path, 12, output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"tokens, more than the 16 positions that the model has learned"):
        plan_training(values)
    assert plan_training({**values, "max_length": 16})["steps"]
    with pytest.raises(UserError, match="--packing needs a --max_length"):
        plan_training({**values, "packing": True, "max_length": None})


def test_a_dry_run_of_a_training_that_goes_on_is_no_mistake(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    assert plan_training(options(tiny_llama, tmp_path, 4), resume=True)["steps"] == 4


# -- steps


@pytest.mark.parametrize(
    "given",
    [
        {"max_length": 20},
        {"max_length": 40, "packing": True},
        {"max_length": 24, "packing": True, "dataset_num_proc": 2},
        {"max_length": 30, "packing": True, "packing_strategy": "wrapped", "num_train_epochs": 1.5},
    ],
    ids=["cut", "packed", "packed by two", "wrapped"],
)
def test_steps_are_those_of_the_training_where_all_records_were_read(
    tiny_llama: Path, tmp_path: Path, given: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """The oracle is the training, run to its end."""
    values = options(tiny_llama, tmp_path, 60, **given)
    plan = plan_training(values)
    assert cli.main([*words(values), "--json"]) == 0
    trained = json.loads(capfd.readouterr().out)
    assert (plan["steps"], plan["steps_about"]) == (trained["steps"], None)
    assert plan["tokens"]["dropped"] == len(trained["dropped"])
    assert plan["tokens"]["sampled"] == plan["records"] == 60
    assert f"steps    {trained['steps']} steps" in plan_lines(plan)[2]


@pytest.mark.parametrize("given", [{"max_length": 20}, {"max_length": 40, "packing": True}], ids=["cut", "packed"])
def test_steps_are_about_those_of_the_training_where_some_records_were_read(
    tiny_llama: Path, tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is the plan of all records, which the test before holds to the training."""
    values = options(tiny_llama, tmp_path, 2500, **given)
    plan = plan_training(values)
    monkeypatch.setattr("convexlm.plan_data.SAMPLED_RECORDS", 2500)
    whole = plan_training(values)
    assert (plan["steps"], plan["tokens"]["sampled"]) == (None, 400)
    assert whole["steps_about"] is None and plan["steps_about"] == pytest.approx(whole["steps"], rel=0.07)
    assert plan["tokens"]["in_all"] == pytest.approx(whole["tokens"]["in_all"], rel=0.07)
    lines = plan_lines(plan)
    assert f"steps    about {plan['steps_about']:,} steps" in lines[2] and "about" in lines[3]


def test_a_sample_of_which_nothing_is_dropped_says_when_training_saves(tiny_llama: Path, tmp_path: Path) -> None:
    values = options(tiny_llama, tmp_path, 500, save_strategy="steps", save_steps=300)
    plan = plan_training(values)
    assert (plan["steps"], plan["steps_about"], plan["checkpoints"]) == (500, 500, [300, 500])
    assert "about 500 steps" in plan_lines(plan)[2]
    without_limit = plan_training({**values, "max_length": None})
    assert (without_limit["steps"], without_limit["steps_about"]) == (500, None)


def test_an_optimizer_that_fsdp_does_not_shard(tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    given = options(tiny_llama, tmp_path, 4, optim="adagrad")
    assert cli.main([*words(given), "--dry_run"]) == 0
    assert cli.main([*words(given), "--dry_run", "--accelerate_config", "fsdp2", "--num_processes", "2"]) == 2
    assert "`optim` adagrad does not go with FSDP" in capfd.readouterr().err
