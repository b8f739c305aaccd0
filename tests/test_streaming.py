"""Training data: streamed and tokenized on the way, or tokenized once and found again; the same rows always."""

from __future__ import annotations

import gzip
import itertools
import os
import shutil
from random import Random

import pytest
import torch
from datasets import Dataset
from trl import pack_dataset

import convexlm.streaming as streaming
import convexlm.training_data as training_data
from convexlm.errors import UserError
from convexlm.instructions import load_records
from convexlm.metrics_file import read_metrics
from convexlm.prepared_data import mixed
from convexlm.streaming import RecordStream, shuffled, sources
from convexlm.tokenization import PromptSettings, tokenize_records
from convexlm.training_data import META_FILE, prepare_data, tokenizer_hash
from resume_helpers import write_files
from training_helpers import Run, tiny_tokenizer, train, write_model_files, write_records

SETTINGS = PromptSettings().resolve(tiny_tokenizer())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def wanted_rows(path, max_length=None):
    return tokenize_records(load_records(path), tiny_tokenizer(), SETTINGS, max_length)


def stream(path, max_length=None, **settings):
    return RecordStream(str(path), "alpaca", tiny_tokenizer(), SETTINGS, max_length, **settings)


# -- the stream


@pytest.mark.parametrize("max_length", [None, 9, 5])
def test_a_stream_gives_the_rows_again_and_again(files, max_length, capfd):
    wanted = wanted_rows(files / "data.jsonl", max_length)
    rows = list(itertools.islice(stream(files / "data.jsonl", max_length)(), 2 * len(wanted.rows) + 3))
    assert rows == wanted.rows + wanted.rows + wanted.rows[:3]
    err = capfd.readouterr().err
    assert err.count("\n") == (1 if wanted.dropped or wanted.truncated else 0)  # told once, not at every pass
    if wanted.dropped:
        assert f"{len(wanted.dropped)} dropped" in err and wanted.dropped[0] in err
    if wanted.truncated:
        assert f"{wanted.truncated} cut" in err


def test_a_stream_reads_no_further_than_it_must(monkeypatch):
    read = []

    def endless(*_args, **_kwargs):
        from convexlm.instructions import Record

        for number in itertools.count():
            read.append(number)
            yield Record(f"w{number % 9}", "w1", id=str(number)), {}

    monkeypatch.setattr(streaming, "iter_records", endless)
    rows = list(itertools.islice(stream("endless")(), 100))
    assert [row["record_id"] for row in rows] == [str(number) for number in range(100)]
    assert len(read) <= 100 + streaming._BATCH
    read.clear()
    dataset = stream("endless").as_dataset()
    assert dataset.column_names == ["input_ids", "labels", "weight", "record_id"]
    next(iter(dataset))
    assert len(read) <= streaming._BATCH


def test_shards_are_read_by_name_and_may_be_compressed(tmp_path):
    whole = write_records(tmp_path / "whole.jsonl", 10)
    lines = whole.read_text().split("\n")[:-1]
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "b.jsonl").write_text("\n".join(lines[4:7]) + "\n")
    with gzip.open(shards / "c.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[7:]))
    with gzip.open(shards / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[:4]))
    (shards / "notes.txt").write_text("no shard")
    rows = list(stream(shards).one_pass())
    assert [row["input_ids"] for row in rows] == [row["input_ids"] for row in wanted_rows(whole).rows]
    assert rows[4]["record_id"] == "b.jsonl:1"
    assert [path.rsplit("/", 1)[1] for path in sources(str(shards))] == ["a.jsonl.gz", "b.jsonl", "c.jsonl.gz"]
    assert len(list(stream(shards, max_records=5).one_pass())) == 5


