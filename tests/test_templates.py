"""Prompt templates: the wording to the byte, filling, and the registry."""

from __future__ import annotations

import json

import pytest

from convexlm.errors import UserError
from convexlm.templates import (
    TEMPLATES,
    TRANSLATION_INSTRUCTION,
    fill_instruction,
    get_template,
    language_name,
    register_template,
    split_pair,
)


@pytest.fixture
def registry():
    """Takes back what a test registers."""
    before = dict(TEMPLATES)
    yield TEMPLATES
    TEMPLATES.clear()
    TEMPLATES.update(before)


FIELDS = {"instruction": "I", "input": "X", "pre_instruction": "P", "post_instruction": "Q"}

# Head and body written out apart from the code, so that a slip in either shows.
CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
PLAIN = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ABOVE = (
    "Below is an input sentence as context, paired with an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("prompt_input", [CONTEXT, "### Instruction:\nI", "### Input:\nX", "### Response:"]),
        ("prompt_no_input", [PLAIN, "### Instruction:\nI", "### Response:"]),
        ("prompt_input_above", [ABOVE, "### Input:\nX", "### Instruction:\nI", "### Response:"]),
        (
            "double_prompt_input",
            [CONTEXT, "### Instruction:\nP", "### Input:\nX", "### Instruction:\nQ", "### Response:"],
        ),
        ("prompt_no_alpaca", ["I\nX\n"]),
        ("prompt_no_alpaca_above", ["X\nI\n"]),
        ("alpaca", [CONTEXT, "### Instruction:\nI", "### Input:\nX", "### Response:"]),
        ("chat", ["I\nX"]),
    ],
)
def test_wording(name, blocks):
    assert get_template(name).fill(FIELDS) == "\n\n".join(blocks)


def test_prompts_of_the_reference_format(shared_data):
    """The converted file holds the prompts that the reference's own script filled."""
    records = json.loads((shared_data / "alpaca" / "alpaca_gpt4_999.json").read_text("utf-8"))
    lines = (shared_data / "alpaca" / "data_alpaca_gpt4_999_hf_en.json").read_text("utf-8").split("\n")
    for record, line in zip(records, filter(None, lines), strict=True):
        assert get_template("alpaca").fill(record) == json.loads(line)["prefix"]


@pytest.mark.parametrize("blank", ["", "  \n", None])
def test_alpaca_without_input(blank):
    expected = get_template("prompt_no_input").fill({"instruction": "I"})
    assert get_template("alpaca").fill({"instruction": "I", "input": blank}) == expected
    assert get_template("alpaca").fill({"instruction": "I"}) == expected


def test_braces_in_user_text_stay():
    text = "{input} {{x}} {0} {instruction} \\1 \\g<0> %s"
    filled = get_template("prompt_input").fill({"instruction": text, "input": text})
    assert filled.count(text) == 2


@pytest.mark.parametrize("name", ["prompt_input", "prompt_no_alpaca", "double_prompt_input"])
def test_missing_field_is_named(name):
    with pytest.raises(UserError, match=f"`{name}` needs the field `(input|pre_instruction)`"):
        get_template(name).fill({"instruction": "I"})


def test_field_of_another_type():
    with pytest.raises(UserError, match="`instruction` as text, found int"):
        get_template("prompt_no_input").fill({"instruction": 3})
    with pytest.raises(UserError, match="`input` as text, found int"):
        get_template("alpaca").fill({"instruction": "a", "input": 3})


def test_unknown_template_lists_known():
    with pytest.raises(UserError, match="unknown template `vicuna`.*alpaca.*prompt_no_input"):
        get_template("vicuna")


def test_user_template_from_text(registry):
    register_template("qa", 'Q: {instruction}\nJSON {"a": 1} { x } {}\nA:')
    assert get_template("qa").fill({"instruction": "{b}"}) == 'Q: {b}\nJSON {"a": 1} { x } {}\nA:'
    with pytest.raises(ValueError, match="exists already"):
        register_template("qa", "again")
    register_template("qa", "{instruction}!", replace=True)
    assert get_template("qa").fill({"instruction": "b"}) == "b!"


def test_user_template_from_function(registry):
    @register_template("loud")
    def loud(fields):
        return fields["instruction"].upper()

    assert get_template("loud").fill({"instruction": "a"}) == "A"
    assert loud({"instruction": "b"}) == "B"


def test_function_template_with_a_missing_key(registry):
    register_template("loud")(lambda fields: fields["instruction"])
    with pytest.raises(UserError, match="`loud` needs the field `instruction`"):
        get_template("loud").fill({"text": "a"})


def test_pairs_and_languages():
    assert split_pair("en-de") == ("en", "de")
    assert language_name("zh") == "Chinese"
    filled = fill_instruction(TRANSLATION_INSTRUCTION, "zh-en")
    assert filled == "Translate the following sentences from Chinese to English."
    assert fill_instruction("no marks", "en-de") == "no marks"
    with pytest.raises(UserError, match="unknown language code `qq`"):
        fill_instruction(TRANSLATION_INSTRUCTION, "en-qq")


def test_instruction_of_the_test_set(shared_data):
    text = (shared_data / "wmt22" / "instruct_inf.txt").read_text("utf-8")
    assert text.strip() == TRANSLATION_INSTRUCTION


@pytest.mark.parametrize("pair", ["", "en", "en-", "-de", "en_de", "en-de-fr", "EN-DE", "en-de\n", "en de", None])
def test_malformed_pair(pair):
    with pytest.raises(UserError, match="is no language pair"):
        split_pair(pair)
