"""The records to measure: a random sample of a data set, with the value of a field that says where each is from."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.instructions import Record, _rows, load_records

if TYPE_CHECKING:
    from pathlib import Path

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
    """

    records: list[Record]
    sources: list[str] | None
    source_field: str | None
    total: int


def sample_records(
    dataset: str | Path,
    *,
    template: str = "alpaca",
    max_records: int | None = 2000,
    seed: int = 0,
    source_field: str | None = None,
) -> RecordSample:
    """Read a data set and draw `max_records` of it without replacement; the same seed draws the same records.

    Args:
        dataset: as `load_records` takes it.
        template: the prompt template.
        max_records: the size of the sample; None takes all.
        seed: of the drawing.
        source_field: the field to group records by. By default the first of `SOURCE_FIELDS` whose values are few and
            short enough to be names; a source sentence under `source` is not.

    Raises:
        UserError: the data cannot be read, `max_records` is below 1, or no record has the named field.
    """
    if max_records is not None and max_records < 1:
        raise UserError(f"--max_records must be at least 1, not {max_records}")
    records = load_records(dataset, template=template)
    chosen = range(len(records))
    if max_records is not None and max_records < len(records):
        chosen = sorted(random.Random(seed).sample(chosen, max_records))  # type: ignore[assignment]
    kept = [records[index] for index in chosen]
    # A record keeps its text and weight only, so what else a row says is read from the file again.
    wanted = {record.id for record in kept}
    rows = {row_id: row for row_id, _, row in _rows(dataset, "train") if row_id in wanted}
    fields = [rows.get(record.id) or {} for record in kept]
    if source_field is not None:
        if not any(source_field in row for row in fields):
            raise UserError(f"--source_field {source_field}: no record of {dataset} has such a field")
        return RecordSample(kept, _values(fields, source_field), source_field, len(records))
    for name in SOURCE_FIELDS:
        if any(isinstance(row.get(name), str) for row in fields):
            values = _values(fields, name)
            if _are_names(values):
                return RecordSample(kept, values, name, len(records))
    return RecordSample(kept, None, None, len(records))


def _values(rows: list[dict[str, Any]], name: str) -> list[str]:
    return [UNKNOWN_SOURCE if row.get(name) is None else str(row[name]) for row in rows]


def _are_names(values: list[str]) -> bool:
    """Whether values name groups: at least two, on the whole of several records each, and short."""
    kinds = set(values)
    return 2 <= len(kinds) <= min(MOST_SOURCES, len(values) // 2) and all(len(kind) <= 60 for kind in kinds)
