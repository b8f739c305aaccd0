"""Decoding jobs of one checkpoint or of many: one list that workers take theirs from, every sentence exactly once."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from convexlm.decoding.backends import get_backend
from convexlm.decoding.job import DecodeJob, DecodeResult
from convexlm.decoding.joblist import JobList
from convexlm.decoding.pool import Pool
from convexlm.decoding.prepare import Options, Prepared, nothing_left, prepare
from convexlm.decoding.work import Batch, Load, Worker
from convexlm.errors import UserError
from convexlm.packages import package_version
from convexlm.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from convexlm.decoding.ranks import Leader
    from convexlm.decoding.task import Task
    from convexlm.decoding.work import Part


@dataclass(frozen=True)
class CheckpointJobs:
    """A checkpoint of a sweep and what is decoded with it.

    Args:
        checkpoint: a folder with a model or an adapter, see `find_checkpoint`.
        jobs: what to decode; output files must differ, also between checkpoints.
        label: its name in progress lines; by default the folder's.
    """

    checkpoint: Path
    jobs: Sequence[DecodeJob]
    label: str = ""

    @property
    def name(self) -> str:
        """The label, or the folder's name."""
        return self.label or self.checkpoint.name


@dataclass(frozen=True)
class SweepProgress:
    """How far all jobs of a sweep are.

    Attributes:
        done: sentences that are done, earlier runs' included.
        resumed: how many of them earlier runs did.
        num_sentences: sentences of all jobs.
        num_checkpoints: checkpoints with anything left to do when the run began.
        seconds: wall-clock seconds since this run began to decode, model loads included.
    """

    done: int
    resumed: int
    num_sentences: int
    num_checkpoints: int
    seconds: float


@dataclass(frozen=True)
class DecodeProgress:
    """How far the work is, as the `progress` callback gets it: at a job's start, and whenever sentences are done.

    Attributes:
        checkpoint: the checkpoint's name.
        job: the job's name: test set, pair, search.
        job_number: which of the unfinished jobs, from 1.
        num_jobs: how many of these there are.
        done: sentences of the job that are done, earlier runs' included.
        resumed: how many of them earlier runs did.
        num_sentences: sentences of the job.
        tokens: tokens this run generated for the job.
        seconds: wall-clock seconds this run spent on the job.
        sweep: the same for all jobs together.
    """

    checkpoint: str
    job: str
    job_number: int
    num_jobs: int
    done: int
    resumed: int
    num_sentences: int
    tokens: int
    seconds: float
    sweep: SweepProgress


def decode_jobs(checkpoint: Path, jobs: Sequence[DecodeJob], **options: Any) -> list[DecodeResult]:
    """Decode test sets with one checkpoint, every sentence exactly once.

    Args:
        checkpoint: a folder with a model or an adapter, see `find_checkpoint`.
        jobs: what to decode; output files must differ.
        options: those of `decode_sweep`.

    Returns:
        One result a job, in the order of `jobs`.

    Raises:
        UserError: as `decode_sweep`.
    """
    return decode_sweep([CheckpointJobs(checkpoint, jobs)], **options)[0]


