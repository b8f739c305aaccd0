"""Documents and summaries: CNN/DailyMail's and XSum's files, and tables that are not what they should be."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import zipfile
from typing import TYPE_CHECKING

import pytest

from convexlm.errors import UserError
from convexlm.testsets import known_kinds, load_test_set

if TYPE_CHECKING:
    from pathlib import Path

DOCUMENT = 'First "line", with a comma.\nSecond\u2028line\x85 \r\nthird ' + "x" * 200_000


def spec(file: object, **more: object) -> dict:
    return {"name": "sums", "kind": "summarization", "file": file, **more}


def table(rows: list[list[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


def test_real_files_are_read_whole(shared_data: Path):
    assert "summarization" in known_kinds()
    path = shared_data / "summarization" / "cnn_dm_train_sample_100.zip"
    cnn = load_test_set(spec(str(path)), "en-en")
    with zipfile.ZipFile(path) as archive:
        import pandas

        expected = pandas.read_csv(archive.open(archive.namelist()[0]))
    assert len(cnn.sources) == len(expected) == 100
    assert cnn.sources == expected["article"].tolist()
    assert cnn.references == [expected["highlights"].tolist()]
    assert cnn.ids == expected["id"].tolist()
    xsum = load_test_set(spec("xsum_sample.hf_fixture.json", limit=4), "en-en", shared_data / "summarization")
    lines = (shared_data / "summarization" / "xsum_sample.hf_fixture.json").read_text(encoding="utf-8").split("\n")
    assert xsum.sources == [json.loads(line)["document"] for line in lines[:4]]
    assert xsum.references == [[json.loads(line)["summary"] for line in lines[:4]]]


def test_text_is_kept_as_it_is_in_every_packing(tmp_path: Path):
    text = table([["article", "highlights"], [DOCUMENT, "a\nb"], ["", ""]])
    (tmp_path / "plain.csv").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "packed.csv.gz").write_bytes(gzip.compress(text.encode()))
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.writestr("inner/table.CSV", text)
    rows = [{"id": 7, "text": DOCUMENT, "short": "a\nb"}, {"id": 8, "text": "", "short": ""}]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    columns = {"source_column": "text", "reference_column": "short"}
    sets = [load_test_set(spec(name), "en-en", tmp_path) for name in ("plain.csv", "packed.csv.gz", "packed.zip")]
    sets.append(load_test_set(spec("lines.jsonl", **columns), "en-en", tmp_path))
    sets.append(load_test_set(spec("list.json", **columns), "en-en", tmp_path))
    for loaded in sets:
        assert loaded.sources == [DOCUMENT, ""]
        assert loaded.references == [["a\nb", ""]]
    assert [loaded.ids for loaded in sets[2:]] == [["0", "1"], ["7", "8"], ["7", "8"]]


def test_what_does_not_fit_is_refused(tmp_path: Path):
    (tmp_path / "odd.csv").write_text("article,highlights\na,b\nc\n")
    (tmp_path / "other.csv").write_text("title,body\na,b\n")
    (tmp_path / "open.csv").write_text('article,highlights\n"a,b\n')
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "null.jsonl").write_text('{"document": null, "summary": "x"}\n')
    (tmp_path / "bad.jsonl").write_text('{"document": "a", "summary": "x"}\n{"docu\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "broken.json").write_text('[\n {"document": "a", "summary": "b"},\n {"document" }\n]')
    (tmp_path / "latin.csv").write_bytes("article,highlights\n\xe9,b\n".encode("latin-1"))
    (tmp_path / "twice.csv").write_text("article,highlights,article\na,b,c\n")
    (tmp_path / "packed.csv").write_bytes(lzma.compress(b"article,highlights\na,b\n"))
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 broken")
    (tmp_path / "table.txt").write_text("x")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        for name in ("a.csv", "b.csv"):
            archive.writestr(name, "x")
    for file, message in (
        ("odd.csv", "row 2: 1 fields under 2 columns"),
        ("other.csv", "it has: title, body"),
        ("open.csv", "not valid CSV"),
        ("empty.csv", "no document"),
        ("null.jsonl", "row 1: `document` is no text"),
        ("bad.jsonl", "line 2: not valid JSON"),
        ("list.jsonl", "record 1: expected a JSON object"),
        ("broken.json", "line 3: not valid JSON"),
        ("latin.csv", "line 2: not UTF-8"),
        ("twice.csv", "two columns are called `article`"),
        ("packed.csv", "is compressed with xz"),
        ("broken.zip", "cannot be read"),
        ("two.zip", "found 2"),
        ("table.txt", "expected a .csv"),
        ("none.csv", "no such file"),
        (3, "`file` must be"),
    ):
        with pytest.raises(UserError, match=message):
            load_test_set(spec(file), "en-en", tmp_path)
    with pytest.raises(UserError, match="such as en-en, not en-de"):
        load_test_set(spec("odd.csv"), "en-de", tmp_path)
    with pytest.raises(UserError, match="unknown entry `sources`"):
        load_test_set(spec("odd.csv", sources="x"), "en-en", tmp_path)
