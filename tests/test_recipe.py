from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml

from convexlm.errors import UserError
from convexlm.recipe import Recipe, load_recipe
from pipeline_helpers import TINY, recipe_with, write_recipe

if TYPE_CHECKING:
    from pathlib import Path


def load(tmp_path: Path, overrides: list[str] | None = None, **changes: Any) -> Recipe:
    return load_recipe(write_recipe(tmp_path, recipe_with(**changes)), overrides or [])


def complaint(tmp_path: Path, overrides: list[str] | None = None, **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        load(tmp_path, overrides, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_recipe_is_read_and_its_defaults_are_filled(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert [arm.name for arm in recipe.arms] == ["base", "mle", "convex"]
    assert recipe.seeds == (1, 2)
    assert recipe.metrics == ("bleu", "chrf")
    assert recipe.baseline == "mle"
    assert recipe.compare == {"n_samples": 50, "seed": 12345, "baseline": "mle"}
    assert recipe.arm("convex").init_from == "base"
    assert recipe.arm("convex").train["k"] == 1.0
    assert recipe.arm("base").train["max_steps"] == 60 and recipe.arm("mle").train["max_steps"] == 6
    assert not recipe.arm("base").decode


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trian": {}}, "unknown key: `trian`; did you mean `train`?"),
        ({"train__learning_rat": 1.0}, "`train.learning_rat`; did you mean `learning_rate`?"),
        ({"train__output_dir": "x"}, "`train.output_dir`"),
        ({"train__seed": 1}, "`train.seed`"),
        ({"arms__mle__learning_rat": 1.0}, "arm `mle`: unknown option `learning_rat`; did you mean `learning_rate`?"),
        ({"model__model_name_or_pth": "x"}, "key in `model`: `model_name_or_pth`; did you mean `model_name_or_path`?"),
        ({"data__datset": "x"}, "key in `data`: `datset`; did you mean `dataset`?"),
        ({"decode__search": []}, "key in `decode`: `search`; did you mean `searches`?"),
        ({"compare__samples": 1}, "key in `compare`: `samples`; did you mean `n_samples`?"),
        ({"score__metric": []}, "key in `score`: `metric`; did you mean `metrics`?"),
        ({"data__dataset": None}, "`data.dataset` is missing"),
        ({"model": {"tokenizer": "x"}}, "`model` needs `model_name_or_path`"),
        ({"model__model_name_or_path": "x"}, "`model` has `model_name_or_path` and `config`"),
        ({"arms": None}, "`arms` is missing"),
        ({"arms": {}}, "`arms` is missing"),
        ({"arms": {"a b": {"objective": "mle"}}}, "arm 'a b'"),
        ({"arms": {"../x": {"objective": "mle"}}}, "arm '../x'"),
        ({"arms": {"mle": ["objective"]}}, "arm `mle` must be a mapping"),
        ({"arms": {"mle": None}}, "arm `mle`: `objective` is missing"),
        ({"arms__mle__init_from": "convex"}, "arm `mle`: `init_from: convex` names no arm that comes before"),
        ({"arms__mle__init_from": "mle"}, "arm `mle`: `init_from: mle` names no arm that comes before"),
        ({"arms__convex__init_from": "nobody"}, "arm `convex`: `init_from: nobody`"),
        ({"arms__mle__objective": "mel"}, "arm `mle`: "),
        ({"arms__convex__k": 0}, "arm `convex`: "),
        ({"arms__convex__k": -1.5}, "arm `convex`: "),
        ({"arms__convex__k": float("nan")}, "arm `convex`: "),
        ({"arms__convex__k": "one"}, "arm `convex`: "),
        ({"arms__mle__k": 1.0}, "arm `mle`: "),
        ({"train__k": 1.0}, "arm `base`: "),
        ({"arms": {"p": {"objective": "power", "k": 2}}}, "arm `p`: "),
        ({"arms__convex__level": "word"}, "arm `convex`: "),
        ({"seeds": []}, "`seeds`"),
        ({"seeds": [1, 1]}, "`seeds` names a seed twice"),
        ({"seeds": ["a"]}, "`seeds`"),
        ({"seeds": [True]}, "`seeds`"),
        ({"seeds": [-1]}, "`seeds`"),
        ({"seeds": [2**32]}, "`seeds`"),
        ({"seeds": "1"}, "`seeds`"),
        ({"name": "a/b"}, "`name`"),
        ({"name": 7}, "`name`"),
        ({"test_sets": None}, "`test_sets` is missing"),
        ({"test_sets": [{"pairs": ["en-de"]}]}, "`test_sets`"),
        ({"test_sets": ["wmt22"]}, "`test_sets`"),
        ({"test_sets": [{"name": "t", "sources": "x"}]}, "test set `t`: `pairs` is missing"),
        ({"test_sets": [{"name": "t", "pairs": ["ende"], "sources": "x"}]}, "`ende` is no language pair"),
        ({"test_sets": [{"name": "t", "pairs": [{"en": "de"}], "sources": "x"}]}, "no language pair"),
        ({"test_sets": [{"name": "t", "pairs": ["en-de", "en-de"]}]}, "test set `t` has the pair en-de twice"),
        ({"test_sets": [{"name": "a/../b", "pairs": ["en-de"]}]}, "`test_sets`: test set: `name` must be letters"),
        (
            {"test_sets": [{"name": n, "pairs": ["en-de"]} for n in ("a/b", "a_b")]},
            "test set `a_b` has the pair en-de",
        ),
        ({"decode__searches": []}, "`decode.searches`"),
        ({"decode__searches": [4]}, "`decode.searches`"),
        ({"decode__searches": [{"num_beams": 0}]}, "decode.searches: num_beams"),
        ({"decode__searches": [{"beams": 4}]}, "decode.searches: unknown search option `beams`"),
        ({"decode__searches": [{"num_beams": 4}, {"num_beams": 4, "length_penalty": 0.6}]}, "one name (beam4, beam4)"),
        ({"decode__checkpoints": "first"}, "`decode.checkpoints`"),
        ({"decode__checkpoints": []}, "`decode.checkpoints`"),
        ({"decode__checkpoints": [0]}, "`decode.checkpoints`"),
        ({"decode__checkpoints": [3, 3]}, "`decode.checkpoints` names a step twice"),
        ({"decode__batch_size": 0}, "`decode.batch_size`"),
        ({"decode__token_budget": 1.5}, "`decode.token_budget` must be a whole number of at least 1, not 1.5"),
        (
            {"decode__gpu_memory_utilization": 0},
            "`decode.gpu_memory_utilization` must be a number above 0 and at most 1",
        ),
        ({"decode__gpu_memory_utilization": "90%"}, "`decode.gpu_memory_utilization` must be a number above 0"),
        ({"decode__backend": "vlm"}, "`decode.backend`: unknown decoding backend `vlm`"),
        ({"decode__searches": [{"temperature": 0.7}]}, "decode.searches: temperature is for sampling"),
        (
            {"decode__backend": "ctranslate2", "decode__searches": [{"num_beams": 4}]},
            "decode.searches: the ctranslate2",
        ),
        ({"decode__backend": "vllm", "decode__searches": [{"num_beams": 2}]}, "decode.searches: the vllm backend"),
        ({"decode__instruction": "x", "decode__instruction_file": "y"}, "not both"),
        ({"decode__instruction": 5}, "`decode.instruction` must be a text, not 5"),
        # Its folder would be that of arm `mle` under seed 2, and a report would take one for the other.
        ({"arms__mle.seed2": {"objective": "mle"}}, "arm `mle.seed2`: that is what arm `mle` is called"),
        ({"data__template": "alpacca"}, "`data.template`: unknown template `alpacca`"),
        ({"score__metrics": ["blue"]}, "`score.metrics`: unknown metric `blue`"),
        ({"score__metrics": "bleu"}, "`score.metrics` must be a list"),
        ({"score__metrics": ["bleu", "bleu"]}, "`score.metrics` names a metric twice"),
        ({"compare__baseline": "base"}, "`compare.baseline` is `base`, which is no arm that is decoded: mle, convex"),
        ({"compare__n_samples": 0}, "`compare.n_samples`"),
        ({"compare__n_samples": "many"}, "`compare.n_samples`"),
        ({"compare__n_samples": 1_000_001}, "`compare.n_samples` must be at most 1000000"),
        ({"compare__seed": -1}, "`compare.seed`"),
        ({"model": []}, "`model` must be a mapping"),
        ({"train": [1]}, "`train` must be a mapping"),
        ({"vars": [1]}, "`vars` must be a mapping"),
        ({"train__1e3": 1}, "unknown option"),
    ],
)
def test_every_complaint_names_the_file_and_the_key(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    message = complaint(tmp_path, **changes)
    assert message.startswith(f"{tmp_path / 'tiny.yaml'}: ")
    assert said in message


def test_a_test_sets_name_is_what_loading_it_takes(tmp_path: Path) -> None:
    from convexlm.testsets import load_test_set

    for name, in_files in (("wmt14/full", "wmt14_full"), ("a+b", "a+b")):
        spec = {"name": name, "kind": "tinyworld", "pairs": ["en-de"], "size": 2}
        (checked,) = load(tmp_path, test_sets=[spec]).test_sets
        assert load_test_set(checked, "en-de").name == in_files


def test_keys_that_are_no_text_are_refused_and_not_stumbled_over(tmp_path: Path) -> None:
    for section in ("train", "decode", "model"):
        recipe = recipe_with()
        recipe[section][1] = 2
        with pytest.raises(UserError, match="`(train.)?1`"):
            load_recipe(write_recipe(tmp_path, recipe))
    recipe = recipe_with()
    recipe[True] = 2
    with pytest.raises(UserError, match="unknown key: `True`"):
        load_recipe(write_recipe(tmp_path, recipe))


def test_every_arm_undecoded_is_refused(tmp_path: Path) -> None:
    arms = {"mle": {"objective": "mle", "decode": False}}
    assert "nothing to compare" in complaint(tmp_path, arms=arms)


def test_a_search_label_tells_two_searches_apart(tmp_path: Path) -> None:
    searches = [{"num_beams": 4}, {"num_beams": 4, "length_penalty": 0.6, "label": "short"}]
    assert len(load(tmp_path, decode__searches=searches).decode["searches"]) == 2


def test_a_backend_may_be_chosen_for_the_recipe_and_sampling_is_a_search(tmp_path: Path) -> None:
    searches = [{"num_beams": 1}, {"do_sample": True, "temperature": 0.7, "seed": 2}]
    decode = load(tmp_path, decode__backend="auto", decode__searches=searches).decode
    assert (decode["backend"], decode["searches"]) == ("auto", searches)


def test_objective_kwargs_are_checked_with_their_arm(tmp_path: Path) -> None:
    assert load(tmp_path, arms__convex={"objective": "convex", "objective_kwargs": {"k": 2.0}})
    assert "arm `convex`" in complaint(tmp_path, arms__convex={"objective": "convex", "objective_kwargs": {"kk": 2.0}})


def test_numbers_are_numbers_however_yaml_writes_them(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("learning_rate: 0.01", "learning_rate: 1e-3"))
    assert load_recipe(path).arms[0].train["learning_rate"] == 0.001
    recipe = load_recipe(path, ["train.learning_rate=2E-5", "arms.convex.k=+1e0", "description=1e-5x"])
    assert recipe.arms[0].train["learning_rate"] == 2e-5
    assert recipe.arm("convex").train["k"] == 1.0
    assert recipe.resolved["description"] == "1e-5x"


def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("name: a\narms:\n  mle: {objective: mle}\n  mle: {objective: convex}\n")
    with pytest.raises(UserError, match=r"twice.yaml, line 4: .*`mle` is given twice"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [", "line 1"),
        ("a: b\n\tc: d\n", "line 2"),
        ("- a\n- b\n", "expected a YAML mapping"),
        ("", "expected a YAML mapping"),
        ("name: !!python/object/apply:os.system [ls]\n", "line 1"),
        ("name: 2024-13-45\n", "not valid YAML"),
        ("name: \x01\n", "not valid YAML"),
    ],
)
def test_what_is_no_yaml_mapping_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as error:
        load_recipe(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml: no such file"):
        load_recipe(tmp_path / "nothing.yaml")


# -- extends


def test_extends_merges_sections_and_replaces_arms(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    child = {"extends": "tiny.yaml", "train": {"max_steps": 9}, "arms": {"only": {"objective": "mle"}}, "seeds": [7]}
    recipe = load_recipe(write_recipe(tmp_path, child, "child.yaml"))
    assert recipe.name == "child"
    assert [arm.name for arm in recipe.arms] == ["only"]
    assert recipe.arms[0].train["max_steps"] == 9 and recipe.arms[0].train["save_steps"] == 3
    assert recipe.seeds == (7,)
    assert recipe.baseline == "only"
    assert "extends" not in recipe.resolved
    assert load_recipe(tmp_path / "tiny.yaml").arms[0].train["max_steps"] == TINY["arms"]["base"]["max_steps"]


def test_extends_goes_over_several_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_recipe(tmp_path)
    write_recipe(tmp_path / "sub", {"extends": "../tiny.yaml", "seeds": [5]}, "b.yaml")
    recipe = load_recipe(write_recipe(tmp_path, {"extends": "sub/b.yaml", "name": "c"}, "c.yaml"))
    assert (recipe.name, recipe.seeds) == ("c", (5,))


@pytest.mark.parametrize("chain", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_a_circle_is_refused(tmp_path: Path, chain: list[str]) -> None:
    for name, parent in zip(chain, [*chain[1:], chain[0]], strict=True):
        write_recipe(tmp_path, {"extends": f"{parent}.yaml"}, f"{name}.yaml")
    with pytest.raises(UserError, match="`extends` goes in a circle"):
        load_recipe(tmp_path / "a.yaml")


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nobody\.yaml: no such file"):
        load_recipe(write_recipe(tmp_path, {"extends": "nobody.yaml"}))


# -- variables


def test_variables_are_put_in_everywhere_and_can_be_set(tmp_path: Path) -> None:
    recipe = recipe_with(vars={"where": "/data", "n": 3}, data={"dataset": "${where}/a${n}.json"})
    recipe["test_sets"] = [{"name": "t", "pairs": ["en-de"], "sources": ["${where}/x.{pair}"]}]
    path = write_recipe(tmp_path, recipe)
    assert load_recipe(path).data["dataset"] == "/data/a3.json"
    assert load_recipe(path).test_sets[0]["sources"] == ["/data/x.{pair}"]
    assert load_recipe(path, ["vars.where=/else"]).data["dataset"] == "/else/a3.json"


def test_an_unknown_variable_is_named(tmp_path: Path) -> None:
    message = complaint(tmp_path, data={"dataset": "${wher}/x"}, vars={"where": "x"})
    assert message == f"{tmp_path / 'tiny.yaml'}: `${{wher}}` is not in `vars` (where)"


def test_a_child_sets_its_parents_variable(tmp_path: Path) -> None:
    write_recipe(tmp_path, recipe_with(vars={"d": "old"}, data={"dataset": "${d}.json"}))
    child = write_recipe(tmp_path, {"extends": "tiny.yaml", "vars": {"d": "new"}}, "child.yaml")
    assert load_recipe(child).data["dataset"] == "new.json"


# -- --set


def test_overrides_are_yaml_values_at_dotted_keys(tmp_path: Path) -> None:
    words = ["train.max_steps=3", "seeds=[4, 5]", "arms.convex.k=2", "data.template=", "train.report_to=a=b"]
    with pytest.raises(UserError, match=r"data\.template"):
        load(tmp_path, words)
    recipe = load(tmp_path, [word for word in words if "template" not in word])
    assert recipe.arm("mle").train["max_steps"] == 3 and recipe.seeds == (4, 5)
    assert recipe.arm("convex").train["k"] == 2
    assert recipe.arm("convex").train["report_to"] == "a=b"
    assert load(tmp_path, ["score.metrics=[bleu]"]).metrics == ("bleu",)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.max_steps", "expected dotted.key=value"),
        ("=3", "expected dotted.key=value"),
        ("seeds.first=3", "`seeds` is no mapping"),
        ("name.first=3", "`name` is no mapping"),
        ("seeds=[1", "not valid YAML"),
        ("train.max_stpes=3", "`train.max_stpes`; did you mean `max_steps`?"),
        ("tarin.max_steps=3", "`tarin`; did you mean `train`?"),
        ("arms.convex.k=0", "arm `convex`"),
        ("train..max_steps=3", "unknown"),
    ],
)
def test_bad_overrides_are_refused(tmp_path: Path, word: str, said: str) -> None:
    assert said in complaint(tmp_path, [word])


def test_the_resolved_recipe_is_plain_yaml_and_loads_again(tmp_path: Path) -> None:
    recipe = load(tmp_path, vars={"x": "1"})
    again = write_recipe(tmp_path, yaml.safe_load(yaml.safe_dump(recipe.resolved)), "again.yaml")
    assert load_recipe(again).resolved == recipe.resolved


DEV = [{"name": "dev", "kind": "tinyworld", "pairs": ["en-de"], "size": 4}]


def test_a_selection_is_resolved_and_leaves_older_run_folders_alone(tmp_path: Path) -> None:
    plain = load_recipe(write_recipe(tmp_path, recipe_with()))
    assert plain.selection == {"on": "last"} and plain.validation_sets == ()
    assert "selection" not in plain.resolved and "validation_sets" not in plain.resolved
    short = load_recipe(write_recipe(tmp_path, recipe_with(selection="validation", validation_sets=DEV)))
    assert short.selection == {"on": "validation", "metric": "bleu", "search": "greedy"}
    path = write_recipe(tmp_path, recipe_with(validation_sets=DEV))
    path.write_text(path.read_text() + "selection: {on: validation, metric: chrf, search: beam2}\n")
    assert load_recipe(path).selection == {"on": "validation", "metric": "chrf", "search": "beam2"}
    test = load_recipe(write_recipe(tmp_path, recipe_with(selection="test")))
    assert test.selection == test.resolved["selection"] == {"on": "test", "metric": "bleu", "search": "greedy"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"selection": "best"}, "`selection` is last, validation, test"),
        ({"selection": {"metric": "bleu"}}, "`selection` is last, validation, test"),
        ({"selection": "validation"}, "needs `validation_sets`"),
        ({"validation_sets": DEV}, "are not read with `selection: last`"),
        ({"selection": "test", "validation_sets": DEV}, "are not read with `selection: test`"),
        ({"selection": {"on": "test", "k": 1}}, "unknown key in `selection`: `k`"),
        ({"selection": {"on": "last", "metric": "bleu"}}, "say nothing where the last"),
        ({"selection": {"on": "test", "metric": "ter"}}, "`score.metrics` has: bleu, chrf"),
        ({"selection": {"on": "test", "search": "beam9"}}, "`decode.searches` has: greedy, beam2"),
        ({"selection": "test", "decode__checkpoints": "last"}, "chooses among `decode.checkpoints`"),
        (
            {"selection": "validation", "validation_sets": [{"name": "toy", "kind": "tinyworld", "pairs": ["en-de"]}]},
            "test set `toy` has the pair en-de twice",
        ),
    ],
)
def test_a_selection_that_cannot_be_meant_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(write_recipe(tmp_path, recipe_with(**changes)))
    assert said in str(error.value) and "tiny.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"train__hub_token": "mine"}, "train.hub_token"),
        ({"arms__convex__hub_token": "x"}, "arms.convex.hub_token"),
        ({"description": "with hf_abcdefghijklmnop"}, "description"),
        ({"data__dataset": "https://me:word@example.org/data.json"}, "data.dataset"),
        ({"plugins": ["hf_abcdefghijklmnop"]}, "plugins"),
    ],
)
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(tmp_path: Path, changes: dict[str, Any], where: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(write_recipe(tmp_path, recipe_with(**changes)))
    assert f"`{where}` is a secret" in str(error.value)
    assert "abcdefgh" not in str(error.value) and "word" not in str(error.value)


def test_words_of_the_trade_are_no_secrets(tmp_path: Path) -> None:
    said = "token: a piece of a word; the secret of a good key"
    recipe = load_recipe(write_recipe(tmp_path, recipe_with(description=said, train__hub_token=None)))
    assert recipe.resolved["description"] == said


def test_a_recipe_writes_into_its_run_folder_only(tmp_path: Path) -> None:
    for changes in ({"data__dataset_cache_dir": "/etc"}, {"name": "../x"}, {"train__output_dir": "/tmp/x"}):
        with pytest.raises(UserError):
            load_recipe(write_recipe(tmp_path, recipe_with(**changes)))
