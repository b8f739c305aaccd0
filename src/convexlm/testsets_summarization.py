"""The test set kind `summarization`: documents and their summaries, as CNN/DailyMail and XSum come.

    test_sets:
      - {name: cnn_dailymail, kind: summarization, pairs: [en-en], file: data/cnn_dm.csv.zip}

The file is a table: `.csv`, or JSON Lines (`.jsonl`, `.json`), plain, gzipped, or alone in a `.zip`. A summary is
in the language of its document, so the pair is that language twice: `en-en` makes the summaries score as English.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.files import file_sha256, not_utf8
from convexlm.testsets import TestSet, register_test_set_kind

if TYPE_CHECKING:
    from collections.abc import Mapping

COLUMNS = (("article", "highlights"), ("document", "summary"))
"""Source and reference columns that are known by themselves: CNN/DailyMail's and XSum's."""

Row = dict[str, Any]


@register_test_set_kind("summarization", keys=("file", "source_column", "reference_column"))
def load_summarization(spec: Mapping[str, Any], pair: str, base_dir: Path) -> TestSet:
    """Read documents and summaries; a column `id` with a value for every document, each once, gives the ids.

    Raises:
        UserError: a pair of two languages, no such file or column, a damaged file, or a row without a document.
    """
    name = spec["name"]
    source_language, target_language = pair.split("-")
    if source_language != target_language:
        raise UserError(
            f"test set `{name}`: a summary is in its document's language; write the pair as that language twice, such "
            f"as {source_language}-{source_language}, not {pair}"
        )
    if not isinstance(spec.get("file"), str) or not spec["file"]:
        raise UserError(f"test set `{name}`: `file` must be a file path, not {spec.get('file')!r}")
    path = base_dir / Path(spec["file"]).expanduser()
    rows = _read_table(path)
    if not rows:
        raise UserError(f"{path}: there is no document in it")
    source, reference = _columns(spec, rows[0], path)
    texts: dict[str, list[str]] = {source: [], reference: []}
    for number, row in enumerate(rows, start=1):
        for column, values in texts.items():
            value = row.get(column)
            if not isinstance(value, str):
                raise UserError(f"{path}, row {number}: `{column}` is no text, but {value!r:.40}")
            values.append(value)
    ids = [str(row.get("id", "")) for row in rows]
    if len(set(ids)) < len(ids) or "" in ids:
        ids = [str(number) for number in range(len(rows))]
    meta = {"kind": "summarization", "file_sha256": file_sha256(path), "columns": [source, reference]}
    return TestSet(name.replace("/", "_"), pair, texts[source], [texts[reference]], ids, meta)


def _columns(spec: Mapping[str, Any], row: Row, path: Path) -> tuple[str, str]:
    given = (spec.get("source_column"), spec.get("reference_column"))
    for source, reference in COLUMNS:
        source, reference = given[0] or source, given[1] or reference
        if source in row and reference in row:
            return source, reference
    wanted = " or ".join(f"`{source}` and `{reference}`" for source, reference in COLUMNS)
    raise UserError(
        f"{path}: no columns {wanted if given == (None, None) else given}; it has: {', '.join(map(str, row))} (name "
        "them with `source_column` and `reference_column`)"
    )


def _read_table(path: Path) -> list[Row]:
    try:
        raw, name = _unpacked(path)
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise not_utf8(path, error.object[:8], line, error.object[error.start]) from None
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if name.endswith(".csv"):
        return _read_csv(path, text)
    if name.endswith((".jsonl", ".json")):
        return _read_json(path, text)
    raise UserError(f"{path}: expected a .csv, .jsonl or .json file, plain, .gz or alone in a .zip, not {name}")


def _unpacked(path: Path) -> tuple[bytes, str]:
    """The bytes of the table, and the name that says what they are."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
            if len(names) != 1:
                raise UserError(f"{path}: expected one file in it, found {len(names)}")
            return archive.read(names[0]), names[0].lower()
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        return gzip.decompress(raw), path.name.lower().removesuffix(".gz")
    return raw, path.name.lower()


def _read_csv(path: Path, text: str) -> list[Row]:
    before = csv.field_size_limit(max(len(text), 1))  # a document may be longer than the module expects of a field
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, [])
        if twice := [name for name in header if header.count(name) > 1]:
            raise UserError(f"{path}: two columns are called `{twice[0]}`; give one of them another name")
        rows = []
        for number, fields in enumerate(reader, start=1):
            if not fields:
                continue
            if len(fields) != len(header):
                raise UserError(f"{path}, row {number}: {len(fields)} fields under {len(header)} columns")
            rows.append(dict(zip(header, fields, strict=True)))
        return rows
    except csv.Error as error:
        raise UserError(f"{path}: not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(before)


def _read_json(path: Path, text: str) -> list[Row]:
    """The objects of a list, or one a line."""
    if not text.lstrip().startswith("["):
        return _read_json_lines(path, text)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, record {number}: expected a JSON object, found {type(row).__name__}")
    return list(rows)


def _read_json_lines(path: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
    return rows
