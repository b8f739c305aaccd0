"""The work itself, apart from files and locks: batches of jobs in one loaded backend, in this process."""

from __future__ import annotations

import importlib
import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from convexlm.chat_templates import RefusedMessages
from convexlm.decoding.backends import get_backend
from convexlm.decoding.batching import MAX_SENTENCES, TOKEN_BUDGET, Splitter
from convexlm.decoding.search import Search
from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from convexlm.decoding.backends import Backend, Hypothesis
    from convexlm.tokenization import PromptSettings

Answer = dict[str, Any]
"""The part of a record that the model made."""


@dataclass(frozen=True)
class Work:
    """What is needed of a job to decode it."""

    name: str
    ids: Sequence[str]
    prompts: Sequence[str]
    settings: PromptSettings
    search: Search


@dataclass(frozen=True)
class Engine:
    """How a backend is loaded.

    Attributes:
        module: where the backend is defined, for processes that have not imported it.
        gpu_memory_utilization: of backends that have it, if the user gave it.
    """

    backend: str
    checkpoint: Path
    device: str
    dtype: str
    trust_remote_code: bool
    module: str = ""
    gpu_memory_utilization: float | None = None

    def make(self) -> Backend:
        """The backend, not yet loaded."""
        if self.module:
            importlib.import_module(self.module)
        return get_backend(self.backend)()


@dataclass(frozen=True)
class Load:
    """What a worker needs to hear of a checkpoint: how it is loaded, and its jobs by their numbers."""

    engine: Engine
    works: Mapping[int, Work]


@dataclass(frozen=True)
class Batch:
    """Sentences that one worker decodes together.

    Attributes:
        job: the job's number.
        positions: the sentences' places in the job.
        round: 0 for a job's first batches; 1 for those of the sentences that were put off in these, and so on.
        patient: decode all of it, however long some take; else the last ones may be put off.
    """

    job: int
    positions: tuple[int, ...]
    round: int = 0
    patient: bool = True


@dataclass(frozen=True)
class Part:
    """Some of a batch's sentences, done.

    Attributes:
        batch: the batch.
        positions: which of its sentences.
        answers: an answer each; None for those that are put off to a batch of their like.
        seconds: how long the process was at them.
    """

    batch: Batch
    positions: Sequence[int]
    answers: Sequence[Answer | None]
    seconds: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """How large a job's prompts are.

    Attributes:
        lengths: the prompts' lengths in tokens.
        held: tokens whose keys and values the backend holds for each sentence at most, over all its beams.
        token_budget: how many of these a batch may have, unless the user says.
        most: how many sentences.
    """

    lengths: Sequence[int]
    held: Sequence[int]
    token_budget: int = TOKEN_BUDGET
    most: int = MAX_SENTENCES


