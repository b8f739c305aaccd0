from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from convexlm import files
from convexlm.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

# -- writing


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "result.json"
    files.write_atomic(path, "old")

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, "new" * 1000)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["result.json"]


@pytest.mark.slow
def test_a_kill_in_the_middle_of_writing_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    code = (
        "import sys; from convexlm.files import write_atomic\n"
        "for n in range(10**6): write_atomic(sys.argv[1], f'{n % 10}' * 200_000)\n"
    )
    for wait in (0.0, 0.013, 0.029):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)])
        while not path.exists():
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        text = path.read_text()
        assert len(text) == 200_000 and len(set(text)) == 1
        path.unlink()


def test_results_have_the_usual_permissions(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        files.write_atomic(tmp_path / "x", b"bytes")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "x").read_bytes() == b"bytes"


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    text = "a\r\nb\u2028c\x85d\n\ud800"
    files.write_atomic(tmp_path / "x", text)
    assert (tmp_path / "x").read_bytes() == text.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("value", ["Straße 红色", "a\u2028b", "a\x85b\u2029", "lone \ud83d surrogate", 'q"\n\t\\'])
def test_a_json_line_is_one_line_to_every_reader(tmp_path: Path, value: str) -> None:
    line = files.to_json_line({"text": value})
    assert line.endswith("\n") and len(line.splitlines()) == 1
    assert json.loads(line) == {"text": value}
    assert line.encode()  # UTF-8, whatever the text
    if value.startswith("Stra"):
        assert value in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": 1,\n}', ", line 2: not valid JSON"),
        ("[1]", ": expected a JSON object"),
        ('{"a": ' + "9" * 5000 + "}", ": not valid JSON"),
        ('{"a": ' + "[" * 100_000, ": not valid JSON"),
    ],
    ids=["syntax", "list", "digits", "depth"],
)
def test_a_file_that_is_no_json_object_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        files.read_json_object(path)
    assert str(error.value).startswith(f"{path}{said}") and "\n" not in str(error.value)


def test_json_lines_come_back(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"b": "x\ny"}, {}]
    files.write_jsonl(tmp_path / "x.jsonl", iter(rows))
    assert list(files.read_jsonl(tmp_path / "x.jsonl")) == rows
    files.write_jsonl(tmp_path / "x.jsonl", [])
    assert list(files.read_jsonl(tmp_path / "x.jsonl")) == []


