from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from trl import ModelConfig

from convexlm.errors import UserError
from convexlm.pipeline import accumulation_steps, train_options
from convexlm.plan import checkpoint_steps, make_plan, show_plan, steps_of_epoch
from convexlm.plan_training import plan_training, show_training_plan
from convexlm.recipe import Recipe, load_recipe
from convexlm.runs import RunFolder, trained_runs
from pipeline_helpers import recipe_with, snapshot, write_recipe


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def load(tmp_path: Path, **changes: Any) -> Recipe:
    return load_recipe(write_recipe(tmp_path, recipe_with(**changes)))


def with_records(tmp_path: Path, count: int, **changes: Any) -> Recipe:
    """One arm on a file of so many records."""
    rows = [{"instruction": "Say it.", "input": str(number), "output": "it"} for number in range(count)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    train = {"per_device_train_batch_size": 2, "report_to": "none", **changes}
    data = {"dataset": str(tmp_path / "data.json")}
    # The tiny world's tokenizer is made of generated data.
    return load(tmp_path, data=data, train=train, arms={"mle": {"objective": "mle"}}, model__tokenizer=None)


CASES: list[tuple[int, dict[str, Any]]] = [
    (13, {"num_train_epochs": 1, "save_steps": 3}),
    (13, {"num_train_epochs": 3, "gradient_accumulation_steps": 4, "save_steps": 2}),
    (12, {"num_train_epochs": 2, "gradient_accumulation_steps": 3, "save_steps": 2}),
    (16, {"num_train_epochs": 2, "gradient_accumulation_steps": 4, "save_steps": 100}),
    (13, {"num_train_epochs": 1.5, "gradient_accumulation_steps": 2, "save_steps": 2}),
    (13, {"num_train_epochs": 0.4, "save_steps": 2}),
    (3, {"num_train_epochs": 2, "gradient_accumulation_steps": 8, "save_steps": 1}),
    (1, {"num_train_epochs": 2, "save_steps": 1}),
    (13, {"num_train_epochs": 2, "dataloader_drop_last": True, "gradient_accumulation_steps": 4, "save_steps": 2}),
    (13, {"max_steps": 5, "save_steps": 2}),
    (5, {"max_steps": 11, "save_steps": 4}),
    (13, {"num_train_epochs": 2, "save_steps": 0.25}),
    (13, {"num_train_epochs": 2, "save_steps": 0.3}),
    (13, {"num_train_epochs": 3, "save_strategy": "epoch", "gradient_accumulation_steps": 2}),
    (13, {"num_train_epochs": 1.5, "save_strategy": "epoch"}),
    (13, {"max_steps": 10, "save_strategy": "epoch"}),
    (13, {"max_steps": 3, "save_strategy": "epoch"}),
    (13, {"num_train_epochs": 2, "save_steps": 3, "save_total_limit": 2}),
    (13, {"max_steps": 5, "save_steps": 2, "save_total_limit": -1}),
    (13, {"max_steps": 5, "save_steps": 0}),
]


@pytest.mark.parametrize(("count", "options"), CASES)
def test_steps_and_checkpoints_are_those_of_the_trainer(
    tmp_path: Path, count: int, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The oracle is transformers' own Trainer, run to its end."""
    import torch
    from transformers import Trainer, TrainingArguments

    class Line(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.slope * x).square().mean()}

    planned = make_plan(with_records(tmp_path, count, **options), tmp_path / "run")["train"][0]
    args = TrainingArguments(
        tmp_path / "trained",
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_only_model=True,
        **options,
    )
    trainer = Trainer(Line(), args, train_dataset=[{"x": torch.ones(1)} for _ in range(count)])
    trainer.train()
    saved = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "trained").glob("checkpoint-*"))
    assert planned["steps"] == trainer.state.global_step
    assert planned["checkpoints"] == saved
    assert planned["records"] == count


