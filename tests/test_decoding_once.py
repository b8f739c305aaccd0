"""Decoding: every sentence exactly once, whatever stops the process."""

from __future__ import annotations

import errno
import json
import os
import random
import time
from typing import TYPE_CHECKING, Any

import pytest

from convexlm.errors import UserError
from convexlm.files import text_sha256
from decoding_helpers import SOURCES, EchoBackend, fake_checkpoint, make_job, read, run_echo, stop_after, use_echo
from forks import forks

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> EchoBackend:
    return use_echo(monkeypatch)


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
import decoding_helpers as helpers
from convexlm.decoding import decode_jobs
helpers.EchoBackend.delay = 0.004
def attempt(folder):
    texts = [f"text {n}" for n in range(90)]
    jobs = [helpers.make_job(folder / f"{k}.jsonl", texts, num_beams=k) for k in (1, 4)]
    decode_jobs(Path(sys.argv[1]), jobs, backend="echo", device="cpu", batch_size=2)
"""


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path: Path):
    """25 kills anywhere in a small sweep, appends and the last steps included: the same bytes as one whole run."""
    with forks(KILLED, str(fake_checkpoint(tmp_path / "model"))) as server:
        assert server.run(tmp_path / "warm")
        began = time.monotonic()
        assert server.run(tmp_path / "whole")
        duration = time.monotonic() - began
        chance = random.Random(7)
        kills, rounds, halfway = 0, 0, 0
        while kills < 25:
            folder = tmp_path / f"killed{rounds}"
            rounds += 1
            for _ in range(25):
                if server.run(folder, chance.uniform(0.05, 1.0) * duration):
                    break
                kills += 1
                halfway += any(part.stat().st_size for part in folder.glob("*.part"))
            else:
                assert server.run(folder)
            for name in ("1.jsonl", "4.jsonl"):
                assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
            assert sorted(path.name for path in folder.iterdir()) == [
                "1.jsonl",
                "1.meta.json",
                "4.jsonl",
                "4.meta.json",
            ]
    assert halfway > 5
