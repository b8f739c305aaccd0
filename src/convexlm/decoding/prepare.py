"""What is told of a sweep before anything is decoded: hashes, prompts, what is done, and every refusal."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convexlm.decoding.auto import choose_backend
from convexlm.decoding.checkpoint import check_checkpoint, checkpoint_sha256, choose_device, choose_dtype
from convexlm.decoding.job import DecodeJob, DecodeResult
from convexlm.decoding.store import DecodeStore
from convexlm.decoding.task import Task
from convexlm.decoding.work import Engine
from convexlm.errors import UserError
from convexlm.quantized import bits_trained_on

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from convexlm.decoding.backends import Backend
    from convexlm.decoding.run import CheckpointJobs

HASHED_AT_ONCE = 4
"""Checkpoints that are read at the same time to hash them."""


@dataclass(frozen=True)
class Options:
    """How a sweep is decoded, as the user says; see `decode_sweep`.

    Attributes:
        limits: sentences and tokens a batch.
        num_processes: on this machine.
    """

    backend: str
    device: str | None
    dtype: str | None
    trust_remote_code: bool
    compute_type: str | None
    limits: tuple[int | None, int | None]
    gpu_memory_utilization: float | None = None
    num_processes: int = 1


@dataclass(frozen=True)
class Prepared:
    """A checkpoint's jobs, looked at.

    Attributes:
        engine: how its backend is loaded.
        facts: what every meta record of it says beside the job's identity.
        results: those of finished jobs, by their places in the entry.
        tasks: the others.
    """

    engine: Engine
    facts: dict[str, Any]
    results: dict[int, DecodeResult]
    tasks: dict[int, Task]


def prepare(
    entries: Sequence[CheckpointJobs],
    options: Options,
    note: Callable[[str], None] | None,
    get_backend: Callable[[str], type[Backend]],
) -> list[Prepared]:
    """Look at all checkpoints and jobs.

    Raises:
        UserError: whatever can be told without a lock or a model.
    """
    chosen: list[tuple[Engine, dict[str, Any]]] = []
    told: set[tuple[Any, Any]] = set()
    outputs: dict[Path, DecodeJob] = {}
    for entry in entries:
        check_checkpoint(entry.checkpoint)
    device = choose_device(options.device)
    for entry in entries:
        engine, facts = _choose(entry, options, device, get_backend)
        reason = facts.get("backend_chosen_because")
        if reason and note is not None and (engine.backend, reason) not in told:
            note(f"backend {engine.backend}: {reason}")
        told.add((engine.backend, reason))
        bits = facts.get("trained_on_bits")
        if bits and note is not None and ("bits", bits) not in told:
            note(f"adapters trained on {bits}-bit base weights are decoded on the base model's own, unquantized")
        told.add(("bits", bits))
        _check_jobs(entry.jobs, get_backend(engine.backend)(), device, outputs)
        chosen.append((engine, facts))
    with ThreadPoolExecutor(HASHED_AT_ONCE) as threads:
        digests = list(threads.map(checkpoint_sha256, [entry.checkpoint for entry in entries]))
    prepared: list[Prepared] = []
    count = 0
    for entry, (engine, facts), digest in zip(entries, chosen, digests, strict=True):
        one = Prepared(engine, facts, {}, {})
        for place, job in enumerate(entry.jobs):
            prompts = job.prompts()
            identity = job.identity(prompts, digest, engine.backend, engine.dtype)
            store = DecodeStore(job.output_file, identity, job.test_set.ids)
            if meta := store.finished():
                store.discard_leftover()
                one.results[place] = nothing_left(job, engine.backend, meta)
            else:
                one.tasks[place] = Task(count, job, prompts, store, options.limits)
                count += 1
        prepared.append(one)
    return prepared


def nothing_left(job: DecodeJob, backend: str, meta: dict[str, Any]) -> DecodeResult:
    """The result of a job that was finished before."""
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


def _choose(
    entry: CheckpointJobs, options: Options, device: str, get_backend: Callable[[str], type[Backend]]
) -> tuple[Engine, dict[str, Any]]:
    checkpoint, backend = entry.checkpoint, options.backend
    facts: dict[str, Any] = {"checkpoint": str(checkpoint), "device": device}
    if bits := bits_trained_on(checkpoint):
        facts["trained_on_bits"] = bits
    if backend == "auto":
        searches = [job.search for job in entry.jobs]
        backend, reason = choose_backend(checkpoint, searches, device, options.dtype, options.compute_type)
        facts["backend_chosen_because"] = reason
    kind = get_backend(backend)
    _check_compute_type(options.compute_type, options.dtype, kind())
    share = options.gpu_memory_utilization
    kind().check_gpu_memory(share, device, options.num_processes)
    dtype = options.compute_type or choose_dtype(checkpoint, device, options.dtype)
    return Engine(backend, checkpoint, device, dtype, options.trust_remote_code, _module(kind), share), facts


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


def _check_jobs(jobs: Sequence[DecodeJob], engine: Backend, device: str, outputs: dict[Path, DecodeJob]) -> None:
    for job in jobs:
        engine.check(job.search)
        engine.check_installed(device)
        sources, ids = job.test_set.sources, job.test_set.ids
        if not sources:
            raise UserError(f"{job.name}: there is nothing to decode")
        if len(sources) != len(ids) or len(set(ids)) != len(ids):
            raise UserError(f"{job.name}: needs one id a sentence, each once ({len(sources)} sentences)")
        if other := outputs.get(job.output_file.resolve()):
            raise UserError(
                f"`{other.name}` and `{job.name}` would both be written to {job.output_file}; give searches of the "
                "same name a label each"
            )
        outputs[job.output_file.resolve()] = job