def test_the_reference_recipe_has_the_papers_steps() -> None:
    """52002 records, 3 epochs, 128 a step: 406.27 a step, so 407 steps an epoch and 1221 in all."""
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "llama-7b-mle.yaml")
    plan = make_plan(recipe, "runs/x")
    (train,) = plan["train"]
    assert (train["steps"], train["global_batch"], train["epochs"]) == (1221, 128, 3)
    assert train["checkpoints"] == [200, 400, 600, 800, 1000, 1200, 1221]
    assert plan["searches"]["beam4"]["no_repeat_ngram_size"] == 12
    assert len(plan["decode"]) == 7 * 4


@pytest.mark.parametrize(("world", "accumulated"), [("1", 32), ("2", 16), ("8", 4), ("32", 1)])
def test_a_global_batch_is_made_up_on_any_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: str, accumulated: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    recipe = with_records(tmp_path, 1000, per_device_train_batch_size=4, global_batch_size=128, num_train_epochs=1)
    train = make_plan(recipe, tmp_path / "run")["train"][0]
    assert train["global_batch"] == 128
    assert train["batch"] == f"4 x {accumulated} accumulated x {world} processes"
    assert train["steps"] == 8  # of 1000 / 128 = 7.8
    assert "global_batch_size" not in train["options"]


