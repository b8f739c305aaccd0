"""From a file, folder or hub name to the rows that a model is trained on: tokenized once, kept in a cache on disk.

Records go through an Arrow file in pieces and rows come back memory-mapped, so memory does not grow with the data.
The cache is found by what the rows depend on: the data's bytes, the tokenizer, the template and settings,
`max_length`, the versions at work. What cannot be hashed is not cached. The rows are those of `tokenize_records`.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import inspect
import itertools
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.chat_templates import said_of_records
from convexlm.dataset_names import parse_dataset
from convexlm.errors import UserError
from convexlm.files import file_sha256, json_sha256, write_atomic
from convexlm.instruction_rows import load_dataset
from convexlm.instructions import FORMATS, Record, check_max_records, detect_format, iter_records, no_records
from convexlm.own_prompts import first_own_prompt
from convexlm.progress import note
from convexlm.templates import get_template
from convexlm.tokenization import answer_end, check_max_length, nothing_left, tokenize_batch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from convexlm.tokenization import PromptSettings

    _Pair = tuple[Record, Mapping[str, Any]]

META_FILE = "convexlm-data.json"
_KEPT, _CUT, _DROPPED = 0, 1, 2
_WRITE_BATCH, _MAP_BATCH = 1000, 500
_temporary: list[tempfile.TemporaryDirectory[str]] = []  # rows that could not be cached, until the process ends


@dataclass(frozen=True)
class TrainingData:
    """Rows to train on, and what did not fit.

    Attributes:
        dataset: a `datasets.Dataset` with the columns `input_ids`, `labels`, `weight` and `record_id`.
        dropped: ids of the records whose prompt alone fills `max_length`.
        truncated: how many rows lost the end of their answer to `max_length`.
        from_cache: whether an earlier run had tokenized them.
        source: name and hash of the data, as JSON has them; None if there is no hash.
        own_prompt: the id of one of the first records, where their prompts are not the template's.
        with_earlier_answers: how many records of `messages` have assistant turns before the one that is trained on.
    """

    dataset: Any
    dropped: list[str]
    truncated: int
    from_cache: bool
    source: Any = None
    with_earlier_answers: int = 0
    own_prompt: str | None = None


def prepare_data(
    name: str,
    template: str,
    tokenizer: Any,
    settings: PromptSettings,
    max_length: int | None,
    *,
    max_records: int | None = None,
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
) -> TrainingData:
    """Tokenize a dataset, or find it tokenized.

    Args:
        name: as `load_records` takes it.
        template: name of the prompt template.
        tokenizer: any tokenizer of transformers.
        settings: how prompts are made.
        max_length: as `tokenize_records` takes it.
        max_records: use the first so many records only.
        num_proc: worker processes to tokenize in; None: this one.
        cache_dir: where tokenized data are kept; default: `convexlm` in the cache folder of `datasets`.

    Raises:
        UserError: as `load_records` and `tokenize_records`.
    """
    check_max_records(max_records)
    check_max_length(max_length)
    settings = settings.resolve(tokenizer)
    source = _data_hash(name)
    key = _cache_key(source, template, tokenizer, settings, max_length, max_records)
    made = dict(tokenizer=tokenizer, settings=settings, max_length=max_length)
    root = _cache_root(cache_dir) if key else None
    if root is None:
        _temporary.append(tempfile.TemporaryDirectory(prefix="convexlm-data-", ignore_cleanup_errors=True))
        folder = Path(_temporary[-1].name)
        _build(folder / "rows", folder / "work", name, template, max_records, num_proc, made)
        return _load(folder / "rows", False, source)
    folder = root / str(key)
    with _held(root / f"{key}.lock"):  # of several processes one tokenizes, and the others find it done
        found = (folder / META_FILE).is_file()
        if not found:
            work = root / f".{key}.work"
            for leftover in (folder, work):
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                _build(work / "rows", work, name, template, max_records, num_proc, made)
                (work / "rows").replace(folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return _load(folder, found, source)


def _load(folder: Path, from_cache: bool, source: Any) -> TrainingData:
    from datasets import load_from_disk

    meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    rows, earlier = load_from_disk(str(folder)), meta.get("with_earlier_answers", 0)
    own = meta.get("own_prompt")
    return TrainingData(rows, meta["dropped"], meta["truncated"], from_cache, source, earlier, own)


def _build(
    target: Path,
    work: Path,
    name: str,
    template: str,
    max_records: int | None,
    num_proc: int | None,
    made: dict[str, Any],
) -> None:
    """Write the rows of a dataset into the folder `target`, its meta file last."""
    import numpy as np
    from datasets import Dataset, Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    work.mkdir(parents=True, exist_ok=True)
    pairs = itertools.islice(iter_records(name, template=template), max_records)
    count, earlier, own = 0, 0, None
    with ArrowWriter(path=str(work / "records.arrow"), features=Features({"record": Value("large_string")})) as writer:
        for found in _batches(pairs):
            batch = [record for record, _ in found]
            earlier += sum(_has_earlier_answers(record, row) for record, row in found)
            if not count:
                for said in said_of_records(batch, made["tokenizer"], template):
                    note(f"  {name}: {said}")
                own = first_own_prompt(batch, template)
            writer.write_batch({"record": [_to_text(record) for record in batch]})
            count += len(batch)
        if not count:
            raise no_records(name)
        writer.finalize()
    features = Features(
        {
            "input_ids": List(Value("int32")),
            "labels": List(Value("int32")),
            "weight": Value("float64"),
            "record_id": Value("string"),
            "fate": Value("int8"),
        }
    )
    rows = Dataset.from_file(str(work / "records.arrow")).map(
        _tokenize_texts,
        batched=True,
        batch_size=_MAP_BATCH,
        with_indices=True,
        remove_columns=["record"],
        features=features,
        fn_kwargs=made,
        num_proc=min(num_proc, count) if num_proc and num_proc > 1 else None,
        cache_file_name=str(work / "rows.arrow"),
        load_from_cache_file=False,
        new_fingerprint=json_sha256(str(target))[:16],
    )
    fate = np.asarray(rows.with_format("numpy")["fate"][:])
    dropped = list(rows.select(np.flatnonzero(fate == _DROPPED))["record_id"])
    if len(dropped) == count:
        raise nothing_left(dropped, count, made["max_length"])
    if dropped:
        rows = rows.select(np.flatnonzero(fate != _DROPPED))
    rows.remove_columns("fate").save_to_disk(str(target))
    meta = {"dropped": dropped, "truncated": int((fate == _CUT).sum()), "records": count}
    meta |= {"with_earlier_answers": earlier, "own_prompt": own}
    write_atomic(target / META_FILE, json.dumps(meta, ensure_ascii=True) + "\n")


def _batches(pairs: Iterator[_Pair]) -> Iterator[list[_Pair]]:
    while batch := list(itertools.islice(pairs, _WRITE_BATCH)):
        yield batch


def _has_earlier_answers(record: Record, row: Mapping[str, Any]) -> bool:
    """Whether a dialogue has assistant turns that are not trained on; those of a `prompt` are context in TRL, too."""
    turns = record.messages or ()
    return any(turn["role"] == "assistant" for turn in turns) and detect_format(row).name == "messages"


def _to_text(record: Record) -> str:
    return json.dumps([record.prompt, record.completion, record.weight, record.id, record.messages])


def _tokenize_texts(
    batch: dict[str, list[str]], indices: list[int], tokenizer: Any, settings: PromptSettings, max_length: int | None
) -> dict[str, list[Any]]:
    """Rows of a batch of records, those without room for a target empty and marked; runs in worker processes."""
    records = [Record(*json.loads(text)) for text in batch["record"]]
    done = tokenize_batch(records, tokenizer, settings, max_length, start=indices[0])
    rows, dropped, end = iter(done.rows), set(done.dropped), answer_end(tokenizer, settings)
    columns: dict[str, list[Any]] = {key: [] for key in ("input_ids", "labels", "weight", "record_id", "fate")}
    for index, record in zip(indices, records, strict=True):
        name = record.id or f"#{index + 1}"
        if name in dropped:
            row: dict[str, Any] = {"input_ids": [], "labels": [], "weight": record.weight, "record_id": name}
            fate = _DROPPED
        else:
            row = next(rows)
            # A whole row ends in the answer's end, and no text makes one.
            fate = _KEPT if row["input_ids"][-1] == end else _CUT
        for key, value in row.items():
            columns[key].append(value)
        columns["fate"].append(fate)
    return columns


# -- where and by what name


def _cache_root(cache_dir: str | Path | None) -> Path | None:
    """The folder of tokenized data, made; None with a word to the user if it cannot be written."""
    import datasets

    root = Path(cache_dir) if cache_dir else Path(datasets.config.HF_DATASETS_CACHE) / "convexlm"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        if cache_dir:
            raise UserError(f"--dataset_cache_dir {root}: cannot be written ({error.strerror or error})") from None
        note(f"  {root}: cannot be written ({error.strerror or error}); tokenised data are not kept")
        return None
    return root


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _cache_key(
    data: Any,
    template: str,
    tokenizer: Any,
    settings: PromptSettings,
    max_length: int | None,
    max_records: int | None,
) -> str | None:
    """The hash of all that the rows depend on; None if some of it cannot be hashed."""
    spelled, code = tokenizer_hash(tokenizer), _code_hash(template)
    if data is None or spelled is None or code is None:
        return None
    return json_sha256(
        {
            "data": data,
            "tokenizer": spelled,
            "code": code,
            "settings": [settings.template, settings.add_bos],
            "template": template,
            "max_length": max_length,
            "max_records": max_records,
            "versions": [
                importlib.metadata.version(package) for package in ("tokenizers", "transformers", "datasets")
            ],
        }
    )[:32]


def _data_hash(name: str) -> Any:
    """What identifies the data: ids of records carry the file's name, so it is a part."""
    base, config, split = parse_dataset(name)
    path = Path(base)
    try:
        if path.is_file():
            return [path.name, file_sha256(path)]
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            content = [[str(file.relative_to(path)), file_sha256(file)] for file in files]
            return [path.name, content, *([config, split] if config or split else [])]
    except (OSError, ValueError):
        return None
    if path.suffix or "/" not in base:
        return None  # sooner a second look than one that goes wrong; `iter_records` says what is the matter
    return [name, getattr(load_dataset(base, split or "train", config=config, is_folder=False), "_fingerprint", None)]


