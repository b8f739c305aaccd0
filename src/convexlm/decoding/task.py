"""An unfinished job: its files, its batches, and what this run has done of it."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from convexlm.decoding.batching import plan_batches
from convexlm.decoding.job import prompt_sha256
from convexlm.decoding.work import Batch, Work

if TYPE_CHECKING:
    from collections.abc import Callable

    from convexlm.decoding.job import DecodeJob
    from convexlm.decoding.store import DecodeStore
    from convexlm.decoding.work import Answer, Part, Sizes


class Task:
    """A job and its batches.

    A job's batches come in rounds. The first has all sentences; of each batch a few that take much longer than the
    others may be put off, and those make the next round's batches, until a round is a single batch, which is patient.
    Every round's batches follow from the job alone, whatever is done of them and by whom.

    Args:
        number: the job's number.
        job: the job.
        prompts: its prompts.
        store: its files.
        limits: sentences and tokens a batch, see `plan_batches`; None: as the backend says.
    """

    def __init__(
        self,
        number: int,
        job: DecodeJob,
        prompts: list[str],
        store: DecodeStore,
        limits: tuple[int | None, int | None],
    ) -> None:
        self.number = number
        self.job = job
        self.prompts = prompts
        self.store = store
        self.resumed = 0
        self.tokens = 0
        self.on_begin: Callable[[Task], None] = lambda task: None
        self._limits = limits
        self._sizes: Sizes | None = None
        self._ready: deque[Batch] = deque()
        self._out = 0
        self._round = 0
        self._begun = 0.0

    @property
    def work(self) -> Work:
        """What a worker needs to hear of the job."""
        return Work(self.job.name, self.job.test_set.ids, self.prompts, self.job.settings, self.job.search)

    @property
    def seconds(self) -> float:
        """Since its first batch was given out."""
        return time.perf_counter() - self._begun if self._begun else 0.0

    @property
    def done(self) -> bool:
        """Whether every sentence has its record."""
        return len(self.store.records) == len(self.store.ids)

    @property
    def ready(self) -> int:
        """How many sentences wait in batches that can be given out."""
        return sum(len(batch.positions) for batch in self._ready)

    def open(self, sizes: Sizes) -> None:
        """Plan the first round, once the prompts' sizes are known."""
        self._sizes = sizes
        self._plan(range(len(sizes.lengths)))
        self._next_round()

    def take(self) -> Batch:
        """A batch to give out."""
        if not self._begun:
            self._begun = time.perf_counter()
            self.on_begin(self)
        self._out += 1
        return self._ready.popleft()

    def put_back(self, batch: Batch) -> None:
        """A batch whose worker was lost; to be given out again unless all of it was answered."""
        if self._is_left(batch):
            self._ready.appendleft(batch)
            self._out -= 1
        else:
            self.complete(batch)

    def waits(self, batch: Batch) -> bool:
        """Whether that batch is to be given out."""
        return batch in self._ready

    def complete(self, batch: Batch) -> None:
        """A batch was answered; the round's last one makes the next round's."""
        self._out -= 1
        self._next_round()

    def answer(self, part: Part) -> None:
        """Keep answers.

        Raises:
            UserError: the disk is full or fails.
        """
        ids, pairs = self.job.test_set.ids, list(zip(part.positions, part.answers, strict=True))
        fresh = [(place, answer) for place, answer in pairs if answer and ids[place] not in self.store.records]
        put_off = [ids[place] for place, answer in pairs if answer is None]
        self.store.append([self._record(*pair) for pair in fresh], put_off, part.batch.round, part.seconds)
        # All samples were generated one by one; of an n-best list only the best counts, as without one.
        self.tokens += sum(one["tokens"] for _, answer in fresh for one in answer.get("samples", [answer]))

    def _next_round(self) -> None:
        while not self._ready and not self._out and (later := self.store.put_off.get(self._round)):
            self._round += 1
            self._plan(place for place, id_ in enumerate(self.job.test_set.ids) if id_ in later)

    def _plan(self, positions: Any) -> None:
        assert self._sizes is not None
        sizes, (batch_size, budget) = self._sizes, self._limits
        plan = plan_batches(positions, sizes.lengths, sizes.held, batch_size, budget or sizes.token_budget, sizes.most)
        batches = [Batch(self.number, batch, self._round, patient=len(plan) == 1) for batch in plan]
        # A batch that is done in part only (its last write was torn) is decoded whole: see `plan_batches`.
        self._ready.extend(batch for batch in batches if self._is_left(batch))

    def _is_left(self, batch: Batch) -> bool:
        ids, later = self.job.test_set.ids, self.store.put_off.get(batch.round, set())
        return any(ids[place] not in self.store.records and ids[place] not in later for place in batch.positions)

    def _record(self, position: int, answer: Answer) -> dict[str, Any]:
        several: dict[str, Any] = {key: answer[key] for key in ("nbest", "samples") if key in answer}
        return {
            "id": self.job.test_set.ids[position],
            "source": self.job.test_set.sources[position],
            **{key: value for key, value in answer.items() if key not in several},
            "prompt_sha256": prompt_sha256(self.prompts[position]),
            **several,
        }