@pytest.mark.parametrize(
    ("total", "options", "said"),
    [
        (100, {"per_device_train_batch_size": 8}, "no multiple of per_device_train_batch_size x processes = 16"),
        (8, {"per_device_train_batch_size": 8}, "= 16"),
        (0, {}, "global_batch_size 0"),
        (-16, {}, "global_batch_size -16"),
        ("128", {}, "global_batch_size '128'"),
        (128.0, {}, "global_batch_size 128.0"),
        (128, {"gradient_accumulation_steps": 2}, "not both"),
    ],
)
def test_a_global_batch_that_cannot_be_is_refused(total: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        accumulation_steps(total, options, "mle", 2)
    assert "arm `mle`" in str(error.value) and said in str(error.value)


def test_the_default_batch_size_is_the_trainers() -> None:
    from convexlm import ConvexConfig

    config = ConvexConfig("x", use_cpu=True)
    assert accumulation_steps(16 * config.per_device_train_batch_size, {}, "mle", 1) == 16
    assert steps_of_epoch(config, 8 * config.per_device_train_batch_size + 1) == 9
    assert checkpoint_steps(config, None, None) == []


def test_a_plan_names_every_file_that_the_run_makes(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    plan = make_plan(recipe, tmp_path / "run")
    assert [train["run"] for train in plan["train"]] == [run.name for run in trained_runs(recipe)]
    assert {train["records"] for train in plan["train"]} == {200}
    assert plan["train"][1]["start"] == str(tmp_path / "run/train/base.seed1/checkpoint-LAST")
    files = [Path(job["file"]).relative_to(tmp_path / "run/decode") for job in plan["decode"]]
    assert sorted(map(str, files)) == sorted(
        f"{arm}.seed{seed}/checkpoint-{step}/toy.{pair}.{search}.jsonl"
        for arm in ("mle", "convex")
        for seed in (1, 2)
        for step in (3, 6)
        for pair in ("en-de", "en-zh")
        for search in ("greedy", "beam2")
    )
    assert {job["sentences"] for job in plan["decode"]} == {recipe.test_sets[0]["size"]}


def test_a_plan_writes_nothing_and_can_be_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load(tmp_path)
    before = snapshot(tmp_path)
    plan = make_plan(recipe, tmp_path / "run[/bold]")
    show_plan(plan, Console(width=200))
    out = capsys.readouterr().out
    assert snapshot(tmp_path) == before
    assert json.loads(json.dumps(plan)) == plan
    assert str(tmp_path / "run[/bold]") in out and "max_new_tokens=12" in out and "checkpoints 3, 6" in out


def test_checkpoints_that_will_not_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="will have no checkpoint at step 4"):
        make_plan(load(tmp_path, decode__checkpoints=[3, 4]), tmp_path / "run")
    plan = make_plan(load(tmp_path, decode__checkpoints=[6]), tmp_path / "run")
    assert {Path(job["file"]).parent.name for job in plan["decode"]} == {"checkpoint-6"}
    plan = make_plan(load(tmp_path, decode__checkpoints="last"), tmp_path / "run")
    assert {Path(job["file"]).parent.name for job in plan["decode"]} == {"checkpoint-6"}


def test_generated_records_are_counted_as_they_will_be(tmp_path: Path) -> None:
    from convexlm.run_data import generate

    dataset = {"kind": "tinyworld", "directions": ["en-de", "de-en", "en-zh"], "size": 100, "seed": 1}
    recipe = load(tmp_path, data={"dataset": dataset}, train__max_steps=None)
    assert make_plan(recipe, tmp_path / "run")["train"][0]["records"] == len(generate(dataset)) == 99
    recipe = load(tmp_path, data={"dataset": dataset, "max_records": 7}, train__max_steps=None)
    assert make_plan(recipe, tmp_path / "run")["train"][0]["records"] == 7


def test_options_of_a_run_come_from_the_arm_over_the_recipe(tmp_path: Path) -> None:
    recipe, folder = load(tmp_path, data__template="alpaca"), RunFolder(tmp_path / "run")
    base, mle, convex = trained_runs(recipe)[:3]
    options = train_options(recipe, folder, base)
    assert (options["max_steps"], options["seed"], options["template"]) == (60, 1, "alpaca")
    assert options["config_name"] == str(tmp_path / "run/data/model")
    assert options["tokenizer_name"] == str(tmp_path / "run/data/tokenizer")
    options = train_options(recipe, folder, convex)
    assert (options["k"], options["objective"], options["max_steps"]) == (1.0, "convex", 6)
    assert "config_name" not in options and options["output_dir"] == str(tmp_path / "run/train/convex.seed1")
    assert options["report_to"] == "none"


def test_a_plan_with_validation_decodes_test_sets_from_the_selected_checkpoint_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validation = [{"name": "dev", "kind": "tinyworld", "pairs": ["en-de"], "size": 4, "seed": 6}]
    recipe = load(tmp_path, seeds=[1], validation_sets=validation, selection={"on": "validation", "search": "beam2"})
    plan = make_plan(recipe, tmp_path / "run")
    assert plan["selection"] == {"on": "validation", "metric": "bleu", "search": "beam2"}
    jobs = {(job["role"], str(Path(job["file"]).relative_to(tmp_path / "run/decode"))) for job in plan["decode"]}
    assert jobs == {
        *(("validation", f"{arm}/checkpoint-{s}/dev.en-de.beam2.jsonl") for arm in ("mle", "convex") for s in (3, 6)),
        *(
            ("test", f"{arm}/checkpoint-SELECTED/toy.{pair}.{search}.jsonl")
            for arm in ("mle", "convex")
            for pair in ("en-de", "en-zh")
            for search in ("greedy", "beam2")
        ),
    }
    show_plan(plan, Console(width=200))
    assert "the best bleu with beam2 search on the validation sets" in capsys.readouterr().out


# -- memory, tokens, disk


def test_a_plan_says_memory_tokens_and_disk(shared_data: Path, tmp_path: Path) -> None:
    """On real data and the Llama-2 tokenizer; the oracle for lengths is the tokenizer itself."""
    from convexlm.instructions import load_records
    from convexlm.tokenization import PromptSettings, load_tokenizer, tokenize_records

    path = Path(__file__).parents[1] / "recipes" / "smoke-wmt22.yaml"
    recipe = load_recipe(path, [f"vars.data_dir={shared_data}", "train.save_total_limit=1"])
    plan = make_plan(recipe, tmp_path / "run")
    mle, convex = plan["train"]
    assert mle["memory"] == convex["memory"] and mle["tokens"] == convex["tokens"]
    assert mle["memory"]["parameters"] == 2 * 32000 * 64 // 2 + 64 + 2 * (4 * 64 * 64 + 3 * 64 * 172 + 2 * 64)
    assert (mle["memory"]["rows"], mle["memory"]["length"]) == (4, 256)
    assert mle["disk"] == {
        "checkpoint": 12 * mle["memory"]["parameters"],
        "kept": 12 * mle["memory"]["parameters"],
        "most": 2 * 12 * mle["memory"]["parameters"],
    }
    assert plan["disk"] == 2 * mle["disk"]["kept"]
    assert (plan["decode_jobs"], plan["decode_sentences"]) == (8, 64)
    records = load_records(recipe.data["dataset"])
    tokenizer = load_tokenizer(shared_data / "tokenizers")
    rows = tokenize_records(records, tokenizer, PromptSettings().resolve(tokenizer), 256).rows
    mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
    assert mle["tokens"]["sampled"] <= 400 and mle["tokens"]["mean"] == pytest.approx(mean, rel=0.1)
    assert mle["tokens"]["in_all"] == round(16 * 4 * mle["tokens"]["mean"])
    assert json.loads(json.dumps(plan)) == plan


@pytest.mark.parametrize(
    ("strategy", "line"),
    [
        ("no", "saves    nothing (--save_strategy no)"),
        ("best", "saves    a checkpoint at each evaluation that is the best"),
    ],
)
def test_a_plan_says_what_is_saved(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], strategy: str, line: str
) -> None:
    recipe = with_records(tmp_path, 4, use_cpu=True)
    run = trained_runs(recipe)[-1]
    options = {**train_options(recipe, RunFolder(tmp_path / "run"), run), "save_strategy": strategy}
    show_training_plan(plan_training(options), Console(width=200))
    assert line in capsys.readouterr().out