def test_shards_are_those_that_are_trained_on_without_streaming(tmp_path):
    folder = tmp_path / "data"
    for name in ("train-2.jsonl", "more/train-1.json", "test.jsonl", "valid.jsonl", "extra.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_records(folder / name, 3, seed=len(name))
    assert [os.path.relpath(path, folder) for path in sources(str(folder))] == ["more/train-1.json", "train-2.jsonl"]
    same = [record.prompt for path in sources(str(folder)) for record in load_records(path)]
    assert same == [record.prompt for record in load_records(folder)]
    (tmp_path / "held").mkdir()
    with pytest.raises(UserError, match="no shards to train on there"):
        sources(str(tmp_path / "held"))
    write_records(tmp_path / "held" / "test.jsonl", 1)
    with pytest.raises(UserError, match="no shards to train on there"):
        sources(str(tmp_path / "held"))


def test_shuffling_draws_each_record_once_and_in_another_order_each_pass(files):
    plain = [row["record_id"] for row in stream(files / "data.jsonl").one_pass()]

    def order(seed, epoch):
        made = stream(files / "data.jsonl", shuffle_buffer=8, seed=seed)
        return [row["record_id"] for row in made.one_pass(epoch)]

    assert order(1, 0) == order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    for found in (order(1, 0), order(1, 1)):
        assert sorted(found) == sorted(plain) and found != plain
    # Nothing comes out earlier than the buffer allows.
    assert all(place >= plain.index(name) - 8 for place, name in enumerate(order(1, 0)))
    assert list(shuffled([], 4, Random(0))) == []


def test_a_stream_without_a_weight_ends_at_its_end(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "w1", "completion": "w2", "weight": 0}\n' * 3)
    with pytest.raises(UserError, match="every record has the weight 0"):
        list(itertools.islice(stream(tmp_path / "data.jsonl")(), 4))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty"),
        ("\n \n", "the file is empty"),
        ('[{"prompt": "w1", "completion": "w2"}]', "one object a line"),
        ('{"prompt": "w1 w2 w3 w4", "completion": "w2"}\n', "max_length 3 is filled by the prompt in all 1 records"),
        ('{"prompt": "w1"}\n', "line 1"),
        (None, "no such file"),
    ],
)
def test_what_cannot_be_streamed_is_told_before_training(files, tmp_path, capsys, text, said):
    path = tmp_path / "data.jsonl"
    if text is not None:
        path.write_text(text)
    assert train(tmp_path / "run", "--streaming", **given(files, dataset=path, max_length=3)) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.split("\n") if "error:" in line]
    assert out == "" and len(lines) == 1 and said in lines[0] and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"streaming": True, "max_steps": -1}, "--streaming needs --max_steps"),
        ({"shuffle_buffer": 10}, "--shuffle_buffer is for --streaming"),
        ({"streaming": True, "shuffle_buffer": -1}, "not be negative"),
        ({"streaming": True, "train_sampling_strategy": "group_by_length"}, "no lengths"),
        ({"streaming": True, "dataset_num_proc": 2}, "--dataset_num_proc"),
        ({"streaming": True, "shuffle_dataset": True}, "with --streaming give --shuffle_buffer"),
        (
            {"streaming": True, "dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"},
            "--dataloader_multiprocessing_context spawn: a stream",
        ),
        ({"dataset_cache_dir": "FILE"}, "--dataset_cache_dir"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(files, tmp_path, capsys, options, said):
    (tmp_path / "file").write_text("")
    options = {key: tmp_path / "file" if value == "FILE" else value for key, value in options.items()}
    assert train(tmp_path / "run", **given(files, **options)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_line_far_in_is_told_with_its_place(files, tmp_path, capsys, workers):
    lines = (files / "data.jsonl").read_text().split("\n")[:-1] * 4
    lines[80] = '{"prompt": "w1", "comp'
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    options = given(files, dataset=tmp_path / "data.jsonl", max_steps=30, dataloader_num_workers=workers)
    assert train(tmp_path / "run", "--streaming", **options) == 2
    err = capsys.readouterr().err
    assert f"error: {tmp_path / 'data.jsonl'}, line 81: not valid JSON" in err and "Traceback" not in err


# -- trained on


def given(files, **settings):
    made = {
        "config_name": files / "model",
        "tokenizer_name": files / "model",
        "dataset": files / "data.jsonl",
        "max_steps": 9,
        "save_steps": 7,
        "logging_steps": 2,
        "per_device_train_batch_size": 4,
        "optim": "adamw_torch",
        "lr_scheduler_type": "linear",
    }
    return {**made, **settings}


def assert_same_run(got, wanted, but=("epoch",)):
    plain = lambda folder: [{k: x for k, x in line.items() if k not in but} for line in read_metrics(folder)]  # noqa: E731
    assert plain(got) == plain(wanted)
    theirs = Run(wanted, 9).weights
    assert all(torch.equal(value, theirs[name]) for name, value in Run(got, 9).weights.items())


def test_a_streamed_run_is_the_run_in_the_order_of_the_data(files, tmp_path):
    """20 of the records, so that a batch ends where the data do, as it does in memory.

    And without dropout: in memory every pass over the data draws a number when it begins.
    """
    options = given(files, max_records=20, config_name=write_model_files(tmp_path / "model"))
    assert train(tmp_path / "memory", **options, train_sampling_strategy="sequential") == 0
    assert train(tmp_path / "stream", "--streaming", **options) == 0
    assert_same_run(tmp_path / "stream", tmp_path / "memory")


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle_buffer": 6},
        {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1},
        {"packing": True, "max_length": 24, "per_device_train_batch_size": 2},
    ],
    ids=["shuffled", "worker", "packed"],
)
def test_a_streamed_run_resumes_exactly(files, tmp_path, options):
    """Beyond the end of the data, where they begin again (28 or 56 of 25 records)."""
    options = given(files, **{"per_device_train_batch_size": 4, **options})
    assert train(tmp_path / "whole", "--streaming", **options) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-9")
    assert train(tmp_path / "again", "--streaming", "--resume", **options) == 0
    assert_same_run(tmp_path / "again", tmp_path / "whole", but=())


