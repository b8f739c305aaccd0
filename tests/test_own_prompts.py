"""Whole prompts in the data: trained on as they are, and never decoded with a template that makes other ones."""

from __future__ import annotations

import copy
import json
import re

import pytest

from convexlm.cli import main
from convexlm.errors import UserError
from convexlm.export import export_checkpoint
from convexlm.instructions import load_records
from convexlm.own_prompts import KEY, first_own_prompt, refuse_unknown_prompts
from convexlm.preflight import check_files
from convexlm.recipe import check_recipe
from convexlm.templates import TEMPLATES, get_template
from pipeline_helpers import TINY
from training_helpers import train, write_model_files

TEXT = r"Translate: {input}\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own-prompts")
    write_model_files(folder / "model")
    words = [("one", "eins"), ("two", "zwei"), ("three", "drei"), ("four", "vier")] * 2

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    write("own.jsonl", [{"prompt": f"Translate: {a}\n", "completion": b} for a, b in words])
    alpaca = get_template("alpaca")
    filled = [alpaca.fill({"instruction": "Translate.", "input": a}) for a, _ in words]
    write("filled.jsonl", [{"prefix": p, "text": f"{b}</s>"} for p, (_, b) in zip(filled, words, strict=True)])
    (folder / "sources").write_text("one\ntwo\n", encoding="utf-8")
    return folder


def trained(files, folder, dataset="own.jsonl", *options, **settings):
    given = {"config_name": files / "model", "tokenizer_name": files / "model", "dataset": files / dataset}
    assert train(folder, *options, **given, max_steps=1, save_steps=1, per_device_train_batch_size=2, **settings) == 0
    return folder / "checkpoint-1"


def decode(checkpoint, files, output, *options):
    words = ["--model_name_or_path", checkpoint, "--sources", files / "sources", "--pair", "en-de"]
    return main(["decode", *map(str, words), "--output_file", str(output), "--max_new_tokens", "2", *options])


@pytest.mark.parametrize("name", [*TEMPLATES, "Q: {input}\nA:", r"{input}\n{instruction}\n"])
def test_a_template_knows_what_it_makes(name):
    template = get_template(name)
    fields = dict.fromkeys(("instruction", "input", "pre_instruction", "post_instruction"), "some (text).*\n\nof two")
    assert template.may_have_made(template.fill(fields))
    assert template.may_have_made(template.fill({**fields, "input": ""}))
    assert template.may_have_made("Translate: one") == (name == "chat")


def test_a_function_that_cannot_take_marks_is_believed(monkeypatch):
    from convexlm.templates import Template

    template = Template("numbers", lambda fields: str(int(fields["input"])))
    assert template.may_have_made("12")


def test_a_text_stands_for_a_template():
    assert get_template(TEXT).fill({"input": "a\\nb"}) == "Translate: a\\nb\n"
    with pytest.raises(UserError, match=r"needs the field `nothing`; there are: input"):
        get_template("{nothing}").fill({"input": "a"})
    with pytest.raises(UserError, match=r"unknown template `alpacca`; known: .*, or a text with marks such as \{inp"):
        get_template("alpacca")


def test_whose_prompts_they_are(files):
    own, filled = (load_records(files / name) for name in ("own.jsonl", "filled.jsonl"))
    assert first_own_prompt(own, "alpaca").endswith("own.jsonl:1")
    assert first_own_prompt(own, TEXT) is None
    assert first_own_prompt(filled, "alpaca") is None
    assert first_own_prompt(filled, "prompt_input_above").endswith("filled.jsonl:1")


@pytest.mark.parametrize("streaming", [False, True])
def test_such_a_checkpoint_is_not_decoded_with_another_prompt(files, tmp_path, capfd, streaming):
    for name in ("run", "run-of-cached-data"):
        checkpoint = trained(files, tmp_path / name, streaming=streaming, dataset_cache_dir=tmp_path / "cache")
        shown = capfd.readouterr()
        assert "the data have prompts of their own (" in shown.err and "own.jsonl:1), used as they are" in shown.err
        assert f"decode --model_name_or_path {checkpoint} --template TEXT_OR_NAME" in shown.out
    assert decode(checkpoint, files, tmp_path / "out.jsonl") == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert "was trained on whole prompts" in line and "--template" in line
    assert not (tmp_path / "out.jsonl").exists()
    assert decode(checkpoint, files, tmp_path / "out.jsonl", "--template", TEXT) == 0
    assert json.loads((tmp_path / "out.meta.json").read_text())["prompt"]["template"] == TEXT
    export_checkpoint(checkpoint, tmp_path / "exported")
    with pytest.raises(UserError, match="was trained on whole prompts"):
        refuse_unknown_prompts(tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert "Trained on whole prompts as the data have them" in card


@pytest.mark.parametrize(("dataset", "template"), [("filled.jsonl", "alpaca"), ("own.jsonl", TEXT)])
def test_prompts_of_the_template_s_form_go_on_as_before(files, tmp_path, capfd, dataset, template):
    checkpoint = trained(files, tmp_path / "run", dataset, template=template)
    assert "prompts of their own" not in capfd.readouterr().err
    marker = json.loads((checkpoint / "convexlm.json").read_text())
    assert KEY not in marker and marker["prompt"]["template"] == template
    assert decode(checkpoint, files, tmp_path / "out.jsonl") == 0


def test_an_instruction_that_the_template_has_no_place_for_is_refused(files, tmp_path, capfd):
    checkpoint = trained(files, tmp_path / "run", template=TEXT)
    assert decode(checkpoint, files, tmp_path / "out.jsonl", "--instruction", "Say it in German.") == 2
    assert re.search(r"has no place for an instruction", capfd.readouterr().err)


def test_a_run_is_refused_before_it_trains(files, tmp_path):
    recipe = copy.deepcopy(TINY)
    recipe["data"] = {"dataset": str(files / "own.jsonl")}
    recipe["model"]["tokenizer"] = str(files / "model")
    with pytest.raises(UserError, match=r"data.dataset .*own.jsonl: the prompts are the data's own .*data.template"):
        check_files(check_recipe(recipe, tmp_path / "recipe.yaml"))
    recipe["data"]["template"] = TEXT
    check_files(check_recipe(recipe, tmp_path / "recipe.yaml"))