def test_a_plan_of_no_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 records, packed or not, make no whole batch of 2 on 1 processes"):
        make_plan(with_records(tmp_path, 1, dataloader_drop_last=True), tmp_path / "run")


@pytest.mark.parametrize(
    ("train", "jemalloc", "told"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"return_freed_memory": True}, False, False),
    ],
)
def test_a_plan_on_a_cpu_says_whether_freed_memory_is_kept(
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    train: dict[str, Any],
    *,
    jemalloc: bool,
    told: bool,
) -> None:
    monkeypatch.setattr("convexlm.plan_training.jemalloc_is_preloaded", lambda: jemalloc)
    plan = make_plan(with_records(tmp_path, 4, use_cpu=True, **train), tmp_path / "run")
    show_plan(plan, Console(width=200))
    assert ("10 to 80 % more" in capsys.readouterr().out) == told


def test_the_reference_recipe_has_its_memory_without_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "llama-7b-mle.yaml")
    plan = make_plan(recipe, "runs/x")
    (train,) = plan["train"]
    memory = train["memory"]
    assert (plan["processes"], memory["sharding"], memory["parameters"]) == (8, "fsdp2", 6_738_415_616)
    assert memory["weights"] == pytest.approx(4 * 6_738_415_616 / 8, rel=0.001)
    assert train["batch"] == "1 x 16 accumulated x 8 processes"
    assert train["disk"]["checkpoint"] == 12 * 6_738_415_616
    show_plan(plan, Console(width=200))
    out = capsys.readouterr().out
    assert "6,738,415,616 parameters (by a table of known shapes)" in out and "fsdp2 over 8" in out
    assert "84 GB" not in out and "80.9 GB each, at most 566.0 GB" in out


def test_a_model_that_is_not_at_hand_has_no_memory_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"model_name_or_path": "nobody/unknown-model"}
    plan = make_plan(load(tmp_path, model=model, train__max_steps=5), tmp_path / "run")
    assert plan["train"][0]["memory"] is None and plan["disk"] is None
    show_plan(plan, Console(width=200))
    assert "memory   not known: nobody/unknown-model: its config is not at hand" in capsys.readouterr().out


def test_records_that_the_recipe_tells_are_of_its_own_dataset(tmp_path: Path) -> None:
    data = {"dataset": "some/corpus", "num_records": 1000}
    arms = {"mle": {"objective": "mle"}, "other": {"objective": "mle", "dataset": "another/corpus"}}
    model = {"model_name_or_path": "nobody/unknown-model"}
    plan = make_plan(load(tmp_path, data=data, arms=arms, model=model), tmp_path / "run")
    records = {train["dataset"]: train["records"] for train in plan["train"]}
    assert records == {"some/corpus": 1000, "another/corpus": None}
    assert plan["train"][1]["records_from"] == "the hub was not asked"