# -- tokenized once


def prepared(path, cache, max_length=None, tokenizer=None, **settings):
    tokenizer = tokenizer or tiny_tokenizer()
    return prepare_data(str(path), "alpaca", tokenizer, SETTINGS, max_length, cache_dir=cache, **settings)


@pytest.mark.parametrize("max_length", [None, 9, 5])
@pytest.mark.parametrize("num_proc", [None, 3])
def test_the_rows_are_those_of_tokenize_records(files, tmp_path, max_length, num_proc):
    wanted = wanted_rows(files / "data.jsonl", max_length)
    for from_cache in (False, True):
        found = prepared(files / "data.jsonl", tmp_path / "cache", max_length, num_proc=num_proc)
        assert found.from_cache is from_cache
        assert found.dataset.to_list() == wanted.rows
        assert found.dropped == wanted.dropped and found.truncated == wanted.truncated
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == ["", ".lock"]


def test_the_cache_is_found_by_all_that_rows_depend_on(files, tmp_path):
    cache, data = tmp_path / "cache", tmp_path / "data.jsonl"
    shutil.copy(files / "data.jsonl", data)
    prepared(data, cache)
    assert prepared(data, cache).from_cache
    assert not prepared(data, cache, max_length=9).from_cache
    assert not prepared(data, cache, max_records=7).from_cache
    other = tiny_tokenizer()
    other.add_tokens(["w1 w2"])
    assert not prepared(data, cache, tokenizer=other).from_cache
    assert tokenizer_hash(other) != tokenizer_hash(tiny_tokenizer()) == tokenizer_hash(tiny_tokenizer())
    assert tokenizer_hash(tiny_tokenizer("{{ messages }}")) != tokenizer_hash(tiny_tokenizer())
    no_bos = PromptSettings(add_bos=False)
    assert not prepare_data(str(data), "alpaca", tiny_tokenizer(), no_bos, None, cache_dir=cache).from_cache
    shutil.copy(data, tmp_path / "renamed.jsonl")
    assert prepared(tmp_path / "renamed.jsonl", cache).dataset[0]["record_id"] == "renamed.jsonl:1"
    data.write_text(data.read_text().split("\n", 1)[1])
    found = prepared(data, cache)
    assert not found.from_cache and len(found.dataset) == 24


def test_a_template_of_ones_own_is_part_of_the_name(files, tmp_path):
    from convexlm.templates import TEMPLATES, register_template

    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "w1", "output": "w2"}\n')
    made = []
    try:
        for text in ("w3 {instruction}", "w4 {instruction}", "w3 {instruction}"):
            register_template("own_test", text, replace=True)
            settings = PromptSettings("own_test").resolve(tiny_tokenizer())
            made.append(
                prepare_data(str(data), "own_test", tiny_tokenizer(), settings, None, cache_dir=tmp_path / "c")
            )
    finally:
        TEMPLATES.pop("own_test", None)
    assert [one.from_cache for one in made] == [False, False, True]
    assert made[0].dataset[0]["input_ids"] != made[1].dataset[0]["input_ids"]


