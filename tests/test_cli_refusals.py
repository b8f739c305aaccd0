"""Bad input on the command line: one line, exit code 2, and nothing written over."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from cli_helpers import offline, refused
from convexlm import cli
from pipeline_helpers import recipe_with, snapshot, write_recipe

if TYPE_CHECKING:
    from pathlib import Path

GOOD = {"instruction": "Translate.", "input": "a dog", "output": "ein Hund"}
DATA = [
    (None, "no such file"),
    ("", "empty"),
    (json.dumps(GOOD) + '\n{"instruction": \n', "line 2"),
    (json.dumps(GOOD) + '\n{"instruction": "Translate.", "input": "a cat"}\n', "line 2: no output"),
    (json.dumps(GOOD) + '\n{"instruction": "Translate.", "output": ""}\n', "line 2: no output"),
    (json.dumps(GOOD) + '\n{"instruction": "Translate.", "output": null}\n', "line 2: no output"),
    ("[]", ""),
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Any:
    yield from offline(monkeypatch)


# -- train


@pytest.fixture
def training(tmp_path: Path) -> list[Any]:
    """The words of a `convexlm train` that would succeed."""
    from convexlm.tinyworld.tokenizer import train_tokenizer

    train_tokenizer(["a dog", "ein Hund"], vocab_size=300).save_pretrained(tmp_path / "tokenizer")
    config = recipe_with()["model"]["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "data.jsonl").write_text(json.dumps(GOOD) + "\n")
    words = ["train", "--dataset", tmp_path / "data.jsonl", "--config_name", tmp_path / "config.json"]
    words += ["--tokenizer_name", tmp_path / "tokenizer", "--output_dir", tmp_path / "out", "--report_to", "none"]
    return [*words, "--use_cpu", "true", "--max_steps", "1", "--objective", "mle"]


@pytest.mark.parametrize(("content", "said"), DATA)
def test_train_refuses_data_it_cannot_use(
    training: list[Any], tmp_path: Path, content: str | None, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.unlink()
    if content is not None:
        data.write_text(content)
    line = refused(training, capfd)
    assert str(data) in line and said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--template", "alpacca"], "unknown template `alpacca`"),
        (["--objective", "convx"], "convx"),
        (["--objectve", "mle"], "unknown option --objectve; did you mean `--objective`?"),
        (["--objective", "convex", "--k", "0"], "k"),
        (["--objective", "convex", "--k", "-1"], "k"),
        (["--objective", "convex", "--k", "nan"], "k"),
        (["--objective", "power", "--k", "1.5"], "k"),
        (["--objective", "mle", "--k", "1"], "k"),
        (["--max_records", "0"], "--max_records must be at least 1"),
        (["--max_length", "0"], "--max_length"),
        (["--learning_rate", "fast"], "--learning_rate"),
        (["--optim", "addam"], "addam"),
        (["--max_length", "5"], "max_length 5 is filled by the prompt in all 1 records"),
        (["--config_name", "nothing.json"], "nothing.json"),
    ],
)
def test_train_refuses_options_it_cannot_use(
    training: list[Any], tmp_path: Path, words: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert said in refused([*training, *words], capfd)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_train_refuses_a_folder_with_checkpoints(
    training: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-5" / "convexlm.json").write_text("{}")
    before = snapshot(tmp_path / "out")
    assert "holds checkpoints already; give --resume" in refused(training, capfd)
    assert snapshot(tmp_path / "out") == before


def test_train_refuses_a_checkpoint_folder_that_is_none(
    training: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    words = [*training, "--model_name_or_path", tmp_path / "empty"]
    start = words.index("--config_name")
    del words[start : start + 2]
    assert "no model there (config.json is missing)" in refused(words, capfd)


def test_a_prompt_that_fills_max_length_is_counted_and_named(
    training: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    long = {**GOOD, "input": "a dog " * 100}
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (GOOD, long, GOOD, long)))
    capfd.readouterr()
    assert cli.main([*map(str, training), "--max_length", "64", "--logging_steps", "1", "--json"]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert len(result["dropped"]) == 2 and result["records"] == 2
    assert "2 records dropped, for their prompts alone fill max_length=64" in err
    assert all(name in err for name in result["dropped"])
    logged = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert "NaN" not in logged and "nan" not in logged


# -- decode and score


@pytest.fixture
def decoding(tmp_path: Path) -> list[Any]:
    (tmp_path / "sources.txt").write_text("a\nb\n")
    return [
        *("decode", "--sources", tmp_path / "sources.txt", "--pair", "en-de"),
        *("--output_file", tmp_path / "out.jsonl", "--model_name_or_path"),
    ]


def test_decode_refuses_a_checkpoint_folder_that_is_none(
    decoding: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused([*decoding, tmp_path / "empty"], capfd)
    assert "sources.txt" in refused([*decoding, tmp_path / "sources.txt"], capfd)
    assert "no-such-folder" in refused([*decoding, tmp_path / "no-such-folder"], capfd)
    assert not (tmp_path / "out.jsonl").exists()


def test_score_refuses_files_of_different_length(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hyp").write_text("a\nb\n")
    (tmp_path / "ref").write_text("a\nb\nc\n")
    words = ["score", "--hypotheses", tmp_path / "hyp", "--references", tmp_path / "ref", "--target_lang", "de"]
    line = refused(words, capfd)
    assert "2 lines" in line and "3" in line


# -- run and demo


@pytest.mark.parametrize(("content", "said"), DATA[:-1])
def test_run_refuses_data_before_it_makes_anything(
    tmp_path: Path, content: str | None, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content)
    recipe = write_recipe(tmp_path, recipe_with(data={"dataset": str(data)}))
    for words in ([], ["--dry_run"]):
        line = refused(["run", recipe, "--run_dir", tmp_path / "run", *words], capfd)
        assert str(data) in line and said in line
        assert not (tmp_path / "run").exists()


def test_run_refuses_recipes_and_test_sets_before_it_makes_anything(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.en-de.en").write_text("a\nb\n")
    (tmp_path / "t.en-de.de").write_text("a\nb\nc\n")
    (tmp_path / "empty").write_text("")
    (tmp_path / "folder").mkdir()
    files = {"name": "t", "sources": str(tmp_path / "t.{pair}.{src}"), "references": str(tmp_path / "t.{pair}.{tgt}")}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"test_sets": [{**files, "pairs": ["en-de"]}]}, "has 2 lines but"),
        ({"test_sets": [{**files, "pairs": ["de-en"]}]}, "test set `t` has no pair `de-en`"),
        ({"test_sets": [{"name": "toy", "kind": "tinyworld", "pairs": ["en-fr"]}]}, "has no pair `en-fr`"),
        ({"test_sets": [{**files, "pairs": ["en-de"], "references": None}]}, "no `references`"),
        ({"test_sets": [{**files, "pairs": ["en-de"], "sources": str(tmp_path / "empty")}]}, "empty"),
        ({"test_sets": [{**files, "pairs": ["en-de"], "kind": "file"}]}, "unknown kind `file`"),
        ({"decode__instruction_file": str(tmp_path / "empty")}, "empty"),
        ({"decode__instruction_file": "nothing.txt"}, "nothing.txt: no such file"),
        ({"model": {"model_name_or_path": str(tmp_path / "folder")}}, "no model there (config.json is missing)"),
        ({"data__template": "alpacca"}, "unknown template `alpacca`"),
        ({"arms__mle__objective": "mel"}, "arm `mle`"),
        ({"arms__convex__k": 0}, "arm `convex`"),
        ({"train__max_stpes": 3}, "did you mean `max_steps`?"),
        ({"train__seed": 3}, "unknown option `train.seed`; in a recipe it is `seeds`"),
        ({"train__use_peft": True}, "in a recipe it is `model.use_peft`"),
        ({"arms__mle__template": "chat"}, "in a recipe it is `data.template`"),
    ]
    for changes, said in cases:
        recipe = write_recipe(tmp_path, recipe_with(**changes))
        for words in ([], ["--dry_run"]):
            if "references" in said and words:
                continue  # a plan says what is there
            assert said in refused(["run", recipe, "--run_dir", tmp_path / "run", *words], capfd)
            assert not (tmp_path / "run").exists()


def test_run_leaves_the_folders_of_others_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from convexlm.recipe import load_recipe
    from convexlm.runs import RunFolder

    recipe = write_recipe(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("important")
    RunFolder(tmp_path / "run").claim(load_recipe(recipe, ["seeds=[3]"]))
    (tmp_path / "file").write_text("important")
    before = snapshot(tmp_path)
    for folder, said in (
        ("theirs", "holds files but no recipe.yaml"),
        ("run", "belongs to another recipe: `seeds` is [3] there and [1, 2] here"),
        ("file", "is a file"),
        ("file/below", "cannot be used as a run folder"),
    ):
        for words in ([], ["--dry_run"]):
            if folder == "file/below" and words:
                continue
            assert said in refused(["run", recipe, "--run_dir", tmp_path / folder, *words], capfd)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: RECIPE.yaml"),
        (["nothing.yaml"], "nothing.yaml: no such file"),
        (["tiny.yaml", "--dryrun"], "unknown option --dryrun; did you mean `--dry_run`?"),
        (["tiny.yaml", "--set", "train.max_stpes=3"], "did you mean `max_steps`?"),
        (["tiny.yaml", "--set", "nonsense"], "expected dotted.key=value"),
        (["tiny.yaml", "--set"], "--set: expected one argument"),
        (["."], "is a folder"),
    ],
)
def test_run_refuses_words_it_does_not_know(
    tmp_path: Path, words: list[str], said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert said in refused(["run", *words], capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_demo_refuses_a_seed_that_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "seeds" in refused(["demo", "--seed", "-1", "--run_dir", tmp_path / "run"], capfd)
    assert "--seed" in refused(["demo", "--seed", "one"], capfd)
    assert not (tmp_path / "run").exists()
