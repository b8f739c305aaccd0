"""Where instruction data lie: a file, a folder or a name on the hub -> rows, as yet of any format."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.dataset_names import parse_dataset
from convexlm.errors import UserError
from convexlm.files import iter_lines, read_text

if TYPE_CHECKING:
    from collections.abc import Iterator

_DATA_SUFFIXES = {".json", ".jsonl", ".gz", ".parquet", ".csv", ".tsv", ".txt", ".zip"}


def iter_rows(dataset: str | Path, split: str | None, streaming: bool = False) -> Iterator[tuple[str, str, Any]]:
    """Every record with its id and with where it is, for messages; see `instructions.iter_records`."""
    name, config, spelled = parse_dataset(dataset)
    path, split = Path(name), spelled or split or "train"
    try:
        kind = "folder" if path.is_dir() else "file" if path.exists() else ""
    except (OSError, ValueError) as error:  # a name too long for the system, a NUL in it
        raise UserError(f"{dataset!s:.80}: no file name and no dataset name ({error})") from None
    if kind == "file":
        if config or spelled:
            raise UserError(f"{dataset}: a file has no configs and no splits; give {name} alone")
        yield from _parquet_rows(path) if path.suffix.lower() == ".parquet" else _json_rows(path, streaming)
        return
    if not kind and (path.suffix in _DATA_SUFFIXES or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)):
        raise UserError(f"{dataset}: no such file")
    rows = load_dataset(name, split, config=config, is_folder=bool(kind), streaming=streaming)
    which = f":{config}" if config else ""
    for number, row in enumerate(rows, start=1):
        yield f"{path.name}{which}[{split}]#{number}", f"{name}{which} [{split}], record {number}", row


def _json_rows(path: Path, streaming: bool = False) -> Iterator[tuple[str, str, Any]]:
    numbered = ((number, line) for number, line in enumerate(iter_lines(path), start=1) if line.strip())
    begin = next(numbered, None)
    if begin is None:
        raise UserError(f"{path}: the file is empty")
    start = begin[1].lstrip()[0]
    if start == "[":
        if streaming:
            raise UserError(f"{path}: a JSON array is read as a whole; for --streaming write one object a line")
        rows = _parse(read_text(path), path, 0)
        if not rows:
            raise UserError(f"{path}: the array is empty")
        for number, row in enumerate(rows, start=1):
            yield f"{path.name}#{number}", f"{path}, record {number}", row
        return
    if start != "{":
        raise UserError(f"{path}: expected a JSON array of objects, or one JSON object a line (JSON Lines)")
    for number, line in itertools.chain([begin], numbered):
        yield f"{path.name}:{number}", f"{path}, line {number}", _parse(line, path, number)


def _parse(text: str, path: Path, line: int) -> Any:
    """JSON from a whole file (`line` is 0) or from one line of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line or error.lineno}"
        raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from None
    except (RecursionError, ValueError) as error:  # nested too deep, or a number with thousands of digits
        where = f"{path}, line {line}" if line else str(path)
        raise UserError(f"{where}: JSON that cannot be read ({error})") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, str, Any]]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{path.name}#{number}", f"{path}, record {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error})") from None


def load_dataset(name: str, split: str, *, is_folder: bool, config: str | None = None, streaming: bool = False) -> Any:
    """A split of a folder or hub name, through `datasets`; code that comes with a dataset is never run.

    Args:
        name: path or hub name, without config and split.
        split: as `datasets.load_dataset` takes it.
        is_folder: it is a path.
        config: one of the dataset's; None: the only one, or its default.
        streaming: read it as it is needed.

    Raises:
        UserError: it cannot be loaded, or has no such split.
    """
    import datasets

    try:
        if is_folder and any((Path(name) / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            if config:
                raise UserError(f"{name}: what `save_to_disk` wrote has no configs, so there is no `{config}`")
            found = datasets.load_from_disk(name)
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise UserError(f"{name}: no split `{split}`; there are: {', '.join(found)}")
                found = found[split]
            elif split != "train":
                raise UserError(f"{name}: a single dataset that `save_to_disk` wrote has no split `{split}`")
            return found
        options: dict[str, Any] = {"streaming": True} if streaming else {}
        if is_folder and _is_of_tables(Path(name)):
            # Else the words None, NA, null, nan and others of a text would be no text.
            options |= {"keep_default_na": False, "na_values": {"weight": [""]}}
        return datasets.load_dataset(name, config, split=split, **options)
    except UserError:
        raise
    except Exception as error:  # the library raises its own, the hub client's and pyarrow's errors here
        lines = (str(error).strip() or type(error).__name__).split("\n")
        reason = lines[0]
        if config is None and reason.startswith("Config name is missing"):
            reason = f"it has several configs, so name one as {name}:CONFIG. {' '.join(lines[1:2])}".strip()
        what = "cannot be loaded as a dataset" if is_folder else "no such file, and not loadable from the hub"
        raise UserError(f"{name}: {what} ({reason})") from None


def _is_of_tables(folder: Path) -> bool:
    """Whether `datasets` reads a folder as CSV: there are such files, and no data of another kind."""
    names = (file.name.lower().removesuffix(".gz") for file in folder.rglob("*") if file.is_file())
    kinds = {Path(name).suffix for name in names} & {*_DATA_SUFFIXES, ".arrow"}
    return bool(kinds) and kinds <= {".csv", ".tsv"}