def test_a_half_written_cache_is_made_again(files, tmp_path, monkeypatch):
    cache = tmp_path / "cache"

    class PowerCutError(BaseException):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(training_data, "write_atomic", lambda *_: (_ for _ in ()).throw(PowerCutError))
        patch.setattr(training_data.shutil, "rmtree", lambda *_a, **_k: None)
        with pytest.raises(PowerCutError):
            prepared(files / "data.jsonl", cache)
    assert any(path.name.endswith(".work") for path in cache.iterdir())
    found = prepared(files / "data.jsonl", cache)
    assert not found.from_cache and len(found.dataset) == 25
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    (folder / META_FILE).unlink()
    assert not prepared(files / "data.jsonl", cache).from_cache
    assert prepared(files / "data.jsonl", cache).from_cache


def test_a_cache_that_cannot_be_written_is_told_and_done_without(files, tmp_path, monkeypatch, capfd):
    import datasets

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    found = prepared(files / "data.jsonl", None)
    assert not found.from_cache and found.dataset.to_list() == wanted_rows(files / "data.jsonl").rows
    assert "cannot be written" in capfd.readouterr().err
    with pytest.raises(UserError, match="--dataset_cache_dir"):
        prepared(files / "data.jsonl", tmp_path / "file")


@pytest.mark.parametrize("num_proc", [None, 2])
def test_mistakes_in_the_data_are_told_from_wherever_they_are_found(files, tmp_path, num_proc):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "w1", "completion": "w2"}\n{"prompt": "", "completion": "w2"}\n')
    settings = PromptSettings(add_bos=False)
    with pytest.raises(UserError, match=r"record data.jsonl:2: the prompt is empty"):
        prepare_data(
            str(data), "alpaca", tiny_tokenizer(), settings, None, cache_dir=tmp_path / "c", num_proc=num_proc
        )
    with pytest.raises(UserError, match=r"max_length 1 is filled by the prompt in all 25 records"):
        prepared(files / "data.jsonl", tmp_path / "c", max_length=1, num_proc=num_proc)
    assert not any(path.is_dir() for path in (tmp_path / "c").iterdir())


def test_the_second_run_says_so_and_is_the_same(files, tmp_path, capfd):
    options = given(files, dataset_cache_dir=tmp_path / "cache", max_length=9)
    assert train(tmp_path / "first", **options, dataset_num_proc=2) == 0
    first = capfd.readouterr().err
    assert train(tmp_path / "second", **options) == 0
    second = capfd.readouterr().err
    assert "tokenised data from cache (" not in first and "tokenised data from cache (" in second
    lost = [line for line in first.split("\n") if "cut to max_length" in line]
    assert lost and lost == [line for line in second.split("\n") if "cut to max_length" in line]
    assert_same_run(tmp_path / "second", tmp_path / "first", but=())


# -- packed


def test_packed_rows_of_a_stream_come_in_no_order_of_length(tmp_path):
    """Packing puts the longest of its window first, and nothing shuffles a stream afterwards."""
    records = [{"input_ids": [1] * n, "labels": [1] * n} for n in Random(1).choices(range(2, 40), k=900)]
    plain = Dataset.from_list(records).to_iterable_dataset()
    packed = pack_dataset(plain, 40, "bfd")
    rows, again = list(mixed(packed, seed=3)), list(mixed(packed, seed=3))
    assert rows == again != list(mixed(packed, seed=4))
    key = lambda row: (row["input_ids"], row["labels"], row["seq_lengths"])  # noqa: E731
    assert sorted(map(key, rows)) == sorted(map(key, packed))
    half = len(rows) // 2

    def longest(part):
        return sum(max(row["seq_lengths"]) for row in part) / len(part)

    in_order = list(packed)
    assert longest(in_order[:half]) > longest(in_order[half:]) + 5
    assert abs(longest(rows[:half]) - longest(rows[half:])) < 3
    assert list(mixed(packed, seed=3).skip(7)) == rows[7:]  # as a resumed training reads it
