"""The work itself, apart from files and locks: batches of jobs in one loaded backend, in this process."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from convexlm.decoding.backends import get_backend
from convexlm.decoding.batching import Splitter
from convexlm.decoding.search import Search
from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from convexlm.decoding.backends import Backend, Hypothesis
    from convexlm.tokenization import PromptSettings

Answer = dict[str, Any]
Batch = tuple[int, "Sequence[int]"]
"""The number of a job, and the positions of sentences in it."""


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
    """

    backend: str
    checkpoint: Path
    device: str
    dtype: str
    trust_remote_code: bool
    module: str = ""

    def make(self) -> Backend:
        """The backend, not yet loaded."""
        if self.module:
            importlib.import_module(self.module)
        return get_backend(self.backend)()


class Worker:
    """A backend in this process that decodes batches of jobs.

    Args:
        engine: how to load it.
        works: the jobs.
        backend: one that was made already.
    """

    def __init__(self, engine: Engine, works: Sequence[Work], backend: Backend | None = None) -> None:
        self._engine = engine
        self._works = works
        self._backend = engine.make() if backend is None else backend
        self._encoded: list[list[list[int]]] = []
        self._begun: int | None = None
        self._splitters: dict[int, Splitter] = {}

    def start(self) -> list[list[int]]:
        """Load the model; returns the lengths of all prompts, job by job.

        Raises:
            UserError: the checkpoint cannot be loaded, or a prompt does not fit the model.
        """
        engine = self._engine
        self._backend.load(engine.checkpoint, engine.device, engine.dtype, trust_remote_code=engine.trust_remote_code)
        self._encoded = [_encode(work, self._backend) for work in self._works]
        return [list(map(len, prompts)) for prompts in self._encoded]

    def run(self, batches: Iterable[Batch]) -> Iterator[tuple[int, Sequence[int], list[Answer]]]:
        """Decode batches; yields (number of the job, positions, their answers) as parts of them are done."""
        for number, batch in batches:
            prompts, search = self._encoded[number], self._works[number].search
            if self._begun != number:
                self._backend.begin(prompts)
                self._begun = number

            def generate(part: Sequence[int], prompts: Any = prompts, search: Search = search) -> list[Hypothesis]:
                return self._backend.generate([prompts[position] for position in part], search)

            splitter = self._splitters.setdefault(number, Splitter())
            for part, hypotheses in splitter.run(batch, generate):
                yield number, part, [_answer(hypothesis, self._backend) for hypothesis in hypotheses]

    def close(self) -> None:
        """Free the model."""
        self._backend.close()


def _encode(work: Work, engine: Backend) -> list[list[int]]:
    encoded = engine.encode(work.prompts, work.settings)
    most = work.search.max_new_tokens
    for id_, ids in zip(work.ids, encoded, strict=True):
        if not ids:
            raise UserError(f"{work.name}: the prompt of sentence {id_} has no token; use another template")
        if engine.max_length is not None and len(ids) + most > engine.max_length:
            raise UserError(
                f"{work.name}: the prompt of sentence {id_} has {len(ids)} tokens; with max_new_tokens {most} "
                f"that is more than the model's {engine.max_length} positions; shorten the one or the other"
            )
    return encoded


def _answer(hypothesis: Hypothesis, engine: Backend) -> Answer:
    """The part of a record that the model made, JSON-ready."""
    num_tokens, log_prob = len(hypothesis.token_ids), hypothesis.log_prob
    answer: Answer = {
        "hypothesis": engine.text(hypothesis),
        "log_prob": log_prob,
        "mean_log_prob": None if log_prob is None or not num_tokens else log_prob / num_tokens,
        "tokens": num_tokens,
        "finished": hypothesis.finished,
    }
    if hypothesis.nbest:
        answer["nbest"] = [_answer(other, engine) for other in hypothesis.nbest]
    return answer


def to_message(engine: Engine, works: Sequence[Work]) -> dict[str, Any]:
    """Engine and jobs as JSON, for another process."""
    return {
        "engine": {**asdict(engine), "checkpoint": str(engine.checkpoint)},
        "works": [
            {
                "name": work.name,
                "ids": list(work.ids),
                "prompts": list(work.prompts),
                "settings": asdict(work.settings),
                "search": asdict(work.search),
            }
            for work in works
        ],
    }


def from_message(message: dict[str, Any]) -> tuple[Engine, list[Work]]:
    """What `to_message` said."""
    from pathlib import Path

    from convexlm.tokenization import PromptSettings

    engine = Engine(**{**message["engine"], "checkpoint": Path(message["engine"]["checkpoint"])})
    works = [
        Work(
            work["name"],
            work["ids"],
            work["prompts"],
            PromptSettings(**work["settings"]),
            Search(**work["search"]),
        )
        for work in message["works"]
    ]
    return engine, works
