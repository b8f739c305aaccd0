"""Decoding: every sentence exactly once, whatever stops the process."""

from __future__ import annotations

import errno
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from convexlm.decoded import decoding_seconds
from convexlm.decoding import decode_jobs
from convexlm.decoding import run as run_module
from convexlm.errors import UserError
from convexlm.files import text_sha256
from decoding_helpers import (
    SOURCES,
    EchoBackend,
    fake_checkpoint,
    make_job,
    read,
    run_echo,
)


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> EchoBackend:
    engine = EchoBackend()
    monkeypatch.setattr(run_module, "get_backend", lambda name: lambda: engine)
    return engine


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


# Exactly once


def test_the_finished_files(echo: EchoBackend, tmp_path: Path):
    result = run_echo(tmp_path, batch_size=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.jsonl", "out.meta.json"]
    rows = read(tmp_path / "out.jsonl")
    meta = json.loads((tmp_path / "out.meta.json").read_text())
    assert meta == result.meta
    assert meta["hypotheses_sha256"] == text_sha256([row["hypothesis"] for row in rows])
    assert meta["sources_sha256"] == text_sha256(SOURCES)
    assert meta["num_sentences"] == len(rows) == len(SOURCES)
    assert meta["search"]["num_beams"] == 1
    assert meta["pair"] == "en-de"
    assert result.resumed == 0
    assert result.sentences_per_second > 0


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


def stop_after(monkeypatch: pytest.MonkeyPatch, echo: EchoBackend, batches: int) -> None:
    original = EchoBackend.generate

    def generate(self: EchoBackend, prompts: Any, search: Any) -> Any:
        if len(self.sizes) >= batches:
            raise KeyboardInterrupt
        return original(self, prompts, search)

    monkeypatch.setattr(EchoBackend, "generate", generate)


@pytest.mark.parametrize("torn", [0, 1, 30, 200, 10**6])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    echo: EchoBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: int
):
    """Also with the part file cut anywhere: in a line, between lines, in the header, to nothing."""
    whole = run_echo(tmp_path / "whole", batch_size=2).output_file.read_bytes()
    with monkeypatch.context() as patch:
        echo.sizes.clear()
        stop_after(patch, echo, 3)
        with pytest.raises(KeyboardInterrupt):
            run_echo(tmp_path, batch_size=2)
    part = tmp_path / "out.jsonl.part"
    assert not (tmp_path / "out.jsonl").exists()
    raw = part.read_bytes()
    part.write_bytes(raw[: max(0, len(raw) - torn)])
    result = run_echo(tmp_path, batch_size=2)
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert not part.exists()
    assert result.resumed == {0: 6, 1: 5, 30: 5, 200: 5}.get(torn, 0)


