"""Instruction data: every format, where a record came from, and what is refused with one line."""

from __future__ import annotations

import gzip
import json

import pytest

from convexlm.errors import UserError
from convexlm.instructions import FORMATS, Record, load_records, register_format
from convexlm.templates import TEMPLATES, get_template, register_template

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}


def write(path, *rows, array=False):
    text = json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, "utf-8")
    return path


def test_alpaca_array_and_lines_agree(tmp_path):
    rows = [ALPACA, {"instruction": "Hi.", "input": None, "output": " a\n"}, {"instruction": "Hi.", "output": "b"}]
    from_array = load_records(write(tmp_path / "a.json", *rows, array=True))
    from_lines = load_records(write(tmp_path / "l.json", *rows))
    assert [(r.prompt, r.completion) for r in from_array] == [(r.prompt, r.completion) for r in from_lines]
    assert [r.id for r in from_array] == ["a.json#1", "a.json#2", "a.json#3"]
    assert [r.id for r in from_lines] == ["l.json:1", "l.json:2", "l.json:3"]
    assert from_array[0] == Record(get_template("prompt_input").fill(ALPACA), "3", 1.0, "a.json#1")
    assert from_array[1].prompt == get_template("prompt_no_input").fill({"instruction": "Hi."})
    assert from_array[1].completion == " a\n", "text is never changed"


def test_line_numbers_count_blank_lines_and_ignore_other_separators(tmp_path):
    path = tmp_path / "a.jsonl"
    row = json.dumps({"instruction": "a\u2028b\x85", "output": "c\u2029"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf\r\n" + row.encode() + b"\r\n\n" + row.encode())
    records = load_records(path)
    assert [r.id for r in records] == ["a.jsonl:2", "a.jsonl:4"]
    assert "a\u2028b\x85" in records[0].prompt
    assert records[0].completion == "c\u2029"


def test_gzip(tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps([ALPACA]).encode()))
    assert load_records(path)[0].completion == "3"


@pytest.mark.parametrize(
    ("text", "completion"),
    [("a</s>", "a"), ("a", "a"), ("a</s></s>", "a</s>"), ("</s>a</s>", "</s>a"), ("a</s>\n", "a</s>\n")],
)
def test_prefix_text(tmp_path, text, completion):
    record = load_records(write(tmp_path / "a.json", {"prefix": "{input} P:", "text": text}))[0]
    assert (record.prompt, record.completion) == ("{input} P:", completion)


def test_reference_file_equals_alpaca_file(shared_data):
    ours = load_records(shared_data / "alpaca" / "alpaca_gpt4_999.json")
    theirs = load_records(shared_data / "alpaca" / "data_alpaca_gpt4_999_hf_en.json")
    raw = json.loads((shared_data / "alpaca" / "alpaca_gpt4_999.json").read_text("utf-8"))
    assert len(ours) == 999
    assert [(r.prompt, r.completion) for r in ours] == [(r.prompt, r.completion) for r in theirs]
    assert [r.completion for r in ours] == [row["output"] for row in raw]
    assert theirs[998].id == "data_alpaca_gpt4_999_hf_en.json:999"


def test_prompt_completion(tmp_path):
    record = load_records(write(tmp_path / "a.jsonl", {"prompt": "Q", "completion": " A", "weight": 0.5}))[0]
    assert record == Record("Q", " A", 0.5, "a.jsonl:1")


MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
]


def test_messages_both_ways(tmp_path):
    whole = load_records(write(tmp_path / "m.jsonl", {"messages": MESSAGES}), template="chat")[0]
    split = {"prompt": MESSAGES[:2], "completion": MESSAGES[2:]}
    parts = load_records(write(tmp_path / "m.jsonl", split), template="chat")[0]
    assert whole == parts == Record("S\n\nU", "A", 1.0, "m.jsonl:1", MESSAGES[:2])


def test_alpaca_as_chat(tmp_path):
    record = load_records(write(tmp_path / "a.jsonl", ALPACA), template="chat")[0]
    assert (record.prompt, record.messages) == ("Add.\n1 2", None)


