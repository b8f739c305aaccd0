"""Decoding jobs of one checkpoint: one model load for all of them, and none when there is nothing to do."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from convexlm.decoding.auto import choose_backend
from convexlm.decoding.backends import get_backend
from convexlm.decoding.batching import TOKEN_BUDGET, plan_batches
from convexlm.decoding.checkpoint import check_checkpoint, checkpoint_sha256, choose_device, choose_dtype
from convexlm.decoding.job import DecodeJob, DecodeResult, prompt_sha256
from convexlm.decoding.pool import Pool
from convexlm.decoding.store import DecodeStore
from convexlm.decoding.work import Engine, Work, Worker
from convexlm.errors import UserError
from convexlm.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from convexlm.decoding.backends import Backend
    from convexlm.decoding.work import Answer


@dataclass(frozen=True)
class DecodeProgress:
    """How far a checkpoint's jobs are, as the `progress` callback gets it: at a job's start, after every batch.

    Attributes:
        checkpoint: the checkpoint's name.
        job: the job's name: test set, pair, search.
        job_number: which of the checkpoint's unfinished jobs, from 1.
        num_jobs: how many of these there are.
        done: sentences of the job that are done, earlier runs' included.
        resumed: how many of them earlier runs did.
        num_sentences: sentences of the job.
        tokens: tokens this run generated for the job.
        seconds: wall-clock seconds this run spent on the job.
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


@dataclass
class _Task:
    """An unfinished job and what this run has done of it."""

    job: DecodeJob
    prompts: list[str]
    store: DecodeStore
    place: int = 0
    num_tasks: int = 0
    left: int = 0
    resumed: int = 0
    tokens: int = 0
    begun: float = 0.0

    @property
    def seconds(self) -> float:
        """Since its first batch was given out."""
        return time.perf_counter() - self.begun if self.begun else 0.0


def decode_jobs(
    checkpoint: Path,
    jobs: Sequence[DecodeJob],
    *,
    backend: str = "hf",
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    token_budget: int = TOKEN_BUDGET,
    trust_remote_code: bool = False,
    compute_type: str | None = None,
    num_processes: int = 1,
    note: Callable[[str], None] | None = None,
    progress: Callable[[DecodeProgress], None] | None = None,
) -> list[DecodeResult]:
    """Decode test sets with a checkpoint, every sentence exactly once.

    A job whose output is complete is left alone; one that was stopped goes on. In float32 the hypotheses do not
    depend on how sentences are batched; half precision rounds differently from one batch shape to another, and beams
    that are nearly tied may then change places.

    Args:
        checkpoint: a folder with a model or an adapter, see `find_checkpoint`.
        jobs: what to decode; output files must differ.
        backend: a registered backend's name, or `auto`.
        device: a torch device; None: the first GPU if there is one.
        dtype: float32, bfloat16 or float16; None: as the checkpoint was saved, float32 on the CPU.
        batch_size: sentences a batch; None: as many as `token_budget` allows.
        token_budget: tokens of a batch over all beams, prompts and longest answers.
        trust_remote_code: let the checkpoint run its own Python code.
        compute_type: what the `ctranslate2` backend computes in, `int8` for instance, in place of `dtype`.
        num_processes: processes on this machine that share the batches out; on a machine with GPUs they take these
            in turn. Hypotheses do not depend on it.
        note: called with a line for people: what `auto` chose, and why.
        progress: called at the start of each job and after every batch.

    Returns:
        One result a job, in the order of `jobs`.

    Raises:
        UserError: no such checkpoint, backend or device; an output of another job; a prompt that does not fit the
            model; a full disk.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or batch_size < 1):
        raise UserError(f"batch_size must be a whole number, at least 1, not {batch_size!r}")
    if token_budget < 1:
        raise UserError(f"the token budget of a batch must be at least 1, not {token_budget}")
    if isinstance(num_processes, bool) or num_processes < 1:
        raise UserError(f"num_processes must be a whole number, at least 1, not {num_processes!r}")
    check_checkpoint(checkpoint)
    device = choose_device(device)
    facts: dict[str, Any] = {"checkpoint": str(checkpoint), "device": device}
    if backend == "auto":
        searches = [job.search for job in jobs]
        backend, reason = choose_backend(checkpoint, searches, device, dtype, compute_type)
        facts["backend_chosen_because"] = reason
        if note is not None:
            note(f"backend {backend}: {reason}")
    kind = get_backend(backend)
    engine = kind()
    _check_compute_type(compute_type, dtype, engine)
    _check_jobs(jobs, engine)
    dtype = choose_dtype(checkpoint, device, dtype) if compute_type is None else compute_type
    digest = checkpoint_sha256(checkpoint)
    results: dict[int, DecodeResult] = {}
    tasks: dict[int, _Task] = {}
    for number, job in enumerate(jobs):
        prompts = job.prompts()
        store = DecodeStore(job.output_file, job.identity(prompts, digest, backend, dtype), job.test_set.ids)
        if meta := store.finished():
            store.discard_leftover()
            results[number] = _nothing_to_do(job, backend, meta)
        else:
            tasks[number] = _Task(job, prompts, store)
    if tasks:
        with contextlib.ExitStack() as stack:
            # Locks come before the model, so that a refusal does not wait for it.
            for number, task in list(tasks.items()):
                stack.enter_context(task.store)
                if meta := task.store.finished():  # by another process, a moment ago
                    task.store.remove_part()
                    results[number] = _nothing_to_do(task.job, backend, meta)
                    del tasks[number]
            how = Engine(backend, checkpoint, device, dtype, trust_remote_code, _module(kind))
            works = [
                Work(t.job.name, t.job.test_set.ids, t.prompts, t.job.settings, t.job.search) for t in tasks.values()
            ]
            workers = Worker(how, works, engine) if num_processes == 1 else Pool(how, works, num_processes)
            stack.callback(workers.close)
            facts.update(versions=_versions(backend), num_processes=num_processes)
            decoded = _decode(list(tasks.values()), workers, facts, (batch_size, token_budget), backend, progress)
            results.update(zip(tasks, decoded, strict=True))
    return [results[number] for number in range(len(jobs))]


def _module(kind: type[Backend]) -> str:
    """Where another process has to import a backend of the user's own from."""
    own = not kind.__module__.startswith("convexlm.") and kind.__module__ != "__main__"
    return kind.__module__ if own else ""


