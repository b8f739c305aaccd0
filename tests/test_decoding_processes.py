"""Decoding in several processes, and with real models under kill -9, a second run and a full disk."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from convexlm.cli import main
from convexlm.decoding import decode_jobs
from convexlm.decoding.pool import Pool
from convexlm.errors import UserError
from decoding_helpers import SOURCES, fake_checkpoint, make_checkpoint, make_job, read
from forks import forks

MANY = [f"{source} {word}" for word in ("house", "dog", "tree") for source in SOURCES]
OPTIONS = {"max_new_tokens": 12}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("processes") / "checkpoint-60", steps=60)


def jobs_in(folder: Path) -> list[Any]:
    return [
        make_job(folder / "greedy.jsonl", MANY, **OPTIONS),
        make_job(folder / "beam.jsonl", MANY, num_beams=3, num_return_sequences=2, **OPTIONS),
        make_job(folder / "sample.jsonl", MANY, do_sample=True, num_return_sequences=2, **OPTIONS),
    ]


def test_any_number_of_processes_gives_the_same_bytes(checkpoint: Path, tmp_path: Path, one_thread: None):
    reports: list[Any] = []
    for number in (1, 2, 3):
        jobs = jobs_in(tmp_path / str(number))
        results = decode_jobs(
            checkpoint, jobs, device="cpu", batch_size=4, num_processes=number, progress=reports.append
        )
        assert [result.num_sentences for result in results] == [len(MANY)] * 3
        assert all(result.sentences_per_second > 0 for result in results)
        assert not list((tmp_path / str(number)).glob("*.part"))
    for name in ("greedy.jsonl", "beam.jsonl", "sample.jsonl"):
        whole = (tmp_path / "1" / name).read_bytes()
        assert [json.loads(line)["source"] for line in whole.decode().split("\n")[:-1]] == MANY
        assert (tmp_path / "2" / name).read_bytes() == whole
        assert (tmp_path / "3" / name).read_bytes() == whole
    assert {report.done for report in reports if report.job.endswith("greedy")} >= {0, len(MANY)}


def test_what_a_backend_starts_ends_with_the_job(tmp_path: Path):
    model = fake_checkpoint(tmp_path / "model")
    decode_jobs(model, [make_job(tmp_path / "out.jsonl", MANY)], backend="engine", device="cpu")
    assert len(read(tmp_path / "out.jsonl")) == len(MANY)
    assert (model / "engine.txt").read_text() == "ended"


@pytest.mark.parametrize("whom", ["all", "worker"])
def test_what_a_backend_starts_ends_with_a_killed_one(tmp_path: Path, whom: str):
    model = fake_checkpoint(tmp_path / "model")
    script = (
        "import pathlib, sys\nfrom decoding_helpers import decode_jobs, make_job\n"
        "folder = pathlib.Path(sys.argv[1])\njob = make_job(folder / 'out.jsonl', [f'{n}' for n in range(60)])\n"
        "decode_jobs(folder / 'model', [job], backend='engine', device='cpu', batch_size=1)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=environment, stderr=subprocess.PIPE)
    part = tmp_path / "out.jsonl.part"
    while not part.exists() or part.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    engine, worker = map(int, (model / "engine.txt").read_text().split())
    assert worker != process.pid
    os.kill(process.pid if whom == "all" else worker, signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert (b"a decoding process died (signal 9)" in error) == (whom == "worker")
    end = time.monotonic() + 30
    while is_running(engine) or is_running(worker):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_batch_of_a_worker_that_dies_goes_to_another(
    checkpoint: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
):
    whole = make_job(tmp_path / "whole.jsonl", MANY, **OPTIONS)
    decode_jobs(checkpoint, [whole], device="cpu", batch_size=2)
    pools: list[Pool] = []
    original = Pool.run

    def run(self: Pool, batches: Any) -> Any:
        pools.append(self)
        yield from original(self, batches)

    monkeypatch.setattr(Pool, "run", run)
    killed: list[int] = []

    def kill_one(report: Any) -> None:
        if report.done and not killed:
            rank = max(pools[0]._workers)
            killed.append(rank)
            pools[0]._workers[rank].kill()

    job = make_job(tmp_path / "out.jsonl", MANY, **OPTIONS)
    decode_jobs(checkpoint, [job], device="cpu", batch_size=2, num_processes=2, progress=kill_one)
    assert killed
    assert job.output_file.read_bytes() == whole.output_file.read_bytes()

    def kill_all(report: Any) -> None:
        if report.done:
            for worker in pools[1]._workers.values():
                worker.kill()

    other = make_job(tmp_path / "other.jsonl", MANY, **OPTIONS)
    with pytest.raises(UserError, match="a decoding process died.*signal 9.*the same command goes on"):
        decode_jobs(checkpoint, [other], device="cpu", batch_size=2, num_processes=2, progress=kill_all)
    assert 0 < len(read(tmp_path / "other.jsonl.part")) - 1 < len(MANY)
    result = decode_jobs(checkpoint, [other], device="cpu", batch_size=2)[0]
    assert result.resumed > 0
    assert other.output_file.read_bytes() == whole.output_file.read_bytes()


def test_what_a_worker_refuses_is_said_in_one_line(checkpoint: Path, tmp_path: Path):
    long = make_job(tmp_path / "out.jsonl", ["house " * 600], **OPTIONS)
    with pytest.raises(UserError, match=r"sentence 0 has \d+ tokens"):
        decode_jobs(checkpoint, [long], device="cpu", num_processes=2)
    broken = fake_checkpoint(tmp_path / "broken")
    with pytest.raises(UserError, match="broken"):
        decode_jobs(broken, [make_job(tmp_path / "out.jsonl")], device="cpu", num_processes=2)
    for number in (0, -1, True):
        with pytest.raises(UserError, match="num_processes must be"):
            decode_jobs(checkpoint, [long], device="cpu", num_processes=number)
    assert not list(tmp_path.glob("out*"))


def test_the_verb_takes_the_number(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sources = tmp_path / "a.en"
    sources.write_text("".join(source + "\n" for source in SOURCES))
    required = ["--model_name_or_path", str(checkpoint), "--sources", str(sources), "--pair", "en-de"]
    more = ["--max_new_tokens", "8", "--device", "cpu", "--num_processes", "2", "--json"]
    assert main(["decode", *required, "--output_file", str(tmp_path / "out.jsonl"), *more]) == 0
    assert json.loads(capsys.readouterr().out)["num_sentences"] == len(SOURCES)
    assert json.loads((tmp_path / "out.meta.json").read_text())["num_processes"] == 2


FORKS = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from convexlm.decoding import CheckpointJobs, decode_sweep
from convexlm.decoding.backends import get_backend
import convexlm.decoding.generation, convexlm.decoding.loading, convexlm.tokenization, accelerate.utils.memory
from test_decoding_processes import sweep
get_backend("hf")
torch.set_num_threads(1)
def attempt(folder):
    sweep([Path(name) for name in sys.argv[1:]], folder)
"""