class Worker:
    """A backend in this process that decodes batches of jobs, one checkpoint after the other.

    Args:
        make: makes the backend of a load; by default the one that its engine names.
    """

    def __init__(self, make: Callable[[Engine], Backend] = Engine.make) -> None:
        self._make = make
        self._backend: Backend | None = None
        self._works: Mapping[int, Work] = {}
        self._encoded: dict[int, list[list[int]]] = {}
        self._begun: int | None = None
        self._splitters: dict[int, Splitter] = {}

    def open(self, load: Load) -> dict[int, Sizes]:
        """Load a checkpoint in place of the one before; returns the sizes of its jobs' prompts.

        Raises:
            UserError: the checkpoint cannot be loaded, or a prompt does not fit the model.
        """
        self.close()
        engine = load.engine
        backend = self._backend = self._make(engine)
        share = engine.gpu_memory_utilization
        more: dict[str, Any] = {} if share is None else {"gpu_memory_utilization": share}
        more["trust_remote_code"] = engine.trust_remote_code
        backend.load(engine.checkpoint, engine.device, engine.dtype, **more)
        self._works = load.works
        self._encoded = {number: _encode(work, backend) for number, work in load.works.items()}
        sizes = {}
        for number, prompts in self._encoded.items():
            lengths = list(map(len, prompts))
            held = [backend.held(length, load.works[number].search) for length in lengths]
            sizes[number] = Sizes(lengths, held, *backend.room())
        return sizes

    def decode(self, batch: Batch) -> Iterator[Part]:
        """Decode a batch of the open checkpoint; yields parts of it as they are done."""
        backend, number = self._backend, batch.job
        assert backend is not None
        prompts, search = self._encoded[number], self._works[number].search
        if self._begun != number:
            backend.begin(prompts)
            self._begun = number

        def generate(part: Sequence[int]) -> Sequence[Hypothesis | None]:
            chosen = [prompts[position] for position in part]
            return backend.generate(chosen, search) if batch.patient else backend.generate_most(chosen, search)

        splitter = self._splitters.setdefault(number, Splitter())
        begun = time.perf_counter()
        for part, found in splitter.run(batch.positions, generate):
            answers = [None if hypothesis is None else _answer(hypothesis, backend, search) for hypothesis in found]
            yield Part(batch, part, answers, time.perf_counter() - begun)
            begun = time.perf_counter()

    def close(self) -> None:
        """Free the model."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None
            self._encoded, self._begun, self._splitters = {}, None, {}


def _encode(work: Work, engine: Backend) -> list[list[int]]:
    try:
        encoded = engine.encode(work.prompts, work.settings)
    except RefusedMessages as error:
        raise UserError(f"{work.name}: the prompt of sentence {work.ids[error.number]}: {error}") from None
    except (TypeError, UnicodeEncodeError):  # a tokenizer's, of half a character, which JSON can hold
        for id_, prompt in zip(work.ids, work.prompts, strict=True):
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise UserError(f"{work.name}: the prompt of sentence {id_} has a lone surrogate, no text") from None
        raise
    most = work.search.max_new_tokens
    for id_, ids in zip(work.ids, encoded, strict=True):
        if not ids:
            raise UserError(f"{work.name}: the prompt of sentence {id_} has no token; use another template")
        if engine.vocabulary is not None and max(ids) >= engine.vocabulary:
            raise UserError(
                f"{work.name}: the prompt of sentence {id_} has the token {max(ids)} "
                f"(`{engine.tokenizer.convert_ids_to_tokens(max(ids))}`), and the model has embeddings of "
                f"{engine.vocabulary} only: its folder has the tokenizer of another model, or one with tokens added"
            )
        if engine.max_length is not None and len(ids) + most > engine.max_length:
            raise UserError(
                f"{work.name}: the prompt of sentence {id_} has {len(ids)} tokens; with max_new_tokens {most} "
                f"that is more than {engine.beyond.format(engine.max_length)}"
            )
    return encoded


def _answer(hypothesis: Hypothesis, engine: Backend, search: Search) -> Answer:
    """The part of a record that the model made, JSON-ready.

    Raises:
        UserError: its log-probability is NaN.
    """
    num_tokens, log_prob = len(hypothesis.token_ids), hypothesis.log_prob
    if log_prob is not None and math.isnan(log_prob):
        from convexlm.decoding.generation.rows import NOT_NUMBERS

        raise UserError(NOT_NUMBERS)
    answer: Answer = {
        "hypothesis": engine.text(hypothesis),
        "log_prob": log_prob,
        "mean_log_prob": None if log_prob is None or not num_tokens else log_prob / num_tokens,
        "tokens": num_tokens,
        "finished": hypothesis.finished,
    }
    if hypothesis.nbest:
        answer["samples" if search.do_sample else "nbest"] = [
            _answer(other, engine, search) for other in hypothesis.nbest
        ]
    return answer


def to_message(load: Load) -> dict[str, Any]:
    """A load as JSON, for another process."""
    return {
        "engine": {**asdict(load.engine), "checkpoint": str(load.engine.checkpoint)},
        "works": [
            {
                "number": number,
                "name": work.name,
                "ids": list(work.ids),
                "prompts": list(work.prompts),
                "settings": asdict(work.settings),
                "search": asdict(work.search),
            }
            for number, work in load.works.items()
        ],
    }


def from_message(message: dict[str, Any]) -> Load:
    """What `to_message` said."""
    from pathlib import Path

    from convexlm.tokenization import PromptSettings

    engine = Engine(**{**message["engine"], "checkpoint": Path(message["engine"]["checkpoint"])})
    works = {
        work["number"]: Work(
            work["name"],
            work["ids"],
            work["prompts"],
            PromptSettings(**work["settings"]),
            Search(**work["search"]),
        )
        for work in message["works"]
    }
    return Load(engine, works)
