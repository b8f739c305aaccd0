"""Test sets are read line by line, as their files have them, and refuse what does not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from convexlm.errors import UserError
from convexlm.testsets import TestSet, known_kinds, load_test_set, part_of, register_test_set_kind

NEWSTEST = {"name": "wmt22", "sources": "{pair}/src.{src}", "references": ["{pair}/ref.{tgt}"]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "en-de").mkdir()
    (tmp_path / "en-de/src.en").write_bytes("a\u2028b\nc\x85d\n\ne\n".encode())
    (tmp_path / "en-de/ref.de").write_bytes(b"\xef\xbb\xbfeins\r\nzwei\r\n\r\nvier\r\n")
    return tmp_path


def test_files_are_split_on_newlines_only(folder):
    loaded = load_test_set(NEWSTEST, "en-de", folder)
    assert loaded.sources == ["a\u2028b", "c\x85d", "", "e"]
    assert loaded.references == [["eins", "zwei", "", "vier"]]
    assert loaded.ids == ["0", "1", "2", "3"]
    assert (loaded.name, loaded.pair) == ("wmt22", "en-de")


def test_references_may_be_one_pattern_several_or_none(folder):
    one = load_test_set({**NEWSTEST, "references": "{pair}/ref.{tgt}"}, "en-de", folder)
    two = load_test_set({**NEWSTEST, "references": ["{pair}/ref.{tgt}"] * 2}, "en-de", str(folder))
    none = load_test_set({"name": "x", "kind": "files", "sources": str(folder / "{pair}/src.{src}")}, "en-de")
    assert [len(one.references), len(two.references), len(none.references)] == [1, 2, 0]


def test_limit_takes_the_first_lines(folder):
    loaded = load_test_set({**NEWSTEST, "limit": 2}, "en-de", folder)
    assert loaded.sources == ["a\u2028b", "c\x85d"]
    assert loaded.references == [["eins", "zwei"]]
    assert loaded.ids == ["0", "1"]
    assert len(load_test_set({**NEWSTEST, "limit": 99}, "en-de", folder).sources) == 4
    assert part_of(loaded, limit=1).references == [["eins"]]


def test_one_file_may_be_parted_into_validation_and_test(folder):
    held_out = load_test_set({**NEWSTEST, "limit": 1}, "en-de", folder)
    rest = load_test_set({**NEWSTEST, "skip": 1}, "en-de", folder)
    middle = load_test_set({**NEWSTEST, "skip": 1, "limit": 2}, "en-de", folder)
    whole = load_test_set(NEWSTEST, "en-de", folder)
    assert held_out.sources + rest.sources == whole.sources
    assert held_out.references[0] + rest.references[0] == whole.references[0]
    assert held_out.ids + rest.ids == whole.ids
    assert (middle.sources, middle.ids) == (whole.sources[1:3], ["1", "2"])
    for skip, message in ((4, "leaves none of its 4 lines"), (-1, "`skip` must be"), (True, "`skip` must be")):
        with pytest.raises(UserError, match=message):
            load_test_set({**NEWSTEST, "skip": skip}, "en-de", folder)


@pytest.mark.parametrize("limit", [0, -1, "2", 1.5, True])
def test_a_limit_that_is_none_is_refused(folder, limit):
    with pytest.raises(UserError, match="limit"):
        load_test_set({**NEWSTEST, "limit": limit}, "en-de", folder)


def test_streams_of_different_length_are_refused_with_both_counts(folder):
    (folder / "en-de/ref.de").write_text("eins\nzwei\n")
    with pytest.raises(UserError, match=r"src\.en has 4 lines but .*ref\.de has 2"):
        load_test_set({**NEWSTEST, "limit": 1}, "en-de", folder)


@pytest.mark.parametrize(
    ("change", "pair", "message"),
    [
        ({}, "en-fr", "no pair `en-fr`"),
        ({}, "ende", "ende"),
        ({"pairs": ["de-en", "en-zh"]}, "en-de", "it has: de-en, en-zh"),
        ({"references": ["{pair}/nothing"]}, "en-de", "no such file"),
        ({"sources": "{pari}/src.{src}"}, "en-de", "unknown placeholder {pari}"),
        ({"sources": 3}, "en-de", "file path"),
        ({"refrences": "x"}, "en-de", "unknown entry `refrences`"),
        ({"kind": "wmt"}, "en-de", "known: files, sacrebleu, summarization, tinyworld"),
        ({"name": "../x"}, "en-de", "`name`"),
        ({"name": None}, "en-de", "`name`"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(folder, change, pair, message):
    with pytest.raises(UserError) as refusal:
        load_test_set({**NEWSTEST, **change}, pair, folder)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["x.jsonl", "x.JSON", "x.txt"])
@pytest.mark.parametrize("key", ["source", "reference"])
def test_records_are_not_taken_for_sentences(folder, name, key):
    """Every line would be a prompt, or a reference, of braces and quotes."""
    (folder / name).write_text(f'{{"id": 1, "{key}": "a"}}\n' * 4)
    with pytest.raises(UserError, match=f"is JSON, and would be read as plain text.* one {key} a line"):
        load_test_set({**NEWSTEST, f"{key}s": name}, "en-de", folder)
    (folder / "en-de/src.en").write_text('{"code": 1}\n' * 4)
    assert load_test_set(NEWSTEST, "en-de", folder).sources[0] == '{"code": 1}', "a sentence that is JSON itself"


def test_an_empty_file_and_an_entry_without_sources_are_refused(folder):
    (folder / "en-de/src.en").write_text("")
    with pytest.raises(UserError, match="empty"):
        load_test_set(NEWSTEST, "en-de", folder)
    with pytest.raises(UserError, match="give `sources:`"):
        load_test_set({"name": "x"}, "en-de", folder)


def test_a_kind_is_one_function(monkeypatch):
    monkeypatch.setattr("convexlm.testsets._KINDS", {})

    @register_test_set_kind("numbers", keys=("count",))
    def load(spec, pair, base_dir):
        lines = [str(number) for number in range(spec["count"])]
        return TestSet(spec["name"], pair, lines, [], lines)

    spec = {"name": "n", "kind": "numbers", "count": 5, "limit": 3}
    assert load_test_set(spec, "en-de").sources == ["0", "1", "2"]
    assert "numbers" in known_kinds()
    with pytest.raises(UserError, match="no sentence"):
        load_test_set({**spec, "count": 0}, "en-de")


def in_fresh_process(cache, spec, pair):
    """sacreBLEU takes its cache folder from the environment when it is imported."""
    program = (
        "import json, sys\n"
        "from convexlm.errors import UserError\n"
        "from convexlm.testsets import load_test_set\n"
        "try:\n"
        "    t = load_test_set(json.loads(sys.argv[1]), sys.argv[2])\n"
        "    print(json.dumps([t.name, t.sources, t.references, t.meta]))\n"
        "except UserError as error:\n"
        "    print(json.dumps(str(error)))\n"
    )
    # A proxy that nothing listens at stands for a machine without a network.
    offline = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(spec), pair],
        env={**os.environ, **offline, "SACREBLEU": str(cache)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def cache(shared_data, tmp_path_factory):
    copy = tmp_path_factory.mktemp("sacrebleu") / "cache"
    # The copy must be writable whatever the original is: sacreBLEU writes what it unpacks into it.
    shutil.copytree(shared_data / "sacrebleu", copy, copy_function=shutil.copyfile)
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o755)
    return copy


def test_sacrebleu_reads_the_lines_of_the_plain_files(cache, shared_data):
    name, sources, references, meta = in_fresh_process(cache, {"name": "wmt22", "kind": "sacrebleu"}, "en-zh")
    plain = shared_data / "wmt22"
    assert name == "wmt22"
    assert sources == (plain / "newstest22.en-zh.en").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert references == [(plain / "newstest22.en-zh.zh").read_text(encoding="utf-8").rstrip("\n").split("\n")]
    assert meta["references"] == ["wmt22.en-zh.ref-A"]


def test_sacrebleu_references_are_chosen_by_translator(cache):
    spec = {"name": "wmt22", "kind": "sacrebleu", "references": ["A", "B"], "limit": 3}
    _, sources, references, _ = in_fresh_process(cache, spec, "en-zh")
    assert [len(sources), *map(len, references)] == [3, 3, 3]
    assert references[0] != references[1]
    assert "no reference `Z`; it has: A" in in_fresh_process(cache, {**spec, "references": ["Z"]}, "en-zh")


def test_sacrebleu_without_a_network_says_how_to_mend_it(tmp_path):
    message = in_fresh_process(tmp_path / "empty", {"name": "wmt22", "kind": "sacrebleu"}, "en-de")
    assert "set SACREBLEU to a folder" in message
    assert "\n" not in message


def test_sacrebleu_names_the_pairs_it_has():
    with pytest.raises(UserError, match=r"no pair `en-fr`; it has: .*en-zh"):
        load_test_set({"name": "wmt22", "kind": "sacrebleu"}, "en-fr")
    with pytest.raises(UserError, match="no test set `wmt99`"):
        load_test_set({"name": "wmt99", "kind": "sacrebleu"}, "en-de")