def test_stopped_between_the_last_steps(echo: EchoBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After the finished file, after its meta record: the next run completes it without decoding again."""
    from convexlm.decoding import store

    whole = run_echo(tmp_path / "whole").output_file.read_bytes()
    for name, stopper in (("meta", "write_atomic"), ("part", "sync_folder")):
        folder = tmp_path / name
        original = getattr(store, stopper)

        def stop(path: Path, *rest: Any, original: Any = original, folder: Path = folder, name: str = name) -> None:
            if name == "meta" and path.name == "out.meta.json":
                raise KeyboardInterrupt
            original(path, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(store, stopper, stop)
            if name == "part":
                patch.setattr(store.DecodeStore, "remove_part", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run_echo(folder)
        assert (folder / "out.jsonl.part").exists()
        echo.sizes.clear()
        run_echo(folder)
        assert echo.sizes == []
        assert sorted(path.name for path in folder.iterdir()) == ["model", "out.jsonl", "out.meta.json"]
        assert (folder / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": {"num_beams": 4}}, "search num_beams: 1 there, 4 now"),
        ({"sources": [*SOURCES[:-1], "another"]}, "sources_sha256"),
        ({"sources": SOURCES[:4]}, "num_sentences: 9 there, 4 now"),
        ({"dtype": "bfloat16"}, "dtype: float32 there, bfloat16 now"),
        ({"weights": b"other"}, "checkpoint_sha256"),
        ({"search": {"add_bos": True}}, "prompt add_bos"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_an_output_of_another_job_is_refused(
    echo: EchoBackend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
    finished: bool,
):
    if finished:
        run_echo(tmp_path)
    else:
        with monkeypatch.context() as patch:
            stop_after(patch, echo, 1)
            with pytest.raises(KeyboardInterrupt):
                run_echo(tmp_path, batch_size=3)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
    change = dict(change)
    with pytest.raises(UserError, match=message) as error:
        run_echo(tmp_path, change.pop("sources", SOURCES), **change)
    assert "nothing was overwritten" in str(error.value)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out*")} == before


def test_files_that_are_not_ours_are_left_alone(echo: EchoBackend, tmp_path: Path):
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    out.write_text("my notes\n")
    with pytest.raises(UserError, match=r"exists, without the out.meta.json"):
        run_echo(tmp_path)
    assert out.read_text() == "my notes\n"
    out.unlink()
    meta = tmp_path / "out.meta.json"
    meta.write_text('{"mine": 1}')
    with pytest.raises(UserError, match="is not the meta record of a decode file"):
        run_echo(tmp_path)
    assert meta.read_text() == '{"mine": 1}' and not part.exists()
    meta.unlink()
    for text, message in (
        ("my notes\n", "line 1: damaged"),
        ('{"a": 1}\n', "no header"),
        ("[]\n", "line 1"),
        ("a", "not a part"),
    ):
        part.write_text(text)
        with pytest.raises(UserError, match=message):
            run_echo(tmp_path)
        assert part.read_text() == text
    part.unlink()
    run_echo(tmp_path)
    out.write_text(out.read_text().replace("answer", "better answer"))
    with pytest.raises(UserError, match="was changed after it was written"):
        run_echo(tmp_path)
    out.unlink()  # made anew on purpose, though the meta record is still there
    assert run_echo(tmp_path, search={"num_beams": 2}).resumed == 0
    out.unlink()
    out.mkdir()
    with pytest.raises(UserError, match="is a folder"):
        run_echo(tmp_path)


def test_a_damaged_line_in_the_middle_is_named(echo: EchoBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stop_after(monkeypatch, echo, 2)
    with pytest.raises(KeyboardInterrupt):
        run_echo(tmp_path, batch_size=2)
    part = tmp_path / "out.jsonl.part"
    lines = part.read_bytes().split(b"\n")
    for damage in (b'{"id": "0", "hyp', b"\xff\xfe", b'{"id": "77", "hypothesis": "x"}'):
        part.write_bytes(b"\n".join([*lines[:2], damage, *lines[3:]]))
        with pytest.raises(UserError, match="out.jsonl.part, line 3"):
            run_echo(tmp_path, batch_size=2)


def test_two_runs_at_once_on_one_output(echo: EchoBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = EchoBackend.generate
    refusals = []

    def generate(self: EchoBackend, prompts: Any, search: Any) -> Any:
        if not refusals:
            refusals.append(None)
            with pytest.raises(UserError, match="another process is decoding into it right now"):
                run_echo(tmp_path)
        return original(self, prompts, search)

    monkeypatch.setattr(EchoBackend, "generate", generate)
    run_echo(tmp_path, batch_size=4)
    assert refusals
    assert len(read(tmp_path / "out.jsonl")) == len(SOURCES)


def test_refusals_come_before_the_model_and_leave_nothing(echo: EchoBackend, tmp_path: Path):
    run_echo(tmp_path)
    loads = echo.loads
    with pytest.raises(UserError, match="belongs to another job"):
        run_echo(tmp_path, search={"num_beams": 2})
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="out.jsonl.part: cannot be written"):
        jobs = [make_job(tmp_path / "first.jsonl"), make_job(tmp_path / "file" / "out.jsonl")]
        decode_jobs(tmp_path / "model", jobs, device="cpu")
    assert echo.loads == loads
    assert not list(tmp_path.glob("*.part"))


def test_jobs_that_would_share_an_output_are_refused(echo: EchoBackend, tmp_path: Path):
    jobs = [make_job(tmp_path / "out.jsonl", length_penalty=penalty) for penalty in (1.0, 2.0)]
    with pytest.raises(UserError, match="would both be written"):
        decode_jobs(fake_checkpoint(tmp_path / "model"), jobs, device="cpu")
    empty = make_job(tmp_path / "out.jsonl", [])
    with pytest.raises(UserError, match="nothing to decode"):
        decode_jobs(fake_checkpoint(tmp_path / "model"), [empty], device="cpu")


@pytest.mark.parametrize("broken", ["write", "fsync", "short"])
def test_a_full_disk_loses_nothing(echo: EchoBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str):
    whole = run_echo(tmp_path / "whole", batch_size=2).output_file.read_bytes()
    real_write, real_fsync, calls = os.write, os.fsync, []

    def write(handle: int, data: Any) -> int:
        calls.append(handle)
        if len(calls) < 4 or broken == "fsync":
            return real_write(handle, data)
        if broken == "short" and len(calls) == 4:
            return real_write(handle, data[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    def fsync(handle: int) -> None:
        if broken == "fsync" and len(calls) >= 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match=r"No space left on device.*4 of 9 sentences are safe"):
            run_echo(tmp_path, batch_size=2)
    assert sum("hypothesis" in line for line in read(tmp_path / "out.jsonl.part")) == 4
    result = run_echo(tmp_path, batch_size=2)
    assert result.resumed == 4
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_disk_that_fills_up_at_the_end(echo: EchoBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from convexlm.decoding import store

    def full(path: Path, data: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_atomic", full)
        with pytest.raises(UserError, match="9 of 9 sentences are safe"):
            run_echo(tmp_path)
    assert run_echo(tmp_path).resumed == 9


HOSTILE = [
    "### Response: a ### Instruction: b",
    "</s><s> <unk> [PAD]",
    'quotes " \' ` \\ \\n {"id": "7"}',
    "👩‍👩‍👧 🦙 𝔘𝔫𝔦",
    "line\u2028separator\u2029and\x85next",
    "NUL \x00 and bell \x07",
    "lone \ud800 surrogates \udcff",
    "שלום \u202eعربى",
    "",
]


def test_hostile_text_arrives_intact(echo: EchoBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sources = ["a\u2028b", "c\x85d", "e\rf", "  outer blanks ", 'say "### Response:"', "</s>", "tab\there", "\x00", ""]
    job = make_job(tmp_path / "out.jsonl", sources)
    echo.texts = {sum(prompt.encode()): text for prompt, text in zip(job.prompts(), HOSTILE, strict=True)}
    assert len(echo.texts) == len(HOSTILE)
    with monkeypatch.context() as patch:
        stop_after(patch, echo, 2)
        with pytest.raises(KeyboardInterrupt):
            run_echo(tmp_path, sources, batch_size=3)
    run_echo(tmp_path, sources, batch_size=3)
    raw = (tmp_path / "out.jsonl").read_bytes()
    assert len(raw.decode("utf-8").splitlines()) == len(HOSTILE)
    rows = read(tmp_path / "out.jsonl")
    assert [row["hypothesis"] for row in rows] == HOSTILE
    assert [row["source"] for row in rows] == sources


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import decoding_helpers as helpers
from convexlm.decoding import decode_jobs
helpers.EchoBackend.delay = 0.004
for folder in map(str.strip, sys.stdin):
    pid = os.fork()  # so that what takes seconds, the imports, is done once
    if not pid:
        code = 1
        try:
            texts = [f"text {{n}}" for n in range(90)]
            jobs = [helpers.make_job(Path(folder) / f"{{k}}.jsonl", texts, num_beams=k) for k in (1, 4)]
            decode_jobs(Path({model!r}), jobs, backend="echo", device="cpu", batch_size=2)
            code = 0
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path: Path):
    """25 kills anywhere in a small sweep, appends and the last steps included: the same bytes as one whole run."""
    model, tests = fake_checkpoint(tmp_path / "model"), str(Path(__file__).parent)
    script = KILLED.format(tests=tests, model=str(model))
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin and parent.stdout

    def decode(folder: Path, seconds: float | None = None) -> int:
        """Run the sweep to its end, or kill it after so long; its exit status."""
        parent.stdin.write(f"{folder}\n")
        parent.stdin.flush()
        pid = int(parent.stdout.readline())
        if seconds is not None and not select.select([parent.stdout], [], [], seconds)[0]:
            os.kill(pid, signal.SIGKILL)  # until its parent has waited for it, the number is nobody else's
        return int(parent.stdout.readline())

    try:
        assert decode(tmp_path / "warm") == 0
        began = time.monotonic()
        assert decode(tmp_path / "whole") == 0
        duration = time.monotonic() - began
        chance = random.Random(7)
        kills, rounds, halfway = 0, 0, 0
        while kills < 25:
            folder = tmp_path / f"killed{rounds}"
            rounds += 1
            for _ in range(25):
                status = decode(folder, chance.uniform(0.05, 1.0) * duration)
                if status == 0:
                    break
                assert status == -signal.SIGKILL
                kills += 1
                halfway += any(part.stat().st_size for part in folder.glob("*.part"))
            else:
                assert decode(folder) == 0
            for name in ("1.jsonl", "4.jsonl"):
                assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
            assert sorted(path.name for path in folder.iterdir()) == [
                "1.jsonl",
                "1.meta.json",
                "4.jsonl",
                "4.meta.json",
            ]
        assert halfway > 5
    finally:
        parent.stdin.close()
        parent.wait(60)


def test_choosing_a_backend_loads_no_torch():
    """A mistake in a job is told before what takes seconds to import."""
    code = (
        "import sys; from convexlm.decoding.backends.base import get_backend\n"
        "for name in ('hf', 'ctranslate2', 'vllm'):\n    get_backend(name)\n"
        "assert not {'torch', 'transformers', 'ctranslate2', 'vllm'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# What decoding took


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