def test_double_instruction(tmp_path):
    row = {"pre_instruction": "P", "input": "X", "post_instruction": "Q", "output": "A"}
    path = write(tmp_path / "a.jsonl", row)
    assert load_records(path, template="double_prompt_input")[0].prompt == get_template("double_prompt_input").fill(
        row
    )
    with pytest.raises(UserError, match="line 1: template `alpaca` needs the field `instruction`"):
        load_records(path)
    with pytest.raises(UserError, match="line 1: template `double_prompt_input` needs the field `pre_instruction`"):
        load_records(write(tmp_path / "b.jsonl", ALPACA), template="double_prompt_input")


def test_hub_alpaca_gpt4_has_a_text_column_too(tmp_path):
    row = {**ALPACA, "text": "the whole example", "prompt": "x"}
    assert load_records(write(tmp_path / "a.jsonl", row))[0].completion == "3"


@pytest.mark.parametrize("field", ["style", "system"])
def test_user_template_sees_other_fields(tmp_path, field):
    register_template("with_style", f"{{{field}}}: {{instruction}} {{input}}")
    try:
        path = write(tmp_path / "a.jsonl", {**ALPACA, field: "curt", "history": []})
        assert load_records(path, template="with_style")[0].prompt == "curt: Add. 1 2"
    finally:
        del TEMPLATES["with_style"]


def test_user_format(tmp_path):
    @register_format("parallel", ("source", "target"))
    def parallel(row, template):
        return Record(template.fill({"instruction": "Translate.", "input": row["source"]}), row["target"])

    try:
        record = load_records(write(tmp_path / "a.jsonl", {"source": "x", "target": "y", "weight": 2}))[0]
        assert (record.completion, record.weight, record.id) == ("y", 2.0, "a.jsonl:1")
        with pytest.raises(ValueError, match="exists already"):
            register_format("parallel", ("a",))
    finally:
        del FORMATS["parallel"]


def test_keys_of_two_formats(tmp_path):
    both = {**ALPACA, "prompt": None, "completion": None, "text": "all of it"}
    double = {**ALPACA, "pre_instruction": "First:", "post_instruction": "Now."}
    for row in (both, double):
        assert load_records(write(tmp_path / "a.jsonl", row))[0].completion == ALPACA["output"]


def test_max_records(tmp_path):
    path = write(tmp_path / "a.jsonl", *[ALPACA] * 5)
    assert len(load_records(path, max_records=3)) == 3
    assert len(load_records(path, max_records=9)) == 5
    for bad in (0, -1, True, 10**30):
        with pytest.raises(UserError, match="max_records must be at least 1"):
            load_records(path, max_records=bad)


def test_parquet_and_folder(tmp_path):
    import datasets

    table = datasets.Dataset.from_list([ALPACA, {**ALPACA, "input": None}])
    table.to_parquet(tmp_path / "a.parquet")
    table.to_parquet(tmp_path / "B.PARQUET")
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "dict")
    expected = [r.prompt for r in load_records(write(tmp_path / "a.jsonl", ALPACA, {**ALPACA, "input": None}))]
    for source in ("a.parquet", "B.PARQUET", "one", "dict"):
        assert [r.prompt for r in load_records(tmp_path / source)] == expected
    assert load_records(tmp_path / "a.parquet")[1].id == "a.parquet#2"
    assert load_records(tmp_path / "dict")[1].id == "dict[train]#2"
    with pytest.raises(UserError, match="no split `test`; there are: train"):
        load_records(tmp_path / "dict", split="test")