def tokenizer_hash(tokenizer: Any) -> str | None:
    """The hash of what a tokenizer makes of text; None for one that keeps its vocabulary where it cannot be seen."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        vocabulary: Any = backend.to_str()
    else:
        file = getattr(tokenizer, "vocab_file", None)
        if not file or not Path(file).is_file():
            return None
        vocabulary = [file_sha256(file), sorted(map(str, tokenizer.added_tokens_decoder.items()))]
    special = [str(tokenizer.special_tokens_map), tokenizer.bos_token_id, tokenizer.eos_token_id]
    return json_sha256(
        [type(tokenizer).__name__, vocabulary, special, getattr(tokenizer, "chat_template", None), _options(tokenizer)]
    )


def _options(tokenizer: Any) -> Mapping[str, Any]:
    plain = (bool, int, float, str, type(None))
    options = getattr(tokenizer, "init_kwargs", {})
    # Where it was loaded from says nothing of what it does.
    return {key: value for key, value in options.items() if isinstance(value, plain) and "path" not in key}


def _code_hash(template: str) -> list[str] | None:
    """The hash of the code that makes rows of records: this package's, and what plugins have registered."""
    from convexlm import chat_templates, instruction_rows, instructions, templates, tokenization

    functions: list[Any] = [*(known.read for known in FORMATS.values()), get_template(template).render]
    modules = (instruction_rows, instructions, templates, chat_templates, tokenization)
    files = {inspect.getsourcefile(module) for module in modules}
    try:
        files |= {inspect.getsourcefile(inspect.unwrap(function)) for function in functions}
        code = sorted(file_sha256(str(file)) for file in files)
        # A template from a text is a closure, whose file may be the same for another text.
        cells = getattr(get_template(template).render, "__closure__", None) or ()
        return [*code, *(repr(cell.cell_contents) for cell in cells)]
    except (TypeError, OSError, ValueError):
        return None