def test_runs_do_not_share_a_repository(tmp_path: Path) -> None:
    pushed = {"train__max_steps": 2, "train__push_to_hub": True, "train__hub_model_id": "me/model"}
    with pytest.raises(UserError, match="`hub_model_id: me/model`: .* would be pushed to the same repository"):
        make_plan(load(tmp_path, **pushed), tmp_path / "run")


def test_quantized_weights_are_trained_through_an_adapter_only(tiny_llama: Path, tmp_path: Path) -> None:
    from convexlm.data_options import DataOptions
    from convexlm.plan_training import plan_training
    from convexlm.training_model import check_model

    (tmp_path / "data.json").write_text(json.dumps([{"instruction": "say", "input": "one", "output": "two"}]))
    values: dict[str, Any] = {
        "model_name_or_path": str(tiny_llama),
        "dataset": str(tmp_path / "data.json"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
    }
    with pytest.raises(UserError, match="--load_in_4bit: quantized weights cannot be trained; give --use_peft true"):
        plan_training({**values, "load_in_4bit": True})
    planned = plan_training({**values, "load_in_4bit": True, "use_peft": True, "lora_target_modules": ["q_proj"]})
    assert planned["memory"]["trainable"] < planned["memory"]["parameters"] and planned["memory"]["checkpoint_weights"]
    data = DataOptions("x.json", config_name=str(tiny_llama))
    with pytest.raises(UserError, match="--load_in_8bit: a new model"):
        check_model(ModelConfig(load_in_8bit=True, use_peft=True), data)
    with pytest.raises(UserError, match="--load_in_8bit: quantized weights"):
        check_model(ModelConfig(str(tiny_llama), load_in_8bit=True), DataOptions("x.json"))


def test_one_training_is_planned_alone(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from convexlm.plan_training import plan_training, show_training_plan

    rows = [{"instruction": "say", "input": "one two", "output": "three four"} for _ in range(30)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    values = {
        "model_name_or_path": str(tiny_llama),
        "dataset": str(tmp_path / "data.json"),
        "output_dir": str(tmp_path / "out"),
        "objective": "mle",
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "save_steps": 5,
        "use_cpu": True,
    }
    before = snapshot(tmp_path)
    plan = plan_training(values)
    assert snapshot(tmp_path) == before
    assert (plan["records"], plan["steps"], plan["checkpoints"]) == (30, 16, [5, 10, 15, 16])
    assert plan["tokens"]["sampled"] == 30
    assert plan["tokens"]["in_all"] == round(2 * 30 * plan["tokens"]["mean"])
    assert plan["memory"]["length"] == plan["tokens"]["longest"]  # all records were read
    assert plan["memory"]["config_from"] == "its config.json" and plan["memory"]["device"] == "cpu"
    packed = plan_training({**values, "packing": True, "max_length": 64})
    assert (packed["memory"]["rows"], packed["memory"]["length"]) == (4, 64)
    flat = plan_training({**values, "packing": True, "padding_free": True, "max_length": 64})
    assert (flat["memory"]["rows"], flat["memory"]["length"]) == (1, 4 * 64)
    assert packed["memory"]["activations"] < flat["memory"]["activations"]  # 4 small masks, not a large one
    assert 1 <= packed["steps"] <= plan["steps"] and packed["steps_about"] is None
    other = plan_training({**values}, processes=2, sharding="MEGATRON_LM")
    assert (other["memory"], other["memory_note"]) == (None, "how MEGATRON_LM divides a model is not counted here")
    adapter = plan_training({**values, "use_peft": True, "lora_target_modules": ["q_proj"]})
    assert adapter["memory"]["trainable"] == 16 * (16 + 16)
    assert json.loads(json.dumps(plan)) == plan
    show_training_plan(plan, Console(width=200))
    assert "16 steps" in capsys.readouterr().out
