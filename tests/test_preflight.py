"""Mistakes that would show after hours of training are told before a run folder is begun, by a dry run too."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from convexlm import pipeline, preflight
from convexlm.errors import UserError
from convexlm.pipeline import run_recipe
from convexlm.plan import make_plan
from convexlm.recipe import Recipe, load_recipe
from convexlm.spelled_config import spelled_config
from convexlm.testsets import TestSet
from pipeline_helpers import recipe_with, write_recipe

if TYPE_CHECKING:
    from pathlib import Path


def load(tmp_path: Path, **changes: Any) -> Recipe:
    return load_recipe(write_recipe(tmp_path, recipe_with(**changes)))


def complaint(tmp_path: Path, recipe: Recipe) -> str:
    """What a run says, which a dry run says, too; neither leaves a trace."""
    before = dict(os.environ)
    told = []
    for call in (run_recipe, make_plan):
        with pytest.raises(UserError) as error:
            call(recipe, tmp_path / "run")
        told.append(str(error.value))
        assert not (tmp_path / "run").exists() and dict(os.environ) == before
    assert told[0] == told[1] and "\n" not in told[0]
    return told[0]


def with_file(tmp_path: Path, count: int, **changes: Any) -> Recipe:
    """One arm that is trained on so many records of a file."""
    rows = [{"instruction": "Say it.", "input": str(number), "output": "it"} for number in range(count)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    own = {"data": {"dataset": str(tmp_path / "data.json")}, "model__tokenizer": "nobody/needs-it"}
    arms = {"mle": {"objective": "mle"}}
    return load(tmp_path, **{**own, "arms": arms, "train__max_steps": None, **changes})


def test_older_names_of_a_configs_keys_are_known(tmp_path: Path) -> None:
    older = {"model__config__rope_theta": 5e5, "model__config__torch_dtype": "float32"}
    config = spelled_config(load(tmp_path, **older, model__config__architectures=["LlamaForCausalLM"]))
    assert config.rope_parameters["rope_theta"] == 5e5
    scaled = {"model__config__rope_theta": 5e5, "model__config__rope_scaling": {"type": "linear", "factor": 2.0}}
    recipe = load(tmp_path, **scaled)
    assert spelled_config(recipe).rope_parameters["rope_theta"] == 5e5
    assert recipe.model["config"]["rope_scaling"] == {"type": "linear", "factor": 2.0}, "left as it was given"


def test_a_language_without_blanks_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load(tmp_path, score={"metrics": ["bleu", "chrf"]})
    sets = [TestSet("news", pair, ["a"], [["b"]], ["0"]) for pair in ("en-de", "en-th", "de-th")]
    preflight.check_scoring(recipe, sets)
    assert capsys.readouterr().err.count("`th` has no blanks between words") == 1
    preflight.check_scoring(recipe, sets[:1])
    assert capsys.readouterr().err == ""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms__convex__lr_scheduler_type": "cosin"}, "arm `convex`: cosin is not a valid SchedulerType"),
        ({"arms__convex__learning_rate": -1.0}, "arm `convex`: --learning_rate must not be negative"),
        ({"train__save_strategy": "no"}, "arm `base`: `save_strategy: no` leaves no checkpoint to decode"),
        ({"train__eval_strategy": "steps"}, "arm `base`: `eval_strategy` needs `data.eval_dataset`"),
        ({"data__eval_dataset": "nosuch.jsonl"}, "data.eval_dataset nosuch.jsonl: no such file"),
        ({"arms__mle__dataset": "nosuch.jsonl"}, "arm `mle`: dataset nosuch.jsonl: no such file"),
        ({"data__dataset__directions": ["en-xx"]}, "data.dataset: tinyworld has no direction en-xx"),
        ({"data__dataset__size": "10"}, "data.dataset: `size` is a number, not '10'"),
        ({"model": {"model_name_or_path": "./nosuch"}}, "model.model_name_or_path ./nosuch: no such folder"),
        ({"data__dataset__size": 0}, "data.dataset: `size` is at least 1 for each of `directions`, not 0"),
        ({"data__dataset__noise": 1.5}, "data.dataset: `noise` is a share from 0 to 1, not 1.5"),
        ({"model__config__hidden_size": 33}, "model.config: Class validation error"),
        ({"model__config__hidden_size": "many"}, "Field 'hidden_size' expected int, got str"),
        ({"model__config__model_type": "t5"}, "has no causal language model of the type `t5`"),
        (
            {"model__config__hiden_size": 64},
            "model.config: a config of the type `llama` has no `hiden_size`; did you mean",
        ),
        ({"model__config__rope_tetha": 1e6}, "has no `rope_tetha`"),
        ({"model__dtype": "float99"}, "arm `base`: --dtype float99: not a floating type of torch"),
        (
            {"model__attn_implementation": "nope"},
            "arm `base`: --attn_implementation nope: not one that transformers has",
        ),
        (
            {"model__use_peft": True, "model__lora_r": 0, "arms": {"mle": {"objective": "mle"}}},
            "arm `mle`: --lora_r must be at least 1, not 0",
        ),
        ({"model__dtype": "int8"}, "arm `base`: --dtype int8: not a floating type of torch"),
        (
            {"model__use_peft": True, "arms": {"mle": {"objective": "mle"}}},
            "arm `mle`: --use_peft: an adapter's checkpoints hold no base, and a new one",
        ),
        ({"decode__dtype": "float99"}, "unknown dtype `float99`"),
        ({"decode__device": "mars"}, "decode.device: torch knows no device `mars`"),
        ({"decode__compute_type": "int8"}, "the hf backend has no `int8`; `ctranslate2` has them"),
        ({"decode__compute_type": "int7", "decode__backend": "auto"}, "the ctranslate2 backend has no `int7`; known:"),
        ({"decode__compute_type": "int8", "decode__backend": "auto", "decode__dtype": "float32"}, "not both"),
        (
            {"decode__searches": [{"num_beams": 1}]},
            "max_new_tokens 256 leaves no room for a prompt: the model has 128",
        ),
        ({"model__config__hidden_size": 0}, "model.config: no model can be made of it (ZeroDivisionError:"),
        ({"model__config__hidden_act": "foo"}, "model.config: no model can be made of it (KeyError: "),
        ({"decode__gpu_memory_utilization": 0.5}, "the hf backend has no gpu_memory_utilization; the vllm backend"),
        ({"arms__convex__label_smoothing_factor": 0.1}, "arm `convex`: `label_smoothing_factor` goes with"),
        ({"arms__convex__loss_type": "dft"}, "arm `convex`: `loss_type='dft'` is TRL's"),
        ({"train__per_device_train_batch_size": 0}, "--per_device_train_batch_size must be at least 1, not 0"),
        ({"train__gradient_accumulation_steps": 0}, "--gradient_accumulation_steps must be at least 1, not 0"),
        ({"arms__convex__max_steps": 0}, "arm `convex`: --max_steps 0 trains nothing"),
        (
            {"train__max_steps": -1, "train__num_train_epochs": -1, "arms__base__max_steps": -1},
            "arm `base`: --num_train_epochs must be finite and above 0, not -1",
        ),
        (
            {"decode__checkpoints": [3, 4]},
            "arm `mle`: decode.checkpoints: mle.seed1 will have no checkpoint at step 4 (it saves at 3, 6)",
        ),
        (
            {"decode__checkpoints": [3], "train__save_total_limit": 1},
            "mle.seed1 will have no checkpoint at step 3 (it keeps 6)",
        ),
    ],
)
def test_a_mistake_is_told_before_the_folder_is_begun(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in complaint(tmp_path, load(tmp_path, **changes))


@pytest.mark.parametrize(
    ("pair", "metrics", "said"),
    [
        ("en-cmn", ["bleu"], "test set `t`, en-cmn: unknown language code `cmn`"),
        ("en-zh", ["bleu", "rouge1"], "test set `t`, en-zh: ROUGE: rouge-score keeps only"),
    ],
)
def test_what_cannot_be_scored_is_told_before_training(tmp_path: Path, pair: str, metrics: Any, said: str) -> None:
    (tmp_path / "s").write_text("a dog\na cat\n")
    (tmp_path / "r").write_text("一只狗\n一只猫\n", encoding="utf-8")
    files = {"sources": str(tmp_path / "s"), "references": str(tmp_path / "r")}
    recipe = load(tmp_path, test_sets=[{"name": "t", "pairs": [pair], **files}], score={"metrics": metrics})
    with pytest.raises(UserError) as error:
        run_recipe(recipe, tmp_path / "run")
    assert said in str(error.value) and not (tmp_path / "run").exists()


def test_steps_are_told_from_the_records_where_it_is_certain(tmp_path: Path) -> None:
    # 80 records in batches of 8, 3 epochs: 30 steps, or fewer where records are dropped.
    steps = {"train__save_steps": 4}
    said = complaint(tmp_path, with_file(tmp_path, 80, decode__checkpoints=[31], **steps))
    assert "no checkpoint at step 31 (it takes 30 steps)" in said
    said = complaint(tmp_path, with_file(tmp_path, 80, decode__checkpoints=[9], **steps))
    assert "no checkpoint at step 9 (it saves every 4 steps)" in said
    for possible in ([4, 8], [29], [30]):
        recipe = with_file(tmp_path, 80, decode__checkpoints=possible, **steps)
        runs = [
            (run, pipeline.train_options(recipe, pipeline.RunFolder(tmp_path / "run"), run)) for run in _runs(recipe)
        ]
        pipeline.check_trainings(recipe, runs, pipeline.check_files(recipe), 1)


def _runs(recipe: Recipe) -> Any:
    return pipeline.trained_runs(recipe)


def test_what_the_options_and_packages_tell_is_told_by_a_dry_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    def missing() -> None:
        raise RuntimeError("it is not installed")

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", missing)
    (tmp_path / "eval.json").write_text(json.dumps([{"instruction": "Say it.", "input": "", "output": "it"}]))
    minimum = {"arms__convex__lr_scheduler_type": "cosine_with_min_lr"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data__eval_dataset": str(tmp_path / "eval.json")}, "arm `base`: --eval_dataset without --eval_strategy"),
        ({"arms__convex__report_to": "wandb"}, "arm `convex`: --report_to wandb: it is not installed"),
        (
            minimum,
            "arm `convex`: --lr_scheduler_type cosine_with_min_lr with its --lr_scheduler_kwargs: One of min_lr",
        ),
        (
            {"arms__convex__packing": True, "arms__convex__packing_strategy": "wrapped"},
            "arm `convex`: `packing_strategy='wrapped'` cuts sequences",
        ),
    ]
    for changes, said in cases:
        assert said in complaint(tmp_path, load(tmp_path, **changes))


def test_packages_of_gpus_may_be_missing_where_a_recipe_is_only_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from convexlm import training_checks

    def missing(*args: Any) -> None:
        raise ImportError("it is not installed")

    monkeypatch.setattr("transformers.Trainer.get_optimizer_cls_and_kwargs", missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(training_checks.importlib.util, "find_spec", lambda name: None)
    on_gpus = {"train__bf16": True, "train__use_liger_kernel": True}
    assert make_plan(load(tmp_path, **on_gpus), tmp_path / "run")["train"]
    for told, given in (("--optim adamw", {}), ("--use_liger_kernel", {"train__use_liger_kernel": True})):
        assert told in complaint(tmp_path, load(tmp_path, **given))


def test_test_sets_that_nothing_can_be_said_of_are_told_by_a_dry_run_too(tmp_path: Path) -> None:
    (tmp_path / "x.en").write_text("one\ntwo\n")
    alone = {"name": "alone", "pairs": ["en-de"], "sources": str(tmp_path / "x.en")}
    assert "test set `alone`, en-de: there are no `references`" in complaint(
        tmp_path, load(tmp_path, test_sets=[alone])
    )
    twice = [{"name": name, "kind": "tinyworld", "pairs": ["en-de"], "size": 4, "seed": 5} for name in ("t", "v")]
    given = {"test_sets": twice[:1], "validation_sets": twice[1:], "selection": "validation"}
    assert "validation set `v`, en-de: 4 of its 4 sentence pairs are in the" in complaint(
        tmp_path, load(tmp_path, **given)
    )


def test_all_of_the_evaluation_data_are_read(tmp_path: Path) -> None:
    rows = [{"instruction": "Say it.", "input": "", "output": "it"}, {"instruction": "no output"}]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset": str(tmp_path / "data.json"), "max_records": 1, "eval_dataset": str(tmp_path / "eval.jsonl")}
    assert "eval.jsonl, line 2" in complaint(tmp_path, with_file(tmp_path, 8, data=data, decode__checkpoints="last"))


def test_the_tinyworld_tokenizer_needs_a_corpus(tmp_path: Path) -> None:
    recipe = with_file(tmp_path, 8, model__tokenizer="tinyworld", decode__checkpoints="last")
    assert "`tinyworld` is trained on a generated corpus" in complaint(tmp_path, recipe)


def test_an_arm_cannot_start_from_another_arms_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="arm `mle`: `init_from` needs a whole model, but with `model.use_peft` arm"):
        load(tmp_path, model__use_peft=True)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"temperature": 0.9, "top_p": 0.6},
            "it sets temperature and top_p without sampling; set `do_sample` to true",
        ),
        ({"max_new_tokens": -1}, "not valid, so the model cannot be loaded (`max_new_tokens` must be"),
    ],
)
def test_a_model_that_could_not_be_saved_is_told(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    file = base / "generation_config.json"
    file.write_text(json.dumps(config))
    model = {"model": {"model_name_or_path": str(base), "tokenizer": "x"}, "decode__checkpoints": "last"}
    message = complaint(tmp_path, with_file(tmp_path, 8, **model))
    assert message.startswith(f"{file}: ") and said in message
    # With a padding token it is as it was loaded, when it is saved, and transformers lets that pass.
    for good in ({"temperature": 0.9, "do_sample": True}, {"temperature": 0.9, "pad_token_id": 0}):
        file.write_text(json.dumps(good))
        assert pipeline.check_files(with_file(tmp_path, 8, **model)) == {str(tmp_path / "data.json"): 8}