def sweep(checkpoints: list[Path], folder: Path) -> None:
    """Two checkpoints with three searches each, and a job that converts the first one where that can be done."""
    from convexlm.decoding import CheckpointJobs, decode_sweep

    entries = [CheckpointJobs(checkpoint, jobs_in(folder / checkpoint.name)) for checkpoint in checkpoints]
    decode_sweep(entries, device="cpu", batch_size=2)
    if importlib.util.find_spec("ctranslate2"):
        os.environ["CONVEXLM_CACHE"] = str(folder.with_name(f"{folder.name}-cache"))
        job = make_job(folder / "converted.jsonl", MANY, **OPTIONS)
        decode_jobs(checkpoints[0], [job], device="cpu", batch_size=2, backend="ctranslate2")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kill_9_at_25_random_moments_of_a_real_sweep(checkpoint: Path, tmp_path: Path):
    """Anywhere: hashing, model loads, appends, the last steps of a file, between files, conversion."""
    copy = tmp_path / "checkpoint-61"
    shutil.copytree(checkpoint, copy)
    (copy / "convexlm.json").write_text((copy / "convexlm.json").read_text() + " ")

    def finished(name: str) -> dict[str, bytes]:
        paths = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in paths}

    with forks(FORKS, str(checkpoint), str(copy)) as server:
        assert server.run(tmp_path / "first")  # what is imported late is imported now
        began = time.monotonic()
        assert server.run(tmp_path / "whole")
        duration = time.monotonic() - began
        whole, chance, kills, rounds, halfway = finished("whole"), random.Random(11), 0, 0, 0
        while kills < 25:
            name = f"killed{rounds}"
            rounds += 1
            for attempt in range(8):
                began = time.monotonic()
                if server.run(tmp_path / name, chance.uniform(0.0, 1.0) * duration):
                    if not attempt:  # the machine is less busy now
                        duration = min(duration, time.monotonic() - began)
                    break
                kills += 1
                halfway += any(part.stat().st_size for part in (tmp_path / name).rglob("*.part"))
            else:
                assert server.run(tmp_path / name)
            files = finished(name)
            assert files.keys() == whole.keys()
            assert all(files[file] == whole[file] for file in files if file.endswith(".jsonl"))
    assert halfway > 5


