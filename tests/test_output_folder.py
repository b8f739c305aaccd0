"""One training at a time in an output folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convexlm import output_folder
from convexlm.config import ConvexConfig
from convexlm.output_folder import LOCK_FILE, held
from training_helpers import TRAIN, environment, train, words, write_model_files, write_records


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_model_files(folder / "model")
    write_records(folder / "data.jsonl", 8)
    return folder


def given(files, **settings):
    return {"config_name": files / "model", "tokenizer_name": files / "model", "dataset": files / "data.jsonl",
            "max_steps": 2, "save_steps": 2, **settings}  # fmt: skip


def holding(folder, seconds):
    """A process that holds a folder's lock for so long, after it has written a line."""
    script = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True); time.sleep(float(sys.argv[2]))"
    )
    return started(script, folder / LOCK_FILE, str(seconds))


def started(script, *words):
    """A Python process of a script, whose lines can be read."""
    command = [sys.executable, "-c", script, *words]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def test_a_second_training_in_the_same_folder_is_refused(files, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(output_folder, "SECONDS_TO_WAIT", 0.2)
    run = tmp_path / "run"
    script = (
        "import sys, time; from convexlm.config import ConvexConfig; from convexlm.output_folder import held\n"
        "from pathlib import Path\n"
        "args = ConvexConfig(output_dir=sys.argv[1], use_cpu=True, bf16=False)\n"
        "with held(args, Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(300)\n"
    )
    holder = started(script, run)
    try:
        assert holder.stdout.readline() == b"held\n"
        for plain in ((), ("--resume",)):
            assert train(run, *plain, **given(files)) == 2
            (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
            assert f"--output_dir {run}: another training is at work here" in line
        assert [path.name for path in run.iterdir()] == [LOCK_FILE]
    finally:
        holder.kill()
        holder.wait()
    # What a kill leaves holds nobody up, and goes.
    assert train(run, **given(files)) == 0
    assert (run / "checkpoint-2").is_dir() and not (run / LOCK_FILE).exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
def test_a_folder_that_can_never_be_made_is_given_up(files, capfd, monkeypatch):
    monkeypatch.setattr(output_folder, "SECONDS_TO_WAIT", 0.2)
    assert train("/proc/run", **given(files)) == 2
    assert "error: --output_dir /proc/run: cannot be written (" in capfd.readouterr().err


def test_a_lock_that_is_let_go_soon_is_waited_for(tmp_path):
    args = ConvexConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    holder = holding(tmp_path, 1)
    try:
        assert holder.stdout.readline() == b"held\n"
        begun = time.monotonic()
        with held(args, tmp_path):
            assert time.monotonic() - begun > 0.5
    finally:
        holder.wait()
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())


def test_a_worker_that_outlives_a_kill_holds_nothing(tmp_path):
    args = ConvexConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    script = (
        "import os, sys, time; from convexlm.config import ConvexConfig; from convexlm.output_folder import held\n"
        "from pathlib import Path\n"
        "with held(ConvexConfig(output_dir=sys.argv[1], use_cpu=True, bf16=False), Path(sys.argv[1])):\n"
        "    worker = os.fork()\n"
        "    if worker:\n        print(worker, flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = started(script, tmp_path)
    worker = int(holder.stdout.readline())
    try:
        holder.kill()
        holder.wait()
        begun = time.monotonic()
        with held(args, tmp_path):
            assert time.monotonic() - begun < 1
    finally:
        os.kill(worker, signal.SIGKILL)


def test_what_is_refused_leaves_no_folder(files, tmp_path):
    run = tmp_path / "run"
    assert train(run, **given(files, dataset=files / "missing.jsonl")) == 2
    assert not run.exists()
    (tmp_path / "file").write_text("")
    assert train(tmp_path / "file" / "run", **given(files)) == 2


@pytest.mark.slow
def test_two_processes_hear_of_it_together(files, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    holder = holding(run, 300)
    try:
        assert holder.stdout.readline() == b"held\n"
        options = words(output_dir=run, num_processes=2, **given(files))
        done = subprocess.run(
            [sys.executable, "-m", "convexlm.cli", "train", *TRAIN, *options], env=environment(), capture_output=True,
            text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.count("another training is at work here") == 1
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", "# My project\n"),
        ("README.md", "---\nlicense: mit\n---\n# A data set that says generated_from_trainer\n"),
        ("metrics.jsonl", '{"step": 1, "mine": 1}\n'),
        ("metrics.jsonl", '{"step": "a", "loss": 1.0, "nll": 1.0}\n'),
        ("config.json", "{}"),
        ("model-00001-of-00002.safetensors", ""),
    ],
)
@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_what_no_training_wrote_is_not_written_over(files, tmp_path, capfd, name, text, resume):
    run = tmp_path / "run"
    run.mkdir()
    (run / name).write_text(text, encoding="utf-8")
    assert train(run, *resume, **given(files)) == 2
    assert f"--output_dir {run}: {name} is there and would be written over" in capfd.readouterr().err
    assert {path.name: path.read_text() for path in run.iterdir()} == {name: text}


def test_what_a_training_left_before_its_first_checkpoint_is_no_obstacle(files, tmp_path):
    run = tmp_path / "run"
    assert train(run, **given(files)) == 0
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # torn by a kill
    assert (run / "README.md").exists()
    shutil.copytree(run, tmp_path / "again")
    assert train(run, **given(files)) == 0
    assert train(tmp_path / "again", "--resume", **given(files)) == 0


def test_a_folder_below_a_file_is_told_before_the_data_are_read(files, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert train(tmp_path / "file" / "x" / "y", **given(files, dataset="nowhere.jsonl")) == 2
    assert f"is a file, not a folder ({tmp_path / 'file'})" in capfd.readouterr().err
