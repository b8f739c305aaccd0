"""What decoding takes: a model loaded once or not at all, batches that fit the memory, and seconds over all runs."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from convexlm.decoded import decoding_seconds
from convexlm.decoding import decode_jobs
from convexlm.errors import UserError
from decoding_helpers import EchoBackend, fake_checkpoint, make_job, read, run_echo, use_echo

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> EchoBackend:
    return use_echo(monkeypatch)


def test_out_of_memory_halves_the_batch_and_remembers(echo: EchoBackend, tmp_path: Path):
    echo.memory = 3
    result = run_echo(tmp_path, [f"sentence {number}" for number in range(32)], batch_size=16)
    assert result.num_sentences == 32
    assert max(echo.sizes) == 2
    assert sum(echo.sizes) == 32
    echo.memory = 0
    with pytest.raises(UserError, match="out of memory with one sentence"):
        run_echo(tmp_path / "more")


def test_other_errors_are_not_taken_for_memory(echo: EchoBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(prompts: Any, search: Any) -> Any:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(echo, "generate", fail)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run_echo(tmp_path)


def test_one_load_for_all_jobs_and_none_when_all_is_done(echo: EchoBackend, tmp_path: Path):
    model = fake_checkpoint(tmp_path / "model")
    jobs = [make_job(tmp_path / "sub" / f"{beams}.jsonl", num_beams=beams) for beams in (1, 4)]
    reports = []
    decode_jobs(model, jobs, device="cpu", batch_size=4, progress=reports.append)
    assert echo.loads == 1
    assert [report.done for report in reports] == [0, 4, 8, 9] * 2
    assert {report.job for report in reports} == {"tiny en-de greedy", "tiny en-de beam4"}
    written = [job.output_file.stat().st_mtime_ns for job in jobs]
    results = decode_jobs(model, jobs, device="cpu")
    assert echo.loads == 1
    assert [job.output_file.stat().st_mtime_ns for job in jobs] == written
    assert [(result.resumed, result.sentences_per_second) for result in results] == [(9, None), (9, None)]


def test_choosing_a_backend_loads_no_torch():
    """A mistake in a job is told before what takes seconds to import."""
    code = (
        "import sys; from convexlm.decoding.backends.base import get_backend\n"
        "for name in ('hf', 'ctranslate2', 'vllm'):\n    get_backend(name)\n"
        "assert not {'torch', 'transformers', 'ctranslate2', 'vllm'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("earlier_version", [False, True])
def test_seconds_are_of_all_runs(
    echo: EchoBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, earlier_version: bool
):
    """A file of which most was decoded before a stop did not cost next to nothing."""
    monkeypatch.setattr(EchoBackend, "delay", 0.05)
    answers = iter(range(7))

    def stop(hypothesis: Any) -> str:
        if next(answers, None) is None:
            raise KeyboardInterrupt
        return "answer"

    monkeypatch.setattr(echo, "text", stop)
    with pytest.raises(KeyboardInterrupt):
        run_echo(tmp_path, batch_size=1)
    monkeypatch.setattr(echo, "text", lambda hypothesis: "answer")
    part = tmp_path / "out.jsonl.part"
    if earlier_version:  # which kept none
        lines = part.read_text(encoding="utf-8").splitlines(keepends=True)
        part.write_text("".join(line for line in lines if '"seconds"' not in line), encoding="utf-8")
    meta = run_echo(tmp_path, batch_size=1).meta
    assert meta["resumed"] == 7 and meta["seconds"] < 0.35
    if earlier_version:
        assert meta["process_seconds"] is None
    else:
        assert meta["process_seconds"] >= 9 * 0.05
    assert decoding_seconds(meta) == meta["process_seconds"]
    assert not any("seconds" in line for line in read(tmp_path / "out.jsonl"))


def test_seconds_in_files_of_earlier_versions():
    assert decoding_seconds({"seconds": 2.0, "resumed": 0}) == 2.0
    assert decoding_seconds({"seconds": 2.0, "resumed": 3}) is None  # of which the first part is not known
    assert decoding_seconds({}) is None
