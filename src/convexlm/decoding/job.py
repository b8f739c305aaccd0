"""What is decoded: a test set with a search into a file; its prompts, its identity and its result."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from convexlm.errors import UserError
from convexlm.files import json_sha256, text_sha256

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from convexlm.decoding.search import Search
    from convexlm.tokenization import PromptSettings


LONGEST_NAME = 237
"""Of an output file, in bytes: a file system takes 255, and the meta record has 18 more while it is written."""


class Sentences(Protocol):
    """The part of a test set that decoding reads; `convexlm.testsets.TestSet` has it."""

    @property
    def name(self) -> str:
        """The test set's name."""

    @property
    def pair(self) -> str:
        """The direction, such as `en-de`; empty where there is none."""

    @property
    def sources(self) -> Sequence[str]:
        """The source segments."""

    @property
    def ids(self) -> Sequence[str]:
        """One id a segment, each once."""


@dataclass(frozen=True)
class DecodeJob:
    """One test set, decoded with one search into one file.

    Args:
        test_set: name, pair, sources and ids.
        search: how hypotheses are searched for.
        output_file: the decode file to write, `X.jsonl`.
        settings: how prompts are made; as in the checkpoint's training.
        instruction: the prompt's instruction, in which `[SRC]` and `[TGT]` stand for the pair's languages; None for
            the translation instruction.

    Raises:
        UserError: the output file's name does not end in `.jsonl`, or is too long for the files beside it.
    """

    test_set: Sentences
    search: Search
    output_file: Path
    settings: PromptSettings
    instruction: str | None = None

    def __post_init__(self) -> None:
        if not self.output_file.name:  # "." and "/", and an empty name
            raise UserError(f"{self.output_file}: is a folder, expected a file to write")
        if self.output_file.suffix != ".jsonl" and not self.output_file.is_dir():  # which is told later
            # By the name it is read again, and its meta record's name follows from it.
            raise UserError(f"{self.output_file}: give the output file a name that ends in .jsonl")
        if len(os.fsencode(self.output_file.name)) > LONGEST_NAME:
            raise UserError(f"{self.output_file}: give the output file a name of at most {LONGEST_NAME} bytes")

    @property
    def name(self) -> str:
        """Test set, pair and search, as progress lines and tables name the job."""
        return " ".join(filter(None, (self.test_set.name, self.test_set.pair, self.search.name)))

    def prompts(self) -> list[str]:
        """The prompt of each source, filled from the template; outer blanks of the source are left out.

        Raises:
            UserError: an unknown template, a field it needs and decoding does not have, an instruction that it has no
                place for, or one that names languages where the pair gives none.
        """
        from convexlm.templates import TRANSLATION_INSTRUCTION, fill_instruction, get_template

        template = get_template(self.settings.template)
        instruction = TRANSLATION_INSTRUCTION if self.instruction is None else self.instruction
        if self.test_set.pair:
            instruction = fill_instruction(instruction, self.test_set.pair)
        elif "[SRC]" in instruction or "[TGT]" in instruction:
            raise UserError("the instruction names [SRC] or [TGT]: say which languages they are, as a pair like en-de")
        prompts = [
            template.fill({"instruction": instruction, "input": source.strip()}) for source in self.test_set.sources
        ]
        if self.instruction is not None and prompts:
            another = {"instruction": f"{instruction} ", "input": self.test_set.sources[0].strip()}
            if template.fill(another) == prompts[0]:
                raise UserError(f"the template `{template.name}` has no place for an instruction: leave it out")
        return prompts

    def identity(self, prompts: list[str], checkpoint_sha256: str, backend: str, dtype: str) -> dict[str, Any]:
        """What two runs must have in common to work on the same output, JSON-ready."""
        return {
            "checkpoint_sha256": checkpoint_sha256,
            "test_set": self.test_set.name,
            "pair": self.test_set.pair,
            "num_sentences": len(prompts),
            "sources_sha256": text_sha256(self.test_set.sources),
            "prompts_sha256": json_sha256([list(self.test_set.ids), prompts]),
            "prompt": asdict(self.settings),
            "search": self.search.settings(),
            "backend": backend,
            "dtype": dtype,
        }


@dataclass(frozen=True)
class DecodeResult:
    """What became of a job.

    Attributes:
        output_file: the finished file.
        test_set: the test set's name.
        pair: the direction.
        search: the search's name.
        num_sentences: sentences in the file.
        resumed: how many of them earlier runs had done.
        cut: hypotheses that reached `max_new_tokens` without an EOS.
        seconds: wall-clock seconds this run spent decoding, without loading.
        sentences_per_second: of this run; None if it had nothing to do.
        tokens_per_second: generated tokens (EOS included) a second, likewise.
        backend: the backend's name.
        meta: the meta record beside the file.
    """

    output_file: Path
    test_set: str
    pair: str
    search: str
    num_sentences: int
    resumed: int
    cut: int
    seconds: float
    sentences_per_second: float | None
    tokens_per_second: float | None
    backend: str
    meta: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The result without the meta record, JSON-ready."""
        values = asdict(self)
        del values["meta"]
        return {**values, "output_file": str(self.output_file)}


def prompt_sha256(prompt: str) -> str:
    """The SHA-256 of a prompt's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(prompt.encode("utf-8", errors="surrogatepass")).hexdigest()
