"""Hypotheses and references from files, one segment a sentence, and whether several files go together line by line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.files import read_jsonl, read_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

_JSON_LINES = (".jsonl", ".jsonl.gz")
_JSON = (*_JSON_LINES, ".json", ".json.gz")


@dataclass(frozen=True)
class Segments:
    """The segments of a file.

    Attributes:
        path: the file's name as given.
        texts: one a sentence, in the file's order.
        ids: each record's `id` as text, where every record has one; None otherwise, and for plain text.
        sources: each record's `source`, likewise.
    """

    path: str
    texts: list[str]
    ids: list[str] | None = None
    sources: list[str] | None = None


def read_hypotheses(path: str | Path) -> list[str]:
    r"""The hypotheses of a file: plain text, one a line, or a `.jsonl` file as `convexlm decode` writes it.

    In JSON Lines the order is the file's, and a `\n` inside a hypothesis becomes a space, as it would in plain text.

    Raises:
        UserError: as `read_segments`.
    """
    return read_segments(path, "hypothesis").texts


def read_references(path: str | Path) -> list[str]:
    """The references of a file: plain text, or JSON Lines with the key `reference`; otherwise as `read_hypotheses`."""
    return read_segments(path, "reference").texts


def read_segments(path: str | Path, key: str) -> Segments:
    """The segments of a file, with ids and sources where its records have them.

    Args:
        path: plain text, or JSON Lines by its name (`.jsonl`, `.jsonl.gz`, in small or capital letters).
        key: where a record of JSON Lines has its text, `hypothesis` or `reference`.

    Raises:
        UserError: no such file, empty, not UTF-8, a broken line, a record without text, an id given twice, or JSON
            Lines under another name.
    """
    name = Path(path).name.lower()
    if name.endswith(".jsonl.part"):
        raise UserError(f"{path}: decoding is not finished; run it again to go on")
    if not name.endswith(_JSON_LINES):
        lines = read_lines(path)
        if _are_records(lines, key):
            raise UserError(
                f"{path}: its lines are JSON records with `{key}`; give the file a name that ends in .jsonl, or it "
                "would be scored as plain text"
            )
        return Segments(str(path), lines)
    records = list(read_jsonl(path))
    texts, seen = [], set()
    for number, record in enumerate(records, start=1):
        if not isinstance(record.get(key), str):
            raise UserError(f"{path}, record {number}: no text under `{key}`")
        if record.get("id") is not None:
            identity = str(record["id"])
            if identity in seen:
                raise UserError(f"{path}, record {number}: the id `{identity}` is given twice")
            seen.add(identity)
        texts.append(record[key].replace("\n", " "))
    if not texts:
        raise UserError(f"{path}: the file is empty")
    return Segments(str(path), texts, _all_of(records, "id"), _all_of(records, "source"))


def read_plain(path: str | Path, key: str) -> list[str]:
    """The lines of a text file where records would be taken for text.

    Args:
        path: plain text, one segment a line.
        key: what a record would have its text under, such as `source`.

    Raises:
        UserError: no such file, empty, not UTF-8, or JSON by its name or by its lines.
    """
    lines = read_lines(path)
    if Path(path).name.lower().endswith(_JSON) or _are_records(lines, key):
        raise UserError(f"{path}: is JSON, and would be read as plain text; give a text file with one {key} a line")
    return lines


def check_aligned(streams: Sequence[Segments], names: Sequence[str] | None = None) -> None:
    """See that files go together line by line: of one length, and with the same ids and sources where they have them.

    Args:
        streams: the files; those of plain text have neither ids nor sources, and only their length is looked at.
        names: what to call each of them in a message; their paths by default.

    Raises:
        UserError: they do not; the message names the first record that differs.
    """
    called = list(names or [stream.path for stream in streams])
    check_lengths({name: stream.texts for name, stream in zip(called, streams, strict=True)})
    for what in ("ids", "sources"):
        having = [(name, getattr(one, what)) for name, one in zip(called, streams, strict=True) if getattr(one, what)]
        for name, values in having[1:]:
            first, expected = having[0]
            place = next((n for n, pair in enumerate(zip(expected, values, strict=True)) if pair[0] != pair[1]), None)
            if place is None:
                continue
            same = "; they have the same ones in another order" if sorted(values) == sorted(expected) else ""
            raise UserError(
                f"record {place + 1}: the {what[:-1]} is {expected[place]!r:.60} in {first} but "
                f"{values[place]!r:.60} in {name}{same}; files must go record by record"
            )


def check_lengths(streams: dict[str, Sequence[str]]) -> None:
    """See that streams, by name, are of one length, and not empty.

    Raises:
        UserError: they are not; the message names two that differ, with their counts.
    """
    if not streams:
        raise UserError("there are no references to score against")
    (first, expected), *others = ((name, len(stream)) for name, stream in streams.items())
    for name, count in others:
        if count != expected:
            raise UserError(f"{first} has {expected} lines but {name} has {count}; they must go line by line")
    if expected == 0:
        raise UserError(f"{first}: there is no sentence in it")


def _all_of(records: Sequence[dict[str, Any]], key: str) -> list[str] | None:
    """The texts (or numbers, as texts) of a key that every record has; None if one lacks it."""
    if not all(isinstance(record.get(key), (str, int)) for record in records):
        return None
    return [str(record[key]) for record in records]


def _are_records(lines: Sequence[str], key: str) -> bool:
    """Whether every line that is not blank is a JSON object with a text under `key`, as in a decode file."""
    found = [line for line in lines if line.strip()]
    if not found or not all(line.lstrip().startswith("{") for line in found):
        return False
    try:
        return all(isinstance(json.loads(line).get(key), str) for line in found)
    except (ValueError, RecursionError):
        return False
