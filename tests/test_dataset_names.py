"""Datasets that have several configs and splits: named in one text, or with the options that TRL's users type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from convexlm.cli import main
from convexlm.data_options import DataOptions
from convexlm.dataset_names import DatasetName, dataset_path, parse_dataset, spell_dataset
from convexlm.errors import UserError
from convexlm.instructions import load_records
from convexlm.metrics_file import read_metrics
from convexlm.streaming import RecordStream, sources
from convexlm.tokenization import PromptSettings, tokenize_records
from convexlm.training_data import prepare_data
from training_helpers import tiny_tokenizer, train, write_model_files

SETTINGS = PromptSettings().resolve(tiny_tokenizer())


def records(kind: str, count: int) -> list[dict[str, str]]:
    return [
        {"instruction": f"say {kind} {number}", "input": "", "output": f"{kind} {number}"} for number in range(count)
    ]


def write(path: Path, kind: str, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in records(kind, count)), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two configs, `first` with the splits `train` and `held_out`; the names of the files say nothing of it."""
    out = tmp_path_factory.mktemp("several") / "data"
    for name, kind, count in (("one", "b", 6), ("zero", "a", 5), ("two", "c", 4), ("three", "d", 7)):
        write(out / "files" / f"{name}.jsonl", kind, count)
    card = [
        "---",
        "configs:",
        "- config_name: first",
        "  data_files:",
        "  - {split: train, path: [files/one.jsonl, files/zero.jsonl]}",
        "  - {split: held_out, path: files/two.jsonl}",
        "- config_name: second",
        "  data_files: files/three.jsonl",
        "---",
    ]
    (out / "README.md").write_text("\n".join(card) + "\n", encoding="utf-8")
    return out


def answers(found: list[Any]) -> list[str]:
    return [record.completion.strip() for record in found]


def of(kind: str, count: int) -> list[str]:
    return [row["output"] for row in records(kind, count)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("tatsu-lab/alpaca", ("tatsu-lab/alpaca", None, None)),
        ("user/chat[train_sft]", ("user/chat", None, "train_sft")),
        ("user/maths:main", ("user/maths", "main", None)),
        ("user/maths:main[test]", ("user/maths", "main", "test")),
        ("squad:plain_text", ("squad", "plain_text", None)),
        ("user/wmt:de-en[train[:10%]+test]", ("user/wmt", "de-en", "train[:10%]+test")),
        ("./folder[validation]", ("./folder", None, "validation")),
        ("user/name]", ("user/name]", None, None)),
        ("[test]", ("[test]", None, None)),
        ("user/name[]", ("user/name[]", None, None)),
        ("a\0b", ("a\0b", None, None)),
        ("x" * 5000, ("x" * 5000, None, None)),
    ],
)
def test_a_name_in_its_parts(text: str, parts: tuple[str, str | None, str | None]) -> None:
    assert parse_dataset(text) == DatasetName(*parts)
    assert str(dataset_path(text)) == str(Path(parts[0]))


def test_what_is_there_is_taken_as_it_stands(tmp_path: Path) -> None:
    write(tmp_path / "odd:name[test].jsonl", "odd", 2)
    assert parse_dataset(tmp_path / "odd:name[test].jsonl").config is None
    assert answers(load_records(tmp_path / "odd:name[test].jsonl")) == of("odd", 2)
    write(tmp_path / "dir:x" / "train.jsonl", "x", 2)
    assert answers(load_records(tmp_path / "dir:x")) == of("x", 2)


def test_names_are_spelled_of_their_parts() -> None:
    options = ("--a", "--b")
    assert spell_dataset("u/n", "c", "s", options) == "u/n:c[s]"
    assert spell_dataset("u/n:c", None, "s", options) == "u/n:c[s]"
    assert spell_dataset("u/n[s]", "c", "s", options) == "u/n:c[s]"
    assert spell_dataset("u/n", None, None, options) == "u/n"
    for name, config, split in (("u/n:d", "c", None), ("u/n[t]", None, "s")):
        with pytest.raises(UserError, match=r"--[ab] [cs]: the dataset's name, u/n.*, says `[dt]`"):
            spell_dataset(name, config, split, options)
    with pytest.raises(UserError, match="no name of a dataset"):
        spell_dataset("u/n", "c/d", None, options)


