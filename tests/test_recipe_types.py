"""Values of a recipe that are of another type than their options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from convexlm.errors import UserError
from convexlm.recipe import Recipe, load_recipe
from pipeline_helpers import TINY, recipe_with, write_recipe

if TYPE_CHECKING:
    from pathlib import Path


def load(tmp_path: Path, **changes: Any) -> Recipe:
    return load_recipe(write_recipe(tmp_path, recipe_with(**changes)))


def complaint(tmp_path: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        load(tmp_path, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__packing": "false"}, "`train.packing` must be true or false, not 'false'; leave the quotes out"),
        ({"train__packing": 0}, "`train.packing` must be true or false, not 0"),
        ({"train__max_steps": True}, "`train.max_steps` must be a whole number, not True"),
        ({"train__max_steps": "2"}, "`train.max_steps` must be a whole number, not '2'; leave the quotes out"),
        ({"train__max_steps": 2.5}, "`train.max_steps` must be a whole number, not 2.5"),
        ({"train__max_steps": [2]}, "`train.max_steps` must be a whole number, not [2]"),
        (
            {"train__learning_rate": "0.001"},
            "`train.learning_rate` must be a number, not '0.001'; leave the quotes out",
        ),
        ({"train__weight_decay": "0.01"}, "`train.weight_decay` must be a number"),
        ({"train__max_grad_norm": "1.0"}, "`train.max_grad_norm` must be a number"),
        ({"train__global_batch_size": "8"}, "`train.global_batch_size` must be a whole number"),
        ({"train__lr_scheduler_type": 3}, "`train.lr_scheduler_type` must be a text, not 3"),
        ({"train__lr_scheduler_kwargs": "{"}, "must be a mapping (this is not valid JSON), not '{'"),
        ({"model__use_peft": "False"}, "`model.use_peft` must be true or false, not 'False'; leave the quotes out"),
        ({"model__config": "llama"}, "`model.config` must be a mapping, not 'llama'"),
        ({"data__max_records": "10"}, "`data.max_records` must be a whole number, not '10'"),
        ({"data__dataset": 7}, "`data.dataset` must be a text or a mapping, not 7"),
        ({"data__eval_dataset": {"kind": "tinyworld"}}, "`data.eval_dataset` must be a text, not {'kind'"),
        ({"arms__mle__decode": "False"}, "arm `mle`: `decode` must be true or false, not 'False'"),
        ({"arms__mle__decode": None, "arms__mle__k_warmup": True}, "arm `mle`: `k_warmup` must be a number, not True"),
        ({"arms__convex__k": "1.0"}, "arm `convex`: `k` must be a number, not '1.0'; leave the quotes out"),
        ({"arms__mle__objective_kwargs": [1, 2]}, "arm `mle`: `objective_kwargs` must be a mapping, not [1, 2]"),
        ({"arms__mle__objective_kwargs": "[1, 2]"}, "arm `mle`: `objective_kwargs` must be a mapping, not '[1, 2]'"),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_type(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    message = complaint(tmp_path, **changes)
    assert message.startswith(f"{tmp_path / 'tiny.yaml'}: ") and said in message


def test_values_that_options_take_in_several_forms_stay_as_they_are(tmp_path: Path) -> None:
    train = {
        **TINY["train"],
        **{"learning_rate": 1, "num_train_epochs": 3, "warmup_steps": 0.1, "max_length": None, "bf16": None},
        **{"save_strategy": "steps", "eval_strategy": False, "logging_steps": 0.5, "report_to": ["none"]},
        **{"lr_scheduler_kwargs": '{"a": 1}', "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        **{"deepspeed": "zero.json", "pad_to_multiple_of": "auto", "include_num_input_tokens_seen": "no"},
    }
    model = {**TINY["model"], "lora_target_modules": "all-linear"}
    arm = {"objective": "convex", "objective_kwargs": '{"k": 2.0}'}
    recipe = load(tmp_path, train=train, model=model, arms__convex=arm)
    assert recipe.resolved["train"] == train and recipe.arm("convex").train["objective_kwargs"] == '{"k": 2.0}'
    assert "arm `convex`" in complaint(tmp_path, arms__convex={**arm, "objective_kwargs": '{"k": 0}'})
