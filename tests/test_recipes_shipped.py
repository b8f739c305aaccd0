"""Every recipe that comes with the project: that it loads, says what it should, and can be planned offline.

What needs the hub (weights, data sets by name, sacreBLEU's test sets) is not fetched: a dry run does not ask for it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from convexlm.errors import UserError
from convexlm.plan import make_plan
from convexlm.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]
PAPER = ["llama-7b-mle", "llama-7b-convex", "llama-13b-mle", "llama-13b-convex"]
TODAY = ["qwen3-8b-mle", "qwen3-8b-convex", "llama-3.1-8b-mle", "llama-3.1-8b-convex"]
ONE_CARD = ["llama-7b-convex-lora", "llama-7b-convex-qlora"]
PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-3.1": 8_030_261_248,
    "qwen3": 8_190_735_360,
}


def path_of(name: str) -> Path:
    return next(path for path in RECIPES if path.stem == name)


@functools.cache
def planned(name: str, *overrides: str, processes: int | None = None) -> dict[str, Any]:
    words = [*overrides, *([f"launch.num_processes={processes}"] if processes else [])]
    return make_plan(load_recipe(path_of(name), words), "runs/nowhere")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_the_recipes_that_are_promised_are_there() -> None:
    assert {*PAPER, *TODAY, *ONE_CARD, "summarization-cnn-dailymail", "demo", "smoke-wmt22"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_loads_and_has_its_files_name(name: str) -> None:
    recipe = load_recipe(path_of(name))
    assert recipe.name == name
    assert recipe.baseline in [arm.name for arm in recipe.arms]
    text = path_of(name).read_text()
    assert f"convexlm run recipes/{name}.yaml" in text or name == "demo"
    assert text.startswith("# ") and max(map(len, text.split("\n"))) <= 125


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(name: str) -> None:
    """Against shared/reference/paper.md, section 1.4, and its script's decoding."""
    recipe = load_recipe(path_of(name))
    train = recipe.resolved["train"]
    assert (train["learning_rate"], train["lr_scheduler_type"], train["warmup_steps"]) == (2e-5, "cosine", 0.03)
    assert (train["num_train_epochs"], train["weight_decay"], train["max_length"]) == (3, 0.0, 768)
    assert (train["global_batch_size"], train["per_device_train_batch_size"], train["save_steps"]) == (128, 1, 200)
    assert not train.get("packing") and recipe.seeds == (1,)
    (search,) = recipe.decode["searches"]
    wanted = {"num_beams": 4, "no_repeat_ngram_size": 12, "max_new_tokens": 256, "length_penalty": 1.0}
    assert search == wanted
    assert recipe.decode["instruction"] == "Translate the following sentences from [SRC] to [TGT]."
    if "convex" in name:
        convex = recipe.arm("convex").train
        assert (convex["objective"], convex["k"], convex["length_weighting"]) == ("convex", 1.0, "sequence")


@pytest.mark.parametrize("name", [name for name in NAMES if "convex" in name])
def test_arms_differ_in_the_objective_alone(name: str) -> None:
    recipe = load_recipe(path_of(name))
    convex, mle = recipe.arm("convex").train, recipe.arm("mle").train
    assert {key for key in {*convex, *mle} if convex.get(key) != mle.get(key)} == {"objective", "k"}
    assert mle["length_weighting"] == "sequence"  # the reference's, at one row a device


@pytest.mark.parametrize(("processes", "accumulated"), [(4, 32), (8, 16), (32, 4)])
def test_the_batch_is_the_papers_on_any_number_of_processes(processes: int, accumulated: int) -> None:
    plan = planned("llama-7b-mle", processes=processes)
    (train,) = plan["train"]
    assert train["global_batch"] == 128 and train["steps"] == 1221
    assert train["batch"] == f"1 x {accumulated} accumulated x {processes} processes"


@pytest.mark.parametrize("name", [*PAPER, *TODAY, *ONE_CARD])
def test_a_dry_run_knows_the_memory_without_the_hub(name: str) -> None:
    plan = planned(name)
    for train in plan["train"]:
        memory = train["memory"]
        assert memory is not None, train["memory_note"]
        base = next(count for prefix, count in PARAMETERS.items() if name.startswith(prefix))
        assert memory["parameters"] - (memory["trainable"] if name in ONE_CARD else 0) == base
        assert (train["global_batch"], train["steps"]) == (128, 1221)
        assert memory["device"] == "cuda" and train["disk"]["most"] > 0


@pytest.mark.parametrize("name", ONE_CARD)
def test_one_24_gb_card_is_enough(name: str) -> None:
    for train in planned(name)["train"]:
        assert train["memory"]["total"] < 0.9 * 24e9
        assert train["memory"]["trainable"] < 0.01 * train["memory"]["parameters"]


@pytest.mark.parametrize("sharding", ["fsdp2", "zero3", "zero3_offload"])
def test_eight_80_gb_cards_are_enough_for_13b(sharding: str) -> None:
    for train in planned("llama-13b-mle", f"launch.accelerate_config={sharding}")["train"]:
        assert train["memory"]["sharding"] == sharding
        assert train["memory"]["total"] < 0.9 * 80e9


@pytest.mark.parametrize("name", TODAY)
def test_chat_templates(name: str) -> None:
    assert load_recipe(path_of(name)).data["template"] == "chat"


def test_summarization_on_real_articles(shared_data: Path) -> None:
    file = shared_data / "summarization" / "cnn_dm_train_sample_100.zip"
    plan = planned("summarization-cnn-dailymail", f"vars.cnn_dm={file}")
    assert (plan["decode_jobs"], plan["decode_sentences"]) == (2, 200)
    assert plan["score"]["metrics"] == ["rouge1", "rouge2", "rougeLsum"]


def test_summarization_without_its_file_is_one_line() -> None:
    with pytest.raises(UserError, match="test.csv: no such file"):
        planned("summarization-cnn-dailymail")