def test_options_end_up_in_the_names() -> None:
    options = DataOptions("u/n", dataset_config="c", dataset_train_split="sft", dataset_test_split="test")
    assert (options.dataset, options.eval_dataset) == ("u/n:c[sft]", "u/n:c[test]")
    assert DataOptions("u/n:c", dataset_test_split="test").eval_dataset == "u/n:c[test]"
    assert DataOptions("u/n:c", eval_dataset="u/m", dataset_test_split="test").eval_dataset == "u/m[test]"
    assert DataOptions("u/n:c[sft]").eval_dataset is None


def test_configs_and_splits_are_read(folder: Path) -> None:
    assert answers(load_records(f"{folder}:first")) == of("b", 6) + of("a", 5)
    assert answers(load_records(f"{folder}:first[held_out]")) == of("c", 4)
    assert answers(load_records(f"{folder}:first[train[2:4]]")) == of("b", 6)[2:4]
    assert answers(load_records(f"{folder}:second")) == of("d", 7)
    assert load_records(f"{folder}:second")[6].id == "data:second[train]#7"
    assert answers(load_records(f"{folder}:first", split="held_out")) == of("c", 4)


@pytest.mark.parametrize(
    ("spelled", "told"),
    [
        ("", "several configs, so name one as .*:CONFIG.*first.*second"),
        (":third", "third"),
        (":first[test]", "test"),
        (":first[train[:x]]", "cannot be loaded"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_there_is_not_is_told(folder: Path, spelled: str, told: str, streaming: bool) -> None:
    with pytest.raises(UserError, match=told):
        if streaming:
            next(RecordStream(f"{folder}{spelled}", "alpaca", tiny_tokenizer(), SETTINGS, None)())
        else:
            load_records(f"{folder}{spelled}")


def test_a_file_has_neither(folder: Path) -> None:
    with pytest.raises(UserError, match="a file has no configs and no splits"):
        load_records(f"{folder / 'files' / 'one.jsonl'}:first")
    with pytest.raises(UserError, match=r"no such file"):
        load_records(f"{folder / 'files' / 'five.jsonl'}[train]")


@pytest.mark.parametrize("spelled", [":first", ":first[held_out]", ":second"])
def test_a_stream_has_the_same_rows(folder: Path, spelled: str) -> None:
    name = f"{folder}{spelled}"
    wanted = tokenize_records(load_records(name), tiny_tokenizer(), SETTINGS, None).rows
    assert list(RecordStream(name, "alpaca", tiny_tokenizer(), SETTINGS, None).one_pass()) == wanted
    assert sources(name) == [name]


def test_a_default_config_of_the_readme_holds_for_a_stream_too(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train.jsonl", "by name", 3)
    write(tmp_path / "data" / "other.jsonl", "as said", 2)
    card = "---\nconfigs:\n- {config_name: default, data_files: other.jsonl}\n---\n"
    (tmp_path / "data" / "README.md").write_text(card)
    name = str(tmp_path / "data")
    assert answers(load_records(name)) == of("as said", 2)
    rows = list(RecordStream(name, "alpaca", tiny_tokenizer(), SETTINGS, None).one_pass())
    assert rows == tokenize_records(load_records(name), tiny_tokenizer(), SETTINGS, None).rows


@pytest.mark.parametrize("card", ["# Only text\n", "---\nlicense: mit\n---\n", "---\nconfigs: []\n---\n", ""])
def test_a_readme_without_configs_says_nothing_of_shards(tmp_path: Path, card: str) -> None:
    write(tmp_path / "train-0.jsonl", "train", 1)
    (tmp_path / "README.md").write_text(card)
    assert [Path(source).name for source in sources(str(tmp_path))] == ["train-0.jsonl"]


def test_a_readme_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train.jsonl", "train", 1)
    (tmp_path / "data" / "README.md").write_text("---\n: bad: [yaml\n---\n")
    with pytest.raises(UserError, match="cannot be loaded as a dataset"):
        next(RecordStream(str(tmp_path / "data"), "alpaca", tiny_tokenizer(), SETTINGS, None)())


def test_shards_of_another_split_are_streamed(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-0.jsonl", "train", 3)
    write(tmp_path / "data" / "test-0.jsonl", "test", 2)
    name = f"{tmp_path / 'data'}[test]"
    assert [Path(source).name for source in sources(name)] == ["test-0.jsonl"]
    assert answers(load_records(name)) == of("test", 2)
    assert len(list(RecordStream(name, "alpaca", tiny_tokenizer(), SETTINGS, None).one_pass())) == 2
    with pytest.raises(UserError, match="for those of `validation`"):
        sources(f"{tmp_path / 'data'}[validation]")


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    parts = {name: Dataset.from_list(records(name, 2)) for name in ("train", "sft")}
    DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    parts["sft"].save_to_disk(str(tmp_path / "single"))
    assert answers(load_records(f"{tmp_path / 'both'}[sft]")) == of("sft", 2)
    assert answers(load_records(tmp_path / "both")) == of("train", 2)
    assert answers(load_records(tmp_path / "single")) == of("sft", 2)
    with pytest.raises(UserError, match="no split `test`; there are: train, sft"):
        load_records(f"{tmp_path / 'both'}[test]")
    with pytest.raises(UserError, match="has no split `sft`"):
        load_records(f"{tmp_path / 'single'}[sft]")
    with pytest.raises(UserError, match="has no configs"):
        load_records(f"{tmp_path / 'both'}:main")


def test_each_is_kept_tokenized_for_itself(folder: Path, tmp_path: Path) -> None:
    def prepared(name: str) -> Any:
        return prepare_data(name, "alpaca", tiny_tokenizer(), SETTINGS, None, cache_dir=tmp_path)

    names = [f"{folder}:first", f"{folder}:first[held_out]", f"{folder}:second"]
    for again in (False, True):
        found = [prepared(name) for name in names]
        assert [len(one.dataset) for one in found] == [11, 4, 7]
        assert [one.from_cache for one in found] == [again] * 3


def test_training_with_the_options_of_trl(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model_files(tmp_path / "model")
    common = {
        "config_name": tmp_path / "model",
        "tokenizer_name": tmp_path / "model",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    options = {"dataset_config": "first", "dataset_train_split": "train", "dataset_test_split": "held_out"}
    assert train(tmp_path / "apart", dataset_name=folder, **options, **common) == 0
    spelled = {"dataset": f"{folder}:first", "eval_dataset": f"{folder}:first[held_out]"}
    assert train(tmp_path / "spelled", **spelled, **common) == 0
    capsys.readouterr()

    def numbers(run: Path) -> list[tuple[Any, Any]]:
        return [(line.get("loss"), line.get("eval_loss")) for line in read_metrics(run)]

    assert numbers(tmp_path / "apart") == numbers(tmp_path / "spelled")
    other = {**common, "max_steps": 4}
    assert train(tmp_path / "apart", "--resume", dataset=f"{folder}:second", eval_dataset=folder, **other) == 2
    assert train(tmp_path / "two", dataset=folder, **common) == 2
    assert "name one as" in capsys.readouterr().err
    assert not (tmp_path / "two").exists() or not list((tmp_path / "two").glob("checkpoint-*"))


def test_diagnose_takes_such_a_name(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model_files(tmp_path / "model")
    data = {"dataset": f"{folder}:second", "config_name": tmp_path / "model", "tokenizer_name": tmp_path / "model"}
    assert train(tmp_path / "run", **data, max_steps=1) == 0
    capsys.readouterr()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    assert (
        main(["diagnose", "--model_name_or_path", checkpoint, "--dataset", f"{folder}:first[held_out]", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["reading"]["total_records"] == 4
