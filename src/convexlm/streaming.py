"""Training data that are read and tokenized while training goes on, for datasets larger than memory.

The rows are those that `tokenize_records` makes, in the same order. The stream has no end: after its last record it
begins again, so that the position in it is a number of rows and nothing else, and a resumed run finds the same
place by passing over as many.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from convexlm.chat_templates import said_of_records
from convexlm.dataset_names import parse_dataset
from convexlm.errors import UserError
from convexlm.instructions import check_max_records, iter_records, no_records
from convexlm.own_prompts import first_own_prompt
from convexlm.progress import note
from convexlm.tokenization import check_max_length, nothing_left, tokenize_batch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from convexlm.instructions import Record
    from convexlm.tokenization import PromptSettings

SHARDS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
_BATCH = 64


class RecordStream:
    """An endless stream of rows with `input_ids`, `labels`, `weight` and `record_id`; calling it starts it anew.

    Args:
        dataset: a file, a folder of shards (JSON Lines, plain or `.gz`, and `.parquet`, read in the order of their
            names), a folder that `datasets` wrote, or a name on the hub.
        template: name of the prompt template.
        tokenizer: any tokenizer of transformers.
        settings: how prompts are made; resolved.
        max_length: as `tokenize_records` takes it.
        shuffle_buffer: how many records to hold and draw from at random; 0 or 1: in the order of the data.
        seed: of the drawing, which is another in every pass over the data.
        max_records: use the first so many records only.
    """

    def __init__(
        self,
        dataset: str,
        template: str,
        tokenizer: Any,
        settings: PromptSettings,
        max_length: int | None,
        *,
        shuffle_buffer: int = 0,
        seed: int = 0,
        max_records: int | None = None,
    ) -> None:
        check_max_length(max_length)
        check_max_records(max_records)
        self.dataset, self.template = dataset, template
        self.tokenizer, self.settings, self.max_length = tokenizer, settings, max_length
        self.shuffle_buffer, self.seed, self.max_records = shuffle_buffer, seed, max_records
        self._told = self._looked = False
        self.own_prompt: str | None = None  # the id of one of the first records whose prompt is not the template's

    def __call__(self) -> Iterator[dict[str, Any]]:
        """The rows, again and again.

        Raises:
            UserError: as `iter_records` and `tokenize_records`, when the record in question is reached.
        """
        for epoch in itertools.count():
            yield from self.one_pass(epoch)

    def one_pass(self, epoch: int = 0) -> Iterator[dict[str, Any]]:
        """The rows of one pass over the data."""
        records = self._records()
        if self.shuffle_buffer > 1:
            records = shuffled(records, self.shuffle_buffer, Random(f"{self.seed}/{epoch}"))
        rows = truncated = start = dropped = weighed = 0
        named: list[str] = []
        while batch := list(itertools.islice(records, _BATCH)):
            if not self._looked:
                for said in said_of_records(batch, self.tokenizer, self.template):
                    note(f"  {self.dataset}: {said}")
                self.own_prompt = first_own_prompt(batch, self.template)
            self._looked = True
            done = tokenize_batch(batch, self.tokenizer, self.settings, self.max_length, start)
            start += len(batch)
            rows += len(done.rows)
            truncated += done.truncated
            dropped += len(done.dropped)
            weighed += sum(row["weight"] > 0 for row in done.rows)
            named += done.dropped[: 5 - len(named)]
            yield from done.rows
        if not start:
            raise no_records(self.dataset)
        if not rows:
            raise nothing_left(named, start, self.max_length)
        if not weighed:
            raise UserError(f"{self.dataset}: every record has the weight 0, so there is nothing to train on")
        if not self._told and (dropped or truncated):
            note(
                f"  {self.dataset}: one pass had {start} records, {dropped} dropped for their prompts alone fill "
                f"max_length={self.max_length}{' (' + ', '.join(named) + ', ...)' if named else ''}, {truncated} cut"
            )
        self._told = True

    def _records(self) -> Iterator[Record]:
        found = (
            record
            for source in sources(self.dataset)
            for record, _ in iter_records(source, template=self.template, streaming=True)
        )
        return itertools.islice(found, self.max_records)

    def as_dataset(self) -> Any:
        """The stream as a `datasets.IterableDataset`, which TRL's trainer takes."""
        from datasets import DatasetInfo, Features, IterableDataset, List, Value
        from datasets.iterable_dataset import ExamplesIterable

        features = Features(
            {
                "input_ids": List(Value("int64")),
                "labels": List(Value("int64")),
                "weight": Value("float64"),
                "record_id": Value("string"),
            }
        )
        # `IterableDataset.from_generator` would pickle the tokenizer to name a cache that there is none of.
        stream = ExamplesIterable(_numbered, {"stream": self})
        dataset = IterableDataset(stream, info=DatasetInfo(features=features))
        dataset.endless = True
        return dataset


def _numbered(stream: RecordStream) -> Iterator[tuple[int, dict[str, Any]]]:
    yield from enumerate(stream())


def sources(dataset: str) -> list[str]:
    """The files of a folder of shards, by name; anything else stands for itself.

    As without streaming, those that `datasets` takes for another split (`test.jsonl`) are left out.
    """
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    name, config, split = parse_dataset(dataset)
    path, split = Path(name), split or "train"
    if not path.is_dir() or (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return [dataset]
    if config or _has_configs(path):
        return [dataset]  # which files those are is for `datasets` to say
    folder = str(path.absolute())
    try:
        files = DataFilesDict.from_patterns(get_data_patterns(folder), base_path=folder).get(split, [])
    except EmptyDatasetError:
        files = []
    found = sorted(str(file) for file in files if str(file).endswith(SHARDS))
    if not found:
        raise UserError(
            f"{dataset}: no shards to train on there; looked for *{', *'.join(SHARDS)}, and where a file is named as "
            f"one of a split (test, validation), for those of `{split}`"
        )
    return found


def _has_configs(folder: Path) -> bool:
    """Whether the folder's README says which files are which config's and split's (`configs:`)."""
    import yaml
    from huggingface_hub import metadata_load

    readme = folder / "README.md"
    try:
        return readme.is_file() and bool((metadata_load(readme) or {}).get("configs"))
    except (OSError, ValueError, yaml.YAMLError):
        return True  # `datasets` says what is wrong with it


def shuffled(items: Iterable[Any], size: int, random: Random) -> Iterator[Any]:
    """Items in an order drawn with a buffer of `size`: each comes out at random from those held."""
    held: list[Any] = []
    for item in items:
        if len(held) < size:
            held.append(item)
            continue
        place = random.randrange(size)
        out, held[place] = held[place], item
        yield out
    random.shuffle(held)
    yield from held
