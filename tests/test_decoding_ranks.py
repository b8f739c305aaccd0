"""`convexlm decode` over the processes of a launcher: ranks as workers of rank 0."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from convexlm.cli import main
from convexlm.decoding.ranks import _NAMES, KEY, Leader, World, _rendezvous, find_world, follow
from convexlm.errors import UserError
from decoding_helpers import SOURCES, make_checkpoint, read

if TYPE_CHECKING:
    from pathlib import Path

MANY = [f"{source} {word}" for word in ("house", "dog", "tree", "cat") for source in SOURCES]
LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("ranks") / "checkpoint-60", steps=60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def words(checkpoint: Path, folder: Path, out: str, *more: str, sources: list[str] = MANY) -> list[str]:
    file = folder / "sources.en"
    file.write_text("".join(f"{source}\n" for source in sources), encoding="utf-8")
    required = ["--model_name_or_path", str(checkpoint), "--sources", str(file), "--pair", "en-de"]
    options = ["--device", "cpu", "--batch_size", "2", "--max_new_tokens", "40", "--num_beams", "2", *more]
    return ["decode", *required, "--output_file", str(folder / out), *options]


def launched(rank: int, port: int, size: int = 2) -> dict[str, str]:
    values = {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    return {**values, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def start(argv: list[str], environment: dict[str, str], **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "convexlm.cli", *argv]
    return subprocess.Popen(command, env={**os.environ, **environment}, text=True, **options)


TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"]


@pytest.mark.parametrize("launcher", [TORCHRUN, [*ACCELERATE, "--main_process_port"]], ids=["torchrun", "accelerate"])
def test_a_launcher_gives_the_bytes_of_one_process(
    checkpoint: Path, tmp_path: Path, one_thread: None, launcher: list[str]
):
    """`--multi_gpu` starts two processes on a machine without a GPU too; accelerate's ways for CPUs start one."""
    assert main(words(checkpoint, tmp_path, "one.jsonl")) == 0
    command = [sys.executable, "-m", *launcher]
    argv = [*command, str(free_port()), "-m", "convexlm.cli", *words(checkpoint, tmp_path, "two.jsonl", "--json")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_sentences"] == len(MANY), "one process speaks for all"
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert json.loads((tmp_path / "two.meta.json").read_text())["num_processes"] == 2
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
def test_a_rank_that_dies_loses_nothing(checkpoint: Path, tmp_path: Path, one_thread: None):
    """Rank 1 dies: the others do its share. Rank 0 dies: the next run does, alone."""
    many = [f"{source} {number}" for number in range(2) for source in SOURCES]
    more = ("--batch_size", "1", "--num_beams", "4")
    assert main(words(checkpoint, tmp_path, "whole.jsonl", *more, sources=many)) == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for victim in (1, 0):
        out, port = f"victim{victim}.jsonl", free_port()
        argv = words(checkpoint, tmp_path, out, *more, sources=many)
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        ranks = [start(argv, launched(rank, port), **pipes) for rank in range(2)]
        part = tmp_path / f"{out}.part"
        while ranks[0].poll() is None and not (part.exists() and part.stat().st_size > 1500):
            time.sleep(0.005)
        ranks[victim].send_signal(signal.SIGKILL)
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
        if victim == 0:
            assert ranks[1].returncode == 0, errors[1]
            assert 0 < len(read(part)) - 1 < len(many)
            assert main(argv) == 0
        assert (tmp_path / out).read_bytes() == whole, errors[0]


def test_a_number_of_processes_that_does_not_fit_is_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Rank 1 is a thread here; it is let go without a word of its own."""
    for name, value in launched(0, free_port()).items():
        monkeypatch.setenv(name, value)
    other = threading.Thread(target=follow, args=(World(1, 2, 1),))
    other.start()
    assert main(words(checkpoint, tmp_path, "out.jsonl", "--num_processes", "3")) == 2
    other.join(60)
    assert not other.is_alive()
    captured = capsys.readouterr()
    (line,) = captured.err.strip().split("\n")
    assert "--num_processes 3 does not fit the launcher's 2 processes" in line
    assert captured.out == ""
    assert not list(tmp_path.glob("out*"))


def test_who_does_not_know_the_password_is_not_let_in(monkeypatch: pytest.MonkeyPatch):
    for name, value in launched(0, free_port()).items():
        monkeypatch.setenv(name, value)
    seen: list[bytes] = []

    def rank_1() -> None:
        port = int(_rendezvous(World(1, 2, 1)).get(KEY).decode().split(" ")[0])
        for word in (b"x" * 32, b""):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(word)
                stranger.shutdown(socket.SHUT_WR)
                seen.append(stranger.recv(1))
        monkeypatch.setattr("convexlm.decoding.worker.serve", lambda reader, writer, rank: seen.extend(reader))
        follow(World(1, 2, 1))

    other = threading.Thread(target=rank_1)
    other.start()
    with Leader(World(0, 2, 0)) as leader:
        assert leader.others == 1
    other.join(60)
    assert seen == [b"", b""]


def test_what_a_launcher_says_must_fit_together(monkeypatch: pytest.MonkeyPatch):
    for name in (*LAUNCHER, "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert find_world() is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert find_world() is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2, but RANK is not set; start with torchrun"):
        find_world()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="MASTER_ADDR"):
        find_world()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert find_world() == World(1, 2, 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_world() == World(1, 2, 1)
    for name, value, message in (("RANK", "2", "RANK is 2"), ("WORLD_SIZE", "two", "must be a number")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(UserError, match=message):
                find_world()


@pytest.mark.parametrize("names", list(zip(*_NAMES, strict=True))[1:], ids=["Open MPI", "Intel MPI", "MVAPICH"])
def test_mpi_is_a_launcher_too(monkeypatch: pytest.MonkeyPatch, names: tuple[str, str, str]):
    for name in LAUNCHER:
        monkeypatch.setenv(name, "")  # and so put back after the test
        monkeypatch.delenv(name)
    for name, value in zip(names, ("4", "3", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{names[0]} is 4, but MASTER_ADDR is not set"):
        find_world()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert find_world() == World(3, 4, 1)
    assert (os.environ["WORLD_SIZE"], os.environ["RANK"]) == ("4", "3"), "where torch's rendezvous looks for them"
