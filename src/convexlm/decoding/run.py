"""Decoding jobs of one checkpoint: one model load for all of them, and none when there is nothing to do."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convexlm.decoding.backends import get_backend
from convexlm.decoding.batching import TOKEN_BUDGET, Splitter, plan_batches
from convexlm.decoding.checkpoint import check_checkpoint, checkpoint_sha256, choose_device, choose_dtype
from convexlm.decoding.job import DecodeJob, DecodeResult, prompt_sha256
from convexlm.decoding.store import DecodeStore
from convexlm.errors import UserError
from convexlm.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from convexlm.decoding.backends import Backend, Hypothesis


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
    """A job with all that is known of it before the model is loaded."""

    job: DecodeJob
    prompts: list[str]
    store: DecodeStore
    encoded: list[list[int]]


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
    progress: Callable[[DecodeProgress], None] | None = None,
) -> list[DecodeResult]:
    """Decode test sets with a checkpoint, every sentence exactly once.

    A job whose output is complete is left alone; one that was stopped goes on. In float32 the hypotheses do not
    depend on how sentences are batched; half precision rounds differently from one batch shape to another, and beams
    that are nearly tied may then change places.

    Args:
        checkpoint: a folder with a model or an adapter, see `find_checkpoint`.
        jobs: what to decode; output files must differ.
        backend: a registered backend's name.
        device: a torch device; None: the first GPU if there is one.
        dtype: float32, bfloat16 or float16; None: as the checkpoint was saved, float32 on the CPU.
        batch_size: sentences a batch; None: as many as `token_budget` allows.
        token_budget: tokens of a batch over all beams, prompts and longest answers.
        trust_remote_code: let the checkpoint run its own Python code.
        compute_type: what the `ctranslate2` backend computes in, `int8` for instance, in place of `dtype`.
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
    check_checkpoint(checkpoint)
    engine = get_backend(backend)()
    _check_compute_type(compute_type, dtype, engine)
    _check_jobs(jobs, engine)
    device = choose_device(device)
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
            tasks[number] = _Task(job, prompts, store, [])
    if tasks:
        facts = {"checkpoint": str(checkpoint), "device": device, "versions": _versions()}
        with contextlib.ExitStack() as stack:
            # Locks come before the model, so that a refusal does not wait for it.
            for number, task in list(tasks.items()):
                stack.enter_context(task.store)
                if meta := task.store.finished():  # by another process, a moment ago
                    task.store.remove_part()
                    results[number] = _nothing_to_do(task.job, backend, meta)
                    del tasks[number]
            stack.callback(engine.close)
            engine.load(checkpoint, device, dtype, trust_remote_code=trust_remote_code)
            for task in tasks.values():
                task.encoded = _encode(task, engine)
            for place, (number, task) in enumerate(tasks.items(), start=1):
                engine.begin(task.encoded)
                batches = plan_batches(list(map(len, task.encoded)), task.job.search, batch_size, token_budget)
                where = (checkpoint.name, place, len(tasks))
                results[number] = _decode(task, engine, batches, facts, where, progress)
    return [results[number] for number in range(len(jobs))]


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


def _encode(task: _Task, engine: Backend) -> list[list[int]]:
    encoded = engine.encode(task.prompts, task.job.settings)
    most = task.job.search.max_new_tokens
    for id_, ids in zip(task.job.test_set.ids, encoded, strict=True):
        if not ids:
            raise UserError(f"{task.job.name}: the prompt of sentence {id_} has no token; use another template")
        if engine.max_length is not None and len(ids) + most > engine.max_length:
            raise UserError(
                f"{task.job.name}: the prompt of sentence {id_} has {len(ids)} tokens; with max_new_tokens {most} "
                f"that is more than the model's {engine.max_length} positions; shorten the one or the other"
            )
    return encoded


def _decode(
    task: _Task,
    engine: Backend,
    batches: list[list[int]],
    facts: dict[str, Any],
    where: tuple[str, int, int],
    progress: Callable[[DecodeProgress], None] | None,
) -> DecodeResult:
    job, store, ids = task.job, task.store, task.job.test_set.ids
    checkpoint, place, num_jobs = where
    begun, tokens, resumed = time.perf_counter(), 0, len(store.records)
    splitter = Splitter()

    def report() -> None:
        if progress is not None:
            seconds = time.perf_counter() - begun
            progress(
                DecodeProgress(
                    checkpoint, job.name, place, num_jobs, len(store.records), resumed, len(ids), tokens, seconds
                )
            )

    def generate(part: Sequence[int]) -> list[Hypothesis]:
        return engine.generate([task.encoded[position] for position in part], job.search)

    report()
    for batch in batches:
        # A batch that is done in part only (its last write was torn) is decoded whole: see `plan_batches`.
        if all(ids[position] in store.records for position in batch):
            continue
        for part, hypotheses in splitter.run(batch, generate):
            store.append(
                _record(task, position, hypothesis, engine)
                for position, hypothesis in zip(part, hypotheses, strict=True)
            )
            tokens += sum(len(hypothesis.token_ids) for hypothesis in hypotheses)
            report()
    seconds = time.perf_counter() - begun
    cut = sum(not record["finished"] for record in store.records.values())
    run = {"cut": cut, "resumed": resumed, "seconds": round(seconds, 3)}
    meta = store.finish({"search_name": job.search.name, **facts, **run})
    new = len(ids) - resumed
    return DecodeResult(
        output_file=job.output_file,
        test_set=job.test_set.name,
        pair=job.test_set.pair,
        search=job.search.name,
        num_sentences=len(ids),
        resumed=resumed,
        cut=cut,
        seconds=round(seconds, 3),
        sentences_per_second=round(new / seconds, 3) if new else None,
        tokens_per_second=round(tokens / seconds, 3) if new else None,
        backend=engine.name,
        meta=meta,
    )


def _record(task: _Task, position: int, hypothesis: Hypothesis, engine: Backend) -> dict[str, Any]:
    record = {
        "id": task.job.test_set.ids[position],
        "source": task.job.test_set.sources[position],
        **_answer(hypothesis, engine),
        "prompt_sha256": prompt_sha256(task.prompts[position]),
    }
    if hypothesis.nbest:
        record["nbest"] = [_answer(other, engine) for other in hypothesis.nbest]
    return record


def _answer(hypothesis: Hypothesis, engine: Backend) -> dict[str, Any]:
    num_tokens, log_prob = len(hypothesis.token_ids), hypothesis.log_prob
    return {
        "hypothesis": engine.text(hypothesis),
        "log_prob": log_prob,
        "mean_log_prob": None if log_prob is None or not num_tokens else log_prob / num_tokens,
        "tokens": num_tokens,
        "finished": hypothesis.finished,
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


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"convexlm": __version__, **{name: version(name) for name in ("torch", "transformers")}}