@pytest.mark.parametrize(("name", "sep"), [("train.csv", ","), ("train.tsv", "\t"), ("train.csv.gz", ",")])
def test_words_of_a_table_that_pandas_takes_for_nothing_are_text(tmp_path, monkeypatch, name, sep):
    """`datasets` leaves them to pandas, by which an input of "None" is no input, and the prompt another one."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [("instruction", "input", "output", "weight"), ("Say.", "None", "NA", "2"), ("Say.", "", "null", "")]
    text = "".join(sep.join(row) + "\n" for row in rows).encode()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    (tmp_path / "data" / "README.md").write_text("A table.\n")
    found = load_records(tmp_path / "data", template="prompt_no_alpaca")
    assert [(r.prompt, r.completion, r.weight) for r in found] == [("Say.\nNone\n", "NA", 2), ("Say.\n\n", "null", 1)]


def test_what_a_prompt_says_already_is_no_loss(tmp_path):
    said = {"prompt": "Be brief.\n\nQ", "completion": "A", "system": "Be brief.\n"}
    empty = {"prompt": "Q", "completion": "A", "system": None, "history": [], "image": ""}
    found = load_records(write(tmp_path / "d.jsonl", said, empty))
    assert [record.prompt for record in found] == ["Be brief.\n\nQ", "Q"]


def test_hub_name(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        if args[0] == "someone/none":
            raise datasets.exceptions.DatasetNotFoundError("does not exist\non the hub")
        return datasets.Dataset.from_list([ALPACA])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_records("someone/data", split="validation")[0].id == "data[validation]#1"
    assert load_records("someone/data:en[train[:1%]]")[0].id == "data:en[train[:1%]]#1"
    wanted = [(("someone/data", None), {"split": "validation"}), (("someone/data", "en"), {"split": "train[:1%]"})]
    assert asked == wanted, "no code of the dataset's own is let run"
    with pytest.raises(UserError, match="someone/none: no such file, and not loadable from the hub .does not exist"):
        load_records("someone/none")


GOOD = json.dumps(ALPACA)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        (" \n\n", "the file is empty"),
        ("[]", "the array is empty"),
        ("[\n" + GOOD + ",\n{broken}\n]", "line 3: not valid JSON"),
        (GOOD + "\n" + GOOD[:-5], "line 2: not valid JSON"),
        (GOOD + "\n[1]", "line 2: expected a JSON object, found a list"),
        ("[" + GOOD + ", 7]", "record 2: expected a JSON object, found a number"),
        ("instruction,output\na,b", "expected a JSON array of objects, or one JSON object a line"),
        ('{"instruction": "a"}', "line 1: no output: the key `output` is missing"),
        ('{"instruction": "a", "output": null}', "line 1: no output: the key `output` is null"),
        (GOOD + '\n{"instruction": "a", "output": " \\n"}', "line 2: no output: `output` is empty"),
        ('{"instruction": "a", "output": 3}', "line 1: `output` must be text, found a number"),
        ('{"instruction": ["a"], "output": "b"}', "line 1: `instruction` must be text, found a list"),
        ('{"instruction": "a", "input": 3, "output": "b"}', "`input` must be text, found a number"),
        ('{"instruction": "a", "output": "b", "history": [["c", "d"]]}', "`history` is not in the prompt of the"),
        ('{"instruction": "a", "output": "b", "system": "c"}', "`system` is not in the prompt of the template"),
        ('{"instruction": "a", "output": "b", "tools": "c"}', "`tools` is not in the prompt of the template"),
        ('{"instruction": "a", "output": "b", "context": "c"}', "`context` is not in the prompt.*put it into `input`"),
        ('{"instruction": "a", "output": "b", "images": ["c.png"]}', "line 1: `images` would be left out"),
        ('{"prefix": "a", "text": "b", "system": "c"}', "`system` is not in `prefix`, which is used as it is"),
        ('{"prompt": "a", "completion": "b", "system": "c"}', "`system` is not in `prompt`, which is used as it is"),
        ('{"prompt": "a", "completion": "b", "history": [["c", "d"]]}', "`history` is not in `prompt`"),
        ('{"prompt": "a", "completion": "b", "image": "c.png"}', "line 1: `image` would be left out"),
        ('{"messages": [], "images": ["c.png"]}', "line 1: `images` would be left out"),
        ('{"conversations": [{"from": "human", "value": "a"}]}', "write `conversations` as `messages`"),
        ('{"instruction": null, "output": "b"}', "`instruction` and `input` are both empty"),
        ('{"prefix": "a", "text": "</s>"}', "no answer before its"),
        ('{"prefix": "a"}', "no output: the key `text` is missing"),
        ('{"prefix": 1, "text": "a"}', "`prefix` must be text"),
        ('{"prompt": "a"}', "no output: the key `completion` is missing"),
        ('{"prompt": null, "completion": "a"}', "`prompt` must be text, found null"),
        (
            '{"question": "a", "answer": "b"}',
            "unknown record format with the keys `question`, `answer`; kno.*alpaca",
        ),
        ("{}", "unknown record format with the keys none"),
        (
            '{"prompt": "a", "completion": "b", "instruction": "c", "output": "d"}',
            r"line 1: the record can be read as alpaca \(instruction, output\) or prompt_completion \(prompt, compl",
        ),
        (
            GOOD + '\n{"prompt": "a", "completion": "b"}',
            "line 2: a record of format prompt_completion, but bad.json:1",
        ),
        ('{"instruction": "a\\ud800", "output": "b"}', "line 1: a lone surrogate"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "must end with a message of the role `assistant`"),
        ('{"instruction": "a", "output": "b", "n": ' + "9" * 5000 + "}", "line 1: JSON that cannot be read"),
        ("[" * 100_000, "bad.json.*(cannot be read|not valid JSON)"),
        *[
            ('{"instruction": "a", "output": "b", "weight": ' + value + "}", "line 1: `weight` must be")
            for value in ("true", "-1", "NaN", "Infinity", '"1"', "1" + "0" * 400)
        ],
    ],
)
def test_bad_input_is_one_line(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content, "utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_records(path)
    assert "\n" not in str(caught.value)
    assert "bad.json" in str(caught.value)


def test_bad_messages(tmp_path):
    user, answer = MESSAGES[1:]
    for messages, message in [
        ([answer], "no message before"),
        ([user, {"role": "assistant", "content": ""}], "no output"),
        ([user, {"role": "assistant", "content": None}], "message 2 must have its `content` as text, found null"),
        ([{"content": "a"}, answer], "message 1 must be an object with a `role`"),
        ("text", "must be a list of messages"),
        ([user, {**answer, "reasoning_content": "hm"}], "the answer's `reasoning_content` would be left out"),
        ([user, {**answer, "weight": 0}], "the answer's own `weight` would be left out"),
        ([user, {**answer, "tool_calls": [{"type": "function"}]}], "the answer's `tool_calls` would be left out"),
    ]:
        with pytest.raises(UserError, match=message):
            load_records(write(tmp_path / "m.jsonl", {"messages": messages}), template="chat")
    with pytest.raises(UserError, match="`system` is not handed to the chat template here"):
        load_records(write(tmp_path / "m.jsonl", {"messages": MESSAGES, "system": "S"}), template="chat")
    with pytest.raises(UserError, match="records of messages need the template `chat`, not `alpaca`"):
        load_records(write(tmp_path / "m.jsonl", {"messages": MESSAGES}))
    with pytest.raises(UserError, match="used as it is; for the template `chat`"):
        load_records(write(tmp_path / "m.jsonl", {"prompt": "a", "completion": "b"}), template="chat")
    with pytest.raises(UserError, match="must be a list of one message"):
        load_records(write(tmp_path / "m.jsonl", {"prompt": [user], "completion": "b"}), template="chat")


@pytest.mark.parametrize("name", ["nosuch.json", "nosuch.jsonl.gz", "/no/such/place", "a b", "x\0y", "y" * 5000])
def test_no_such_file(name):
    with pytest.raises(UserError, match="no such file|no file name"):
        load_records(name)


def test_not_text_not_parquet(tmp_path):
    (tmp_path / "a.json").write_bytes(b"{\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        load_records(tmp_path / "a.json")
    (tmp_path / "a.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        load_records(tmp_path / "a.parquet")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: cannot be loaded as a dataset"):
        load_records(tmp_path / "folder")


def test_unknown_template(tmp_path):
    with pytest.raises(UserError, match="unknown template `nope`"):
        load_records(write(tmp_path / "a.jsonl", ALPACA), template="nope")
