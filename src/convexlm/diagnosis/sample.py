"""The records to measure: a random sample of a data set, with the value of a field that says where each is from."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.instructions import Record, iter_records

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    _Item = tuple[Record, Mapping[str, Any]]

SOURCE_FIELDS = ("source", "dataset", "origin", "subset", "domain", "category", "task", "pair", "lang", "language")
"""Names under which data sets say where a record is from, the most telling first."""
MOST_SOURCES = 40
UNKNOWN_SOURCE = "(none)"


@dataclass(frozen=True)
class RecordSample:
    """Records of a data set, in its order.

    Attributes:
        records: the sample.
        sources: each one's value of `source_field`; None if there is no such field.
        source_field: the field's name, or None.
        total: records in the whole data set.
        judged: each one's value of `judged_field`: right, wrong or None; None if none was named.
    """

    records: list[Record]
    sources: list[str] | None
    source_field: str | None
    total: int
    judged: list[bool | None] | None = None


def sample_records(
    dataset: str | Path,
    *,
    template: str = "alpaca",
    max_records: int | None = 2000,
    seed: int = 0,
    source_field: str | None = None,
    judged_field: str | None = None,
) -> RecordSample:
    """Stream a data set and draw `max_records` of it without replacement; the same seed draws the same records.

    Args:
        dataset: as `load_records` takes it.
        template: the prompt template.
        max_records: the size of the sample; None takes all.
        seed: of the drawing.
        source_field: the field to group records by. By default the first of `SOURCE_FIELDS` whose values are few and
            short enough to be names; a source sentence under `source` is not.
        judged_field: the field that says whether the answer is right: true or 1, false or 0; missing or null where
            nobody has judged it.

    Raises:
        UserError: the data cannot be read, `max_records` is below 1, no record has the named field, or the sample has
            no record that was judged right, or none that was judged wrong.
    """
    if max_records is not None and max_records < 1:
        raise UserError(f"--max_records must be at least 1, not {max_records}")
    drawn, total = _draw(iter_records(dataset, template=template), max_records, random.Random(seed))
    if not drawn:
        raise UserError(f"{dataset}: there are no records in it")
    kept, fields = [record for record, _ in drawn], [row for _, row in drawn]
    judged = None if judged_field is None else _judged(kept, fields, judged_field, total)
    if source_field is not None:
        if not any(source_field in row for row in fields):
            raise UserError(f"--source_field {source_field}: no record of {dataset} has such a field")
        return RecordSample(kept, _values(fields, source_field), source_field, total, judged)
    for name in SOURCE_FIELDS:
        if any(isinstance(row.get(name), str) for row in fields):
            values = _values(fields, name)
            if _are_names(values):
                return RecordSample(kept, values, name, total, judged)
    return RecordSample(kept, None, None, total, judged)


def _draw(items: Iterator[_Item], size: int | None, rng: random.Random) -> tuple[list[_Item], int]:
    """`size` items of a stream, each set of them as likely as any other, in the stream's order; and how many it had.

    A reservoir: what is not drawn is not kept, so memory does not grow with the stream.
    """
    kept: list[tuple[int, _Item]] = []
    number = -1
    for number, item in enumerate(items):
        if size is None or len(kept) < size:
            kept.append((number, item))
        elif (place := rng.randrange(number + 1)) < size:
            kept[place] = (number, item)
    kept.sort(key=lambda pair: pair[0])
    return [item for _, item in kept], number + 1


def _judged(records: Sequence[Record], rows: Sequence[Mapping[str, Any]], name: str, total: int) -> list[bool | None]:
    found: list[bool | None] = []
    for record, row in zip(records, rows, strict=True):
        value = row.get(name)
        if value is not None and (not isinstance(value, (bool, int, float)) or value not in (0, 1)):
            raise UserError(
                f"--judged_field {name}: {record.id} has {str(value)!r:.40}; write true where the answer is right, "
                "false where it is wrong, null where nobody has judged it"
            )
        found.append(None if value is None else bool(value))
    for side, word in ((True, "true (right)"), (False, "false (wrong)")):
        if side not in found:
            advice = "; raise --max_records" if total > len(records) else ""
            raise UserError(f"--judged_field {name}: {len(records)} records, and none of them has {word}{advice}")
    return found


def _values(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    return [UNKNOWN_SOURCE if row.get(name) is None else str(row[name]) for row in rows]


def _are_names(values: list[str]) -> bool:
    """Whether values name groups: at least two, on the whole of several records each, and short."""
    kinds = set(values)
    return 2 <= len(kinds) <= min(MOST_SOURCES, len(values) // 2) and all(len(kind) <= 60 for kind in kinds)
