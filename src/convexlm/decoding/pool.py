"""Decoding in several processes on this machine: batches are handed out one by one to whoever is idle.

Only the parent writes files. The batches are those of the one plan that a single process has, and each is decoded
whole by one worker, so the number of processes changes nothing in the result.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from convexlm.decoding.work import to_message
from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from convexlm.decoding.work import Answer, Batch, Engine, Work

DEATHS_OF_A_BATCH = 2
"""A batch on which so many workers died is not given to another."""


class _Queue:
    """Batches to give out, drawn as they are needed; those that a dead worker had come first."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)
        self.returned: list[Batch] = []

    def next(self) -> Batch | None:
        return self.returned.pop() if self.returned else next(self._batches, None)


class Pool:
    """Worker processes that decode batches of jobs; has the methods of `convexlm.decoding.work.Worker`.

    Args:
        engine: how to load the backend. With the device `cuda`, the workers take the GPUs in turn.
        works: the jobs.
        num_processes: how many workers.
    """

    def __init__(self, engine: Engine, works: Sequence[Work], num_processes: int) -> None:
        self._messages: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        self._workers: dict[int, subprocess.Popen[str]] = {}
        self._engine = engine
        self._works = works
        self._num_processes = num_processes

    def start(self) -> list[list[int]]:
        """Start all workers and wait until each has loaded the model; returns the lengths of all prompts.

        Raises:
            UserError: what a worker refuses, or one that dies while it loads.
        """
        devices = _devices(self._engine.device, self._num_processes)
        threads = _threads(self._num_processes) if self._engine.device == "cpu" else 0
        for rank, device in enumerate(devices):
            message = {"threads": threads, **to_message(replace(self._engine, device=device), self._works)}
            self._workers[rank] = self._start(rank, message)
        lengths: list[list[int]] = []
        for _ in devices:
            rank, answer = self._messages.get()
            if answer is None:
                raise UserError(
                    f"decoding process {rank} died while it loaded the model{self._how(rank)}; with fewer processes "
                    "(--num_processes) there is more memory for each"
                )
            lengths = self._unless_refused(answer)["lengths"]
        return lengths

    def run(self, batches: Iterable[Batch]) -> Iterator[tuple[int, Sequence[int], list[Answer]]]:
        """Decode batches; yields (number of the job, positions, their answers) in the order they are done.

        The batch of a worker that dies goes to another one.

        Raises:
            UserError: no worker is left, or two died on one batch.
        """
        todo = _Queue(batches)
        at: dict[int, Batch] = {}
        deaths: dict[tuple[int, int], int] = {}
        # Answers may have come before their worker died without saying that it was done with the batch.
        answered: dict[int, set[int]] = {}
        for rank in list(self._workers):
            self._give(rank, todo, at)
        while at:
            rank, answer = self._messages.get()
            if answer is None:
                how = self._how(rank)
                del self._workers[rank]
                if (lost := at.pop(rank, None)) is None or answered.get(lost[0], set()).issuperset(lost[1]):
                    if not self._workers and todo.next() is not None:
                        raise UserError(f"the last decoding process died{how}; the same command goes on from there")
                    continue
                key = (lost[0], lost[1][0])
                deaths[key] = deaths.get(key, 0) + 1
                if not self._workers or deaths[key] >= DEATHS_OF_A_BATCH:
                    raise UserError(
                        f"a decoding process died{how}; what is done is safe, and the same command goes on from "
                        "there, with fewer processes or a smaller batch where memory is short"
                    )
                todo.returned.append(lost)
                for idle in [rank for rank in self._workers if rank not in at][:1]:
                    self._give(idle, todo, at)
                continue
            self._unless_refused(answer)
            if "idle" in answer:
                del at[rank]
                self._give(rank, todo, at)
            else:
                known = answered.setdefault(answer["number"], set())
                fresh = [index for index, position in enumerate(answer["part"]) if position not in known]
                known.update(answer["part"])
                if fresh:
                    part, answers = answer["part"], answer["answers"]
                    yield answer["number"], [part[index] for index in fresh], [answers[index] for index in fresh]

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            worker.kill()  # they hold nothing that could be left half-done
        for worker in self._workers.values():
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        self._workers = {}

    def _start(self, rank: int, message: dict[str, Any]) -> subprocess.Popen[str]:
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}
        worker = subprocess.Popen(
            [sys.executable, "-m", "convexlm.decoding.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="ascii",
            env=environment,
        )
        threading.Thread(target=self._listen, args=(rank, worker), daemon=True).start()
        self._tell(worker, message)
        return worker

    def _listen(self, rank: int, worker: subprocess.Popen[str]) -> None:
        """Put a worker's messages on the queue, and None at its end."""
        assert worker.stdout is not None
        with contextlib.suppress(ValueError, OSError):  # a line torn by its death; a pipe that we closed
            for line in worker.stdout:
                self._messages.put((rank, json.loads(line)))
        self._messages.put((rank, None))

    def _give(self, rank: int, todo: _Queue, at: dict[int, Batch]) -> None:
        if (batch := todo.next()) is not None:
            at[rank] = batch
            self._tell(self._workers[rank], [batch[0], list(batch[1])])

    def _tell(self, worker: subprocess.Popen[str], message: Any) -> None:
        assert worker.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its death is on the queue, too
            worker.stdin.write(json.dumps(message) + "\n")
            worker.stdin.flush()

    def _unless_refused(self, answer: dict[str, Any]) -> dict[str, Any]:
        if "refused" in answer:
            raise UserError(answer["refused"])
        return answer

    def _how(self, rank: int) -> str:
        code = self._workers[rank].wait()
        return f" (signal {-code})" if code < 0 else f" (exit code {code})"


def _devices(device: str, num_processes: int) -> list[str]:
    if device != "cuda":
        return [device] * num_processes
    import torch

    count = max(1, torch.cuda.device_count())
    return [f"cuda:{rank % count}" for rank in range(num_processes)]


def _threads(num_processes: int) -> int:
    """Threads a worker on the CPU: as the user says, else an equal share of the cores."""
    if os.environ.get("OMP_NUM_THREADS"):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num_processes)
