"""Decoding in several processes: work is given out piece by piece to whoever is idle.

Only this process writes files. The batches are those of the plans that a single process has, and each is decoded
whole by one worker, so the number of processes changes nothing in the result.
"""

from __future__ import annotations

import os
import queue
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from convexlm.decoding.links import Child, Remote
from convexlm.decoding.work import Batch, Part, Sizes, to_message
from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convexlm.decoding.joblist import JobList
    from convexlm.decoding.links import Link
    from convexlm.decoding.ranks import Leader

DEATHS = 2
"""A batch, or a checkpoint to load, at which so many workers died is not given to another."""


class Pool:
    """Worker processes that decode what is on a job list; has the methods of `convexlm.decoding.run.Alone`.

    Args:
        num_processes: workers started on this machine; with the device `cuda` they take the GPUs in turn.
        leader: where workers on other machines come in, if any do.
        takes_along: what a worker has started ends with it.
    """

    def __init__(self, num_processes: int, leader: Leader | None = None, *, takes_along: bool = False) -> None:
        self._inbox: queue.Queue[tuple[int, Any]] = queue.Queue()
        self._workers: dict[int, Link] = {}
        self._num_processes = num_processes
        self._leader = leader
        self._takes_along = takes_along
        # What each worker is at: a batch, or the number of the checkpoint that it loads.
        self._at: dict[int, Batch | int] = {}

    def run(self, jobs: JobList) -> Iterator[Part]:
        """Do all that is on the list; yields parts of batches in the order they are done.

        The batch of a worker that dies goes to another one.

        Raises:
            UserError: what a worker refuses; no worker is left; two died at one batch, or while they loaded one model.
        """
        for number in range(self._num_processes):
            threads = _threads(self._num_processes)
            self._workers[number] = Child(number, self._inbox, threads, takes_along=self._takes_along)
        if self._leader is not None:
            self._leader.deliver_to(self._inbox)
        deaths: dict[Batch | int, int] = {}
        self._give(jobs)
        while self._at:
            number, message = self._inbox.get()
            if isinstance(message, tuple):  # another rank's connection
                self._workers[number] = Remote(number, self._inbox, *message)
                self._give(jobs)
                continue
            if number not in self._workers:
                continue
            if message is None:
                self._bury(number, jobs, deaths)
            elif "refused" in message:
                raise UserError(message["refused"])
            elif "opened" in message:
                del self._at[number]
                jobs.opened(message["opened"], {job: Sizes(*sizes) for job, *sizes in message["sizes"]})
            elif "idle" in message:
                batch = self._at.pop(number)
                assert isinstance(batch, Batch)
                jobs.complete(batch)
            else:
                batch = self._at[number]
                assert isinstance(batch, Batch)
                yield Part(batch, message["part"], message["answers"], message["seconds"])
                continue
            self._give(jobs, first=number)
        for worker in self._workers.values():
            worker.finish()

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            worker.end()
        self._workers = {}

    def _give(self, jobs: JobList, first: int = -1) -> None:
        """Let every idle worker have something to do."""
        for number in sorted(self._workers, key=lambda number: number != first):
            if number in self._at or (todo := jobs.next(number)) is None:
                continue
            self._at[number] = todo
            worker = self._workers[number]
            if isinstance(todo, Batch):
                worker.tell({"batch": [todo.job, todo.positions, todo.round, todo.patient]})
                continue
            load = jobs.load(todo)
            if isinstance(worker, Child) and load.engine.device == "cuda":
                load = replace(load, engine=replace(load.engine, device=_device(number)))
            worker.tell({"open": todo, **to_message(load)})

    def _bury(self, number: int, jobs: JobList, deaths: dict[Batch | int, int]) -> None:
        """A worker died: see to it that another does what it was at."""
        how = self._workers[number].how_it_ended()
        self._workers.pop(number).end()
        lost = self._at.pop(number, None)
        jobs.lost(number, lost if isinstance(lost, Batch) else None)
        again = lost is not None and (isinstance(lost, int) or jobs.waits(lost))
        if lost is not None and again:
            deaths[lost] = deaths.get(lost, 0) + 1
        if (self._workers or not jobs.waiting) and (lost is None or deaths.get(lost, 0) < DEATHS):
            return
        at = " while it loaded the model" if isinstance(lost, int) else ""
        raise UserError(
            f"a decoding process died{at}{how}; what is done is safe, and the same command goes on from there, with "
            "fewer processes or a smaller batch where memory is short"
        )


def _device(number: int) -> str:
    import torch

    return f"cuda:{number % max(1, torch.cuda.device_count())}"


def _threads(num_processes: int) -> int:
    """Threads a worker on the CPU: as the user says, else an equal share of the cores."""
    if os.environ.get("OMP_NUM_THREADS"):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num_processes)