SWEEP = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from convexlm.decoding import decode_jobs
from test_decoding_processes import jobs_in
decode_jobs(Path({model!r}), jobs_in(Path(sys.argv[1])), device="cpu", batch_size=1, num_processes={processes})
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_of_a_run_with_workers(checkpoint: Path, tmp_path: Path, one_thread: None):
    """The parent is killed while two workers are at it; they end, and one process alone completes the files."""
    decode_jobs(checkpoint, jobs_in(tmp_path / "whole"), device="cpu", batch_size=1)
    for number, job in enumerate(jobs_in(tmp_path / "whole")[:2]):
        script = SWEEP.format(tests=str(Path(__file__).parent), model=str(checkpoint), processes=2)
        command = [sys.executable, "-c", script, str(tmp_path / "out")]
        part = tmp_path / "out" / f"{job.output_file.name}.part"
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (part.exists() and part.stat().st_size > 2500):
                time.sleep(0.002)
            process.kill()
        assert number or read(part)[1:], "it should have been killed while decoding"
    decode_jobs(checkpoint, jobs_in(tmp_path / "out"), device="cpu", batch_size=1)
    for job in jobs_in(tmp_path / "whole"):
        assert (tmp_path / "out" / job.output_file.name).read_bytes() == job.output_file.read_bytes()


def test_a_second_run_is_refused_while_the_first_decodes(checkpoint: Path, tmp_path: Path):
    script = SWEEP.format(tests=str(Path(__file__).parent), model=str(checkpoint), processes=1)
    command = [sys.executable, "-c", script, str(tmp_path)]
    part = tmp_path / "greedy.jsonl.part"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while not part.exists() and process.poll() is None:
            time.sleep(0.005)
        with pytest.raises(UserError, match="another process is decoding into it right now"):
            decode_jobs(checkpoint, jobs_in(tmp_path), device="cpu", batch_size=1)
        assert process.wait() == 0
    assert len(read(tmp_path / "greedy.jsonl")) == len(MANY)


def test_a_full_disk_is_one_line_and_loses_nothing(checkpoint: Path, tmp_path: Path):
    """With a limit on the size of files in place of a small disk."""
    sources = tmp_path / "a.en"
    sources.write_text("".join(source + "\n" for source in MANY))
    out = tmp_path / "out.jsonl"
    required = ["--model_name_or_path", str(checkpoint), "--sources", str(sources), "--pair", "en-de"]
    argv = ["decode", *required, "--output_file", str(out), "--max_new_tokens", "8", "--device", "cpu"]
    argv += ["--batch_size", "2"]
    process = subprocess.run(
        [sys.executable, "-m", "convexlm.cli", *argv],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    error = process.stderr.strip().split("\n")[-1]
    assert "cannot be written (File too large)" in error
    assert "the same command goes on from there" in error
    kept = sum("hypothesis" in row for row in read(tmp_path / "out.jsonl.part"))
    assert 0 < kept < len(MANY)
    assert f"{kept} of {len(MANY)} sentences are safe" in error
    assert main(argv) == 0
    assert len(read(out)) == len(MANY)
    assert json.loads((tmp_path / "out.meta.json").read_text())["resumed"] == kept