def _check_compute_type(compute_type: str | None, dtype: str | None, engine: Backend) -> None:
    if compute_type is None:
        return
    if not engine.compute_types:
        raise UserError(f"the {engine.name} backend takes a dtype and no compute_type; the ctranslate2 backend does")
    if compute_type not in engine.compute_types:
        raise UserError(f"unknown compute_type `{compute_type}`; known: {', '.join(engine.compute_types)}")
    if dtype is not None:
        raise UserError("give a dtype or a compute_type, not both")


def _check_jobs(jobs: Sequence[DecodeJob], engine: Backend) -> None:
    outputs: dict[Path, DecodeJob] = {}
    for job in jobs:
        engine.check(job.search)
        sources, ids = job.test_set.sources, job.test_set.ids
        if not sources:
            raise UserError(f"{job.name}: there is nothing to decode")
        if len(sources) != len(ids) or len(set(ids)) != len(ids):
            raise UserError(f"{job.name}: needs one id a sentence, each once ({len(sources)} sentences)")
        other = outputs.setdefault(job.output_file.resolve(), job)
        if other is not job:
            raise UserError(
                f"`{other.name}` and `{job.name}` would both be written to {job.output_file}; give searches of the "
                "same name a label each"
            )


def _decode(
    tasks: list[_Task],
    workers: Worker | Pool,
    facts: dict[str, Any],
    sizes: tuple[int | None, int],
    backend: str,
    progress: Callable[[DecodeProgress], None] | None,
) -> list[DecodeResult]:
    """Decode what is left of each task, in one stream of batches, and finish each as soon as it is complete."""
    results: dict[int, DecodeResult] = {}

    def report(task: _Task) -> None:
        if progress is not None:
            progress(_progress(task, facts))

    plans: list[list[list[int]]] = []
    for place, (task, lengths) in enumerate(zip(tasks, workers.start(), strict=True), start=1):
        ids, done = task.job.test_set.ids, task.store.records
        # A batch that is done in part only (its last write was torn) is decoded whole: see `plan_batches`.
        plan = plan_batches(lengths, task.job.search, *sizes)
        plans.append([batch for batch in plan if any(ids[position] not in done for position in batch)])
        task.place, task.num_tasks, task.resumed = place, len(tasks), len(done)
        task.left = sum(map(len, plans[-1]))

    def batches() -> Iterator[tuple[int, list[int]]]:
        for number, task in enumerate(tasks):
            task.begun = time.perf_counter()
            report(task)
            if not task.left:  # all was done but the last steps
                results[number] = _finish(task, facts, backend)
            for batch in plans[number]:
                yield number, batch

    for number, part, answers in workers.run(batches()):
        task = tasks[number]
        task.store.append(_record(task, position, answer) for position, answer in zip(part, answers, strict=True))
        task.tokens += sum(answer["tokens"] for answer in answers)
        task.left -= len(part)
        report(task)
        if not task.left:
            results[number] = _finish(task, facts, backend)
    return [results[number] for number in range(len(tasks))]


def _progress(task: _Task, facts: dict[str, Any]) -> DecodeProgress:
    return DecodeProgress(
        checkpoint=PurePath(facts["checkpoint"]).name,
        job=task.job.name,
        job_number=task.place,
        num_jobs=task.num_tasks,
        done=len(task.store.records),
        resumed=task.resumed,
        num_sentences=len(task.job.test_set.ids),
        tokens=task.tokens,
        seconds=task.seconds,
    )


def _finish(task: _Task, facts: dict[str, Any], backend: str) -> DecodeResult:
    job, store, seconds = task.job, task.store, task.seconds
    cut = sum(not record["finished"] for record in store.records.values())
    run = {"cut": cut, "resumed": task.resumed, "seconds": round(seconds, 3)}
    meta = store.finish({"search_name": job.search.name, **facts, **run})
    new = len(store.ids) - task.resumed
    return DecodeResult(
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
        backend=backend,
        meta=meta,
    )


def _record(task: _Task, position: int, answer: Answer) -> dict[str, Any]:
    nbest = {"nbest": answer["nbest"]} if "nbest" in answer else {}
    return {
        "id": task.job.test_set.ids[position],
        "source": task.job.test_set.sources[position],
        **{key: value for key, value in answer.items() if key != "nbest"},
        "prompt_sha256": prompt_sha256(task.prompts[position]),
        **nbest,
    }


def _nothing_to_do(job: DecodeJob, backend: str, meta: dict[str, Any]) -> DecodeResult:
    return DecodeResult(
        output_file=job.output_file,
        test_set=job.test_set.name,
        pair=job.test_set.pair,
        search=job.search.name,
        num_sentences=meta["num_sentences"],
        resumed=meta["num_sentences"],
        cut=meta.get("cut", 0),
        seconds=0.0,
        sentences_per_second=None,
        tokens_per_second=None,
        backend=backend,
        meta=meta,
    )


def _versions(backend: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"convexlm": __version__, **{name: version(name) for name in ("torch", "transformers")}}
    if backend not in versions:
        with contextlib.suppress(PackageNotFoundError):  # a backend need not be named after a library
            versions[backend] = version(backend)
    return versions
