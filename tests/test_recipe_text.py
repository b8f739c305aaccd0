"""`vars`, `--set` and what a run folder keeps of a recipe: what is written is what arrives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from convexlm.errors import UserError
from convexlm.options import dump_yaml, parse_yaml
from convexlm.recipe import Recipe, load_recipe
from convexlm.runs import RunFolder, trained_runs
from pipeline_helpers import recipe_with, write_recipe

if TYPE_CHECKING:
    from pathlib import Path


def load(tmp_path: Path, *words: str, text: str = "", **changes: Any) -> Recipe:
    """The tiny recipe with changes, more YAML behind it, and `--set` words."""
    path = write_recipe(tmp_path, recipe_with(**changes))
    path.write_text(path.read_text() + text)
    return load_recipe(path, words)


def complaint(tmp_path: Path, *words: str, text: str = "", **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        load(tmp_path, *words, text=text, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- variables


@pytest.mark.parametrize("text", ["1.10", "no", "007", "", "a: b", "[x", "1e-3", " x", "null"])
def test_a_variable_that_is_set_is_taken_as_it_stands(tmp_path: Path, text: str) -> None:
    recipe = load(tmp_path, f"vars.v={text}", vars={"v": "x"}, description="a ${v} b")
    assert recipe.resolved["description"] == f"a {text} b" and recipe.resolved["vars"] == {"v": text}
    assert load(tmp_path, f"vars.v={text}", vars={"v": "x"}, description="${v}").resolved["description"] == text


def test_a_variable_alone_in_a_value_keeps_its_type(tmp_path: Path) -> None:
    given = {"yes": True, "no": False, "rate": 1e-4, "steps": 9, "pairs": ["en-de"], "extra": {"k": 2.0}}
    changes: dict[str, Any] = {
        **{"vars": given, "train__learning_rate": "${rate}", "train__max_steps": "${steps}"},
        **{"train__gradient_checkpointing": "${no}", "arms__convex__decode": "${yes}"},
        **{"arms__base__decode": "${no}", "description": "${steps} steps"},
    }
    recipe = load(tmp_path, **changes)
    train = recipe.arm("mle").train
    assert (train["learning_rate"], train["max_steps"], train["gradient_checkpointing"]) == (1e-4, 9, False)
    assert recipe.arm("convex").decode is True and recipe.arm("base").decode is False
    assert recipe.resolved["description"] == "9 steps"
    train = load(tmp_path, "vars.rate=2e-4", "vars.steps=4", "vars.no=true", **changes).arm("mle").train
    assert (train["learning_rate"], train["max_steps"], train["gradient_checkpointing"]) == (2e-4, 4, True)
    assert "`train.max_steps` must be a whole number, not 'few'" in complaint(tmp_path, "vars.steps=few", **changes)


def test_variables_may_use_others_in_any_order(tmp_path: Path) -> None:
    given = {"file": "${dir}/x", "dir": "${root}/d", "root": "/data", "all": ["${file}"]}
    recipe = load(tmp_path, vars=given, data={"dataset": "${file}.json"})
    assert recipe.data["dataset"] == "/data/d/x.json"
    assert recipe.resolved["vars"] == {"file": "/data/d/x", "dir": "/data/d", "root": "/data", "all": ["/data/d/x"]}
    assert load(tmp_path, "vars.root=/e", vars=given, data={"dataset": "${file}"}).data["dataset"] == "/e/d/x"


@pytest.mark.parametrize(
    ("given", "value", "said"),
    [
        ({"v": 1.1}, "a ${v}", "`vars.v` is a number (1.1), but stands within a longer text; quote it in `vars`"),
        ({"v": False}, "${v}x", "`vars.v` is true or false (False), but stands within a longer text; quote it"),
        ({"v": ["x"]}, "a ${v}", "`vars.v` is a list (['x']), but stands within a longer text"),
        ({"v": None}, "x", "`vars.v` has no value"),
        ({"a": "${b}", "b": "${c}", "c": "x${b}"}, "x", "`vars` go in a circle: b -> c -> b"),
        ({"a": "${a}"}, "x", "`vars` go in a circle: a -> a"),
        ({"a": "${nobody}"}, "x", "`vars.a`: `${nobody}` is not in `vars` (a)"),
        ({"a": "x"}, "in ${a-b}", "`${a-b}` names no variable"),
        ({"a": "x"}, "${a} and ${ a }", "`${ a }` names no variable"),
        ({"a": "x"}, "${a", "`${a` names no variable"),
    ],
)
def test_variables_that_cannot_be_meant_are_refused(tmp_path: Path, given: Any, value: str, said: str) -> None:
    message = complaint(tmp_path, vars=given, description=value)
    assert message.startswith(f"{tmp_path / 'tiny.yaml'}: ") and said in message


def test_a_number_that_yaml_reads_as_another_is_refused(tmp_path: Path) -> None:
    for written, read in (("007", 7), ("0x1F", 31), ("1_000", 1000)):
        said = complaint(tmp_path, text=f"vars: {{n: {written}}}\n")
        assert f"`vars.n` is written {written}, which YAML reads as {read}; quote it" in said
    assert load(tmp_path, text="vars: {n: '007'}\n", description="${n}").resolved["description"] == "007"


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    """In YAML 1.1 the first is 64, the second -8, and the others are 750 and 90.5."""
    assert parse_yaml("[0100, -010, 12:30, 1:30.5, 0x1F, 1_000]", "") == [100, -10, "12:30", "1:30.5", 31, 1000]
    assert load(tmp_path, "train.max_steps=010").resolved["train"]["max_steps"] == 10
    assert load(tmp_path, "seeds=[010]").resolved["seeds"] == [10]
    for word in ("train.max_steps=12:30", "seeds=[12:30]", "compare.n_samples=12:30"):
        assert "12:30" in complaint(tmp_path, word)


@pytest.mark.parametrize("extends", ['"good.yaml\\0"', "[a]", "3", "''"])
def test_what_is_no_file_name_cannot_be_extended(tmp_path: Path, extends: str) -> None:
    assert "`extends` must be the name of a recipe's file" in complaint(tmp_path, text=f"extends: {extends}\n")


# -- --set


def test_an_arm_with_dots_in_its_name_can_be_set(tmp_path: Path) -> None:
    arms = {name: {"objective": "convex", "k": 1.0} for name in ("convex-k0", "convex-k0.5", "convex-k0.5.x")}
    recipe = load(tmp_path, "arms.convex-k0.5.learning_rate=1e-4", "arms.convex-k0.5.x.k=2", arms=arms)
    assert [arm.train["learning_rate"] for arm in recipe.arms] == [0.01, 1e-4, 0.01]
    assert [arm.train["k"] for arm in recipe.arms] == [1.0, 1.0, 2]


def test_extends_cannot_be_set(tmp_path: Path) -> None:
    assert "--set extends=nosuch.yaml: what a recipe extends" in complaint(tmp_path, "extends=nosuch.yaml")


def test_a_key_that_ends_in_a_dot_is_refused(tmp_path: Path) -> None:
    assert "unknown option `train.`" in complaint(tmp_path, "train.=3")


# -- in and out of a run folder


def test_one_seed_without_brackets_is_a_list_of_one(tmp_path: Path) -> None:
    recipe, folder = load(tmp_path, seeds=1), RunFolder(tmp_path / "run")
    folder.claim(recipe)
    assert folder.check(load(tmp_path, seeds=1)) and folder.check(load(tmp_path, seeds=[1]))
    # As recipes of one seed were kept before.
    folder.recipe.write_text(folder.recipe.read_text().replace("seeds:\n- 1\n", "seeds: 1\n"))
    assert "seeds: 1\n" in folder.recipe.read_text()
    assert folder.check(load(tmp_path, seeds=1))
    more = folder.continued(load(tmp_path, seeds=[1, 2]))
    assert [run.name for run in trained_runs(more)][0] == "base" and not folder.check(more)


def test_names_that_look_like_numbers_stay_names(tmp_path: Path) -> None:
    text = "arms:\n  '1e-4': {objective: mle}\n  '2E5': {objective: dft}\n"
    folder = RunFolder(tmp_path / "run")
    folder.claim(load(tmp_path, text=text, arms=None))
    recipe = load(tmp_path, text=text, arms=None)
    assert folder.check(recipe) and [arm.name for arm in recipe.arms] == ["1e-4", "2E5"]
    value = {"1e-4": ["1e5", 1e-5, "x", "+1e3", 3], "no": "007"}
    assert parse_yaml(dump_yaml(value), "here") == value


def test_a_run_folders_recipe_begins_another_run(tmp_path: Path) -> None:
    folder, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "other")
    folder.claim(load(tmp_path, seeds=[7], vars={"r": "/d", "f": "${r}/x"}, description="${f}"))
    more = load(tmp_path, seeds=[3, 7], description="/d/x")
    folder.claim(more)
    assert "plain_seed: 7" in folder.recipe.read_text() and "versions:" in folder.recipe.read_text()
    again = load_recipe(folder.recipe)
    other.claim(again)
    assert other.check(more) and folder.check(again) and "plain_seed" not in other.recipe.read_text()


# -- YAML


def test_merged_keys_may_be_given_anew(tmp_path: Path) -> None:
    text = """