# -- JSON Lines


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        ('{"a": 1}\n{"a": }\n', 2, "not valid JSON"),
        ('{"a": 1}\n\n[1]\n', 3, "expected a JSON object, found list"),
        ('{"a": 1}\n{"a"', 2, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}\n", 1, "not valid JSON"),
        ('{"a": ' + "[" * 100_000 + "\n", 1, "not valid JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, content: str, line: int, said: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        list(files.read_jsonl(path))
    assert str(error.value).startswith(f"{path}, line {line}: ") and said in str(error.value)


def test_a_torn_last_line_is_passed_over_only_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    whole = (files.to_json_line({"a": "ä红"}) + files.to_json_line({"b": "ü色"})).encode()
    first = whole.index(b"\n") + 1
    for end in range(first + 1, len(whole) - 1):  # also in the middle of a character
        path.write_bytes(whole[:end])
        expected = [{"a": "ä红"}] + ([{"b": "ü色"}] if end >= len(whole) - 1 else [])
        assert list(files.read_jsonl(path, torn_last_line_ok=True)) == expected
        with pytest.raises(UserError, match="line 2"):
            list(files.read_jsonl(path))
    path.write_bytes(whole[:-1])  # only the line end is missing: the record is whole
    assert len(list(files.read_jsonl(path, torn_last_line_ok=True))) == 2


def test_a_broken_line_within_is_no_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": \n{"b": 1}\n')
    with pytest.raises(UserError, match="line 1"):
        list(files.read_jsonl(path, torn_last_line_ok=True))
    path.write_bytes(b'{"a": "\xff"}\n{"b": 1}\n')
    with pytest.raises(UserError, match="line 1: not UTF-8"):
        list(files.read_jsonl(path, torn_last_line_ok=True))


# -- text


@pytest.mark.parametrize(
    ("raw", "lines"),
    [
        (b"a\nb\n", ["a", "b"]),
        (b"a\nb", ["a", "b"]),
        (b"\xef\xbb\xbfa\r\nb\r\n", ["a", "b"]),
        (b"a\r\nb", ["a", "b"]),
        (b"a\n\nb\n", ["a", "", "b"]),
        (b"a\n\n", ["a", ""]),
        (b"\n", [""]),
        ("a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\n".encode(), ["a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"]),
        (b"a\rb\nc\n", ["a\rb", "c"]),
        (b"a\r\nb\nc\n", ["a\r", "b", "c"]),  # mixed: the one \r is the text's
        (b" a \n\tb\n", [" a ", "\tb"]),
    ],
)
def test_lines_are_split_at_line_feeds_alone(tmp_path: Path, raw: bytes, lines: list[str]) -> None:
    path = tmp_path / "text"
    path.write_bytes(raw)
    assert files.read_lines(path) == lines
    path.write_bytes(gzip.compress(raw))
    assert files.read_lines(path) == lines


def test_unusable_files_are_told_in_one_line(tmp_path: Path) -> None:
    def said(content: bytes | None) -> str:
        path = tmp_path / "file"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError) as error:
            files.read_lines(path)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
        return str(error.value)

    packed = gzip.compress(b"some text " * 1000)
    assert "no such file" in said(None)
    assert "empty" in said(b"")
    assert "empty" in said(gzip.compress(b""))
    assert "line 3: not UTF-8 (byte 0xe4)" in said("a\nb\nä".encode("latin-1"))
    assert "cannot be read" in said(packed[:-20])
    assert "cannot be read" in said(packed[:10])
    assert "cannot be read" in said(packed[:40] + b"\x00\x00\xff\xff" + packed[44:])
    assert "cannot be read" in said(packed[:-8] + b"\x00" * 8)  # a wrong checksum
    with pytest.raises(UserError, match="is a folder"):
        files.read_text(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        files.read_text("a\0b")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (lzma.compress(b"text"), "is compressed with xz; unpack it, or use gzip"),
        (bz2.compress(b"text"), "is compressed with bzip2; unpack it, or use gzip"),
        (b"\x28\xb5\x2f\xfd\x04\x00", "is compressed with zstd; unpack it, or use gzip"),
        (b"PK\x03\x04\x14\x00\xff", "is a zip archive; unpack it"),
        (b"PAR1\x15\xff", "is a parquet file, expected text"),
        ("text".encode("utf-16"), "is UTF-16; convert it to UTF-8 first"),
        (b"\xfe\xff" + "text".encode("utf-16-be"), "is UTF-16; convert it to UTF-8 first"),
    ],
)
def test_what_holds_text_in_another_form_is_called_by_its_name(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    for read in (files.read_text, lambda path: list(files.iter_lines(path))):
        with pytest.raises(UserError) as error:
            read(path)
        assert str(error.value) == f"{path}: {what}"


# -- hashes


def test_hashes_are_those_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"ab" * 2_000_000)
    assert files.file_sha256(path) == hashlib.sha256(b"ab" * 2_000_000).hexdigest()
    assert files.text_sha256(["ä", "b"]) == hashlib.sha256("ä\nb\n".encode()).hexdigest()
    assert files.text_sha256(["a", "b"]) != files.text_sha256(["ab"])
    assert files.json_sha256({"a": 1, "b": [1, 2]}) == files.json_sha256({"b": [1, 2], "a": 1})
    assert files.json_sha256({"a": 1}) != files.json_sha256({"a": "1"})