def decode_sweep(
    entries: Sequence[CheckpointJobs],
    *,
    backend: str = "hf",
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    token_budget: int | None = None,
    trust_remote_code: bool = False,
    compute_type: str | None = None,
    gpu_memory_utilization: float | None = None,
    num_processes: int = 1,
    leader: Leader | None = None,
    note: Callable[[str], None] | None = None,
    progress: Callable[[DecodeProgress], None] | None = None,
    finished: Callable[[int, list[DecodeResult]], None] | None = None,
) -> list[list[DecodeResult]]:
    """Decode test sets with checkpoints, every sentence exactly once.

    A job whose output is complete is left alone; one that was stopped goes on. In float32 the hypotheses do not
    depend on how sentences are batched; half precision rounds differently from one batch shape to another, and beams
    that are nearly tied may then change places.

    All jobs are on one list. A worker takes a checkpoint, loads it once and does its jobs; when there is no further
    checkpoint for it, it helps with one that another works on.

    Args:
        entries: the checkpoints and their jobs.
        backend: a registered backend's name, or `auto`.
        device: a torch device; None: the first GPU if there is one.
        dtype: float32, bfloat16 or float16; None: as the checkpoint was saved, float32 on the CPU.
        batch_size: sentences a batch; None: as many as `token_budget` allows.
        token_budget: tokens of a batch whose keys and values are held, prompts and longest answers over all beams;
            None: what fits a GPU, 32768 on a CPU.
        trust_remote_code: let the checkpoint run its own Python code.
        compute_type: what the `ctranslate2` backend computes in, `int8` for instance, in place of `dtype`.
        gpu_memory_utilization: the share of a GPU's memory that a process of the `vllm` backend takes; None: its
            own.
        num_processes: processes on this machine that share the work out; on a machine with GPUs they take these in
            turn. Files do not depend on it.
        leader: brings in the workers of other ranks, see `convexlm.decoding.ranks`.
        note: called with a line for people: what `auto` chose, and why.
        progress: called at the start of each job and after every batch.
        finished: called with the number of an entry and its results, as soon as all its jobs are done.

    Returns:
        One list of results an entry, in the order of its jobs.

    Raises:
        UserError: no such checkpoint, backend or device; an output of another job; a prompt that does not fit the
            model; a full disk. All that can be told without a model is told before anything is decoded.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or batch_size < 1):
        raise UserError(f"batch_size must be a whole number, at least 1, not {batch_size!r}")
    if token_budget is not None and token_budget < 1:
        raise UserError(f"the token budget of a batch must be at least 1, not {token_budget}")
    if isinstance(num_processes, bool) or num_processes < 1:
        raise UserError(f"num_processes must be a whole number, at least 1, not {num_processes!r}")
    limits, memory = (batch_size, token_budget), gpu_memory_utilization
    options = Options(backend, device, dtype, trust_remote_code, compute_type, limits, memory, num_processes)
    sweep = _Sweep(entries, progress, finished)
    sweep.begin(prepare(entries, options, note, get_backend), num_processes + (leader.others if leader else 0))
    with contextlib.ExitStack() as stack:
        todo = sweep.lock(stack)
        if todo:
            takes_along = any(get_backend(load.engine.backend)().starts_processes for load, _ in todo)
            alone = num_processes == 1 and leader is None and not takes_along
            workers = Alone(get_backend) if alone else Pool(num_processes, leader, takes_along=takes_along)
            stack.callback(workers.close)
            for part in workers.run(JobList(todo)):
                sweep.take(part)
    return sweep.all_results()


class Alone:
    """One worker, in this process; has the methods of `convexlm.decoding.pool.Pool`."""

    def __init__(self, get: Callable[[str], Any]) -> None:
        self._worker = Worker(lambda engine: get(engine.backend)())

    def run(self, jobs: JobList) -> Iterator[Part]:
        """Do all that is on the list; yields parts of batches as they are done."""
        while (todo := jobs.next(0)) is not None:
            if isinstance(todo, Batch):
                yield from self._worker.decode(todo)
                jobs.complete(todo)
            else:
                jobs.opened(todo, self._worker.open(jobs.load(todo)))

    def close(self) -> None:
        """Free the model."""
        self._worker.close()


@dataclass
class _Sweep:
    """The book-keeping of a run: what is done, what it came to, and who is to hear of it."""

    entries: Sequence[CheckpointJobs]
    progress: Callable[[DecodeProgress], None] | None
    finished: Callable[[int, list[DecodeResult]], None] | None
    prepared: list[Prepared] = field(default_factory=list)
    results: list[dict[int, DecodeResult]] = field(default_factory=list)
    tasks: dict[int, tuple[int, int, Task]] = field(default_factory=dict)
    """Unfinished ones by number: the entry, the place in it, the task."""
    place: dict[int, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    resumed: int = 0
    fresh: int = 0
    num_checkpoints: int = 0
    begun: float = 0.0

    def begin(self, prepared: list[Prepared], num_processes: int) -> None:
        """Take up what was found, and tell of the entries that need nothing."""
        self.prepared = prepared
        self.facts = {"num_processes": num_processes}
        self.results = [dict(one.results) for one in prepared]
        self.resumed = sum(result.num_sentences for results in self.results for result in results.values())
        for number, one in enumerate(prepared):
            if not one.tasks:
                self._tell_if_finished(number)

    def lock(self, stack: contextlib.ExitStack) -> list[tuple[Load, list[Task]]]:
        """Take the locks of all unfinished jobs, before any model is loaded; returns what is left to decode."""
        todo = []
        _allow_open_files(sum(len(one.tasks) for one in self.prepared))
        for number, one in enumerate(self.prepared):
            left = []
            for place, task in one.tasks.items():
                stack.enter_context(task.store)
                task.resumed = len(task.store.records)
                task.on_begin = self._report
                self.resumed += task.resumed
                self.tasks[task.number] = (number, place, task)
                if meta := task.store.finished():  # by another process, a moment ago
                    task.store.remove_part()
                    self.resumed += len(task.store.ids) - task.resumed
                    self._keep(task, nothing_left(task.job, one.engine.backend, meta))
                elif task.done:  # all but the last steps
                    self._finish(task)
                else:
                    self.place[task.number] = len(self.place) + 1
                    left.append(task)
            if left:
                todo.append((Load(one.engine, {task.number: task.work for task in left}), left))
        self.num_checkpoints = len(todo)
        self.begun = time.perf_counter()
        return todo

    def take(self, part: Part) -> None:
        """Keep answers, and finish a job with its last ones."""
        task = self.tasks[part.batch.job][2]
        before = len(task.store.records)
        task.answer(part)
        self.fresh += len(task.store.records) - before
        self._report(task)
        if task.done:
            self._finish(task)

    def all_results(self) -> list[list[DecodeResult]]:
        """One list an entry, in the order of its jobs."""
        return [[results[place] for place in range(len(results))] for results in self.results]

    def _report(self, task: Task) -> None:
        if self.progress is None:
            return
        number = self.tasks[task.number][0]
        sentences = sum(len(job.test_set.ids) for entry in self.entries for job in entry.jobs)
        seconds = time.perf_counter() - self.begun
        sweep = SweepProgress(self.resumed + self.fresh, self.resumed, sentences, self.num_checkpoints, seconds)
        self.progress(
            DecodeProgress(
                checkpoint=self.entries[number].name,
                job=task.job.name,
                job_number=self.place[task.number],
                num_jobs=len(self.place),
                done=len(task.store.records),
                resumed=task.resumed,
                num_sentences=len(task.store.ids),
                tokens=task.tokens,
                seconds=task.seconds,
                sweep=sweep,
            )
        )

    def _finish(self, task: Task) -> None:
        one = self.prepared[self.tasks[task.number][0]]
        job, store, seconds = task.job, task.store, task.seconds
        cut = sum(not record["finished"] for record in store.records.values())
        run: dict[str, Any] = {"cut": cut, "resumed": task.resumed, "seconds": round(seconds, 3)}
        run["process_seconds"] = None if store.seconds is None else round(store.seconds, 3)
        facts = {**one.facts, "versions": _versions(one.engine.backend), **self.facts}
        meta = store.finish({"search_name": job.search.name, **facts, **run})
        store.close()
        new = len(store.ids) - task.resumed
        result = DecodeResult(
            output_file=job.output_file,
            test_set=job.test_set.name,
            pair=job.test_set.pair,
            search=job.search.name,
            num_sentences=len(store.ids),
            resumed=task.resumed,
            cut=cut,
            seconds=round(seconds, 3),
            sentences_per_second=round(new / seconds, 3) if new else None,
            tokens_per_second=round(task.tokens / seconds, 3) if new else None,
            backend=one.engine.backend,
            meta=meta,
        )
        self._keep(task, result)

    def _keep(self, task: Task, result: DecodeResult) -> None:
        number, place, _ = self.tasks[task.number]
        self.results[number][place] = result
        self._tell_if_finished(number)

    def _tell_if_finished(self, number: int) -> None:
        results = self.results[number]
        if self.finished is not None and len(results) == len(self.entries[number].jobs):
            self.finished(number, [results[place] for place in range(len(results))])


def _allow_open_files(count: int) -> None:
    """Raise this process's limit on open files to so many more than it has for the rest, if it may."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _versions(backend: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError

    versions = {"convexlm": __version__, **{name: package_version(name) for name in ("torch", "transformers")}}
    if backend not in versions:
        with contextlib.suppress(PackageNotFoundError):  # a backend need not be named after a library
            versions[backend] = package_version(backend)
    return versions