vars: {deep: {y: &b {<<: &a {objective: convex, k: 1.0}, k: 2.0}}}
arms: {mle: {objective: mle}, c: {<<: *b}, d: {<<: [*b, *a], k: 3.0}}
"""
    recipe = load(tmp_path, text=text, arms=None)
    assert [arm.train.get("k") for arm in recipe.arms] == [None, 2.0, 3.0]
    assert parse_yaml("[&a {k: 1}, &b {k: 2, l: 2}, {<<: [*a, *b], l: 3}, {l: 0, <<: *b}]", "here")[2:] == [
        {"k": 1, "l": 3},
        {"k": 2, "l": 0},
    ]
    assert "merges a mapping or a list of them" in complaint(tmp_path, text="\nvars: {<<: 3}\n")
    twice = "\nvars: {a: &a {k: 1.0}, b: {<<: *a, k: 2.0, k: 3.0}}\n"
    assert "the key `k` is given twice" in complaint(tmp_path, text=twice)


@pytest.mark.parametrize("text", ["description: &d [*d]\n", "description: &d {a: [1, *d]}\n"])
def test_an_alias_within_itself_is_refused(tmp_path: Path, text: str) -> None:
    assert "not valid YAML (the alias *d stands within what it names)" in complaint(tmp_path, text=text)
    assert parse_yaml("[&d [1], *d, {a: *d}]", "here") == [[1], [1], {"a": [1]}]
