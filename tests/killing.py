"""Trains in child processes that are killed at random moments and started again; run as a script by the tests.

Everything is imported once, and every attempt is a fork, so that an attempt costs about a second. A child is killed by
SIGKILL, from outside after a random time, or by itself at a random call of those that bring something to the disk or
delete it. `killing.py FOLDER KILLS SEED [OPTION ...]` writes `FOLDER/result.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from convexlm import cli
from convexlm.checkpoints import complete_checkpoints, step_of
from convexlm.files import file_sha256
from training_helpers import TRAIN, words

STEPS, EVERY = 60, 10
OPTIONS = {
    "max_steps": STEPS,
    "save_steps": EVERY,
    "save_total_limit": 2,
    "logging_steps": 3,
    "eval_strategy": "epoch",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
}


def attempt(folder, options, log, calls_to_live=None):
    """One process of training; the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if calls_to_live is not None:
            die_at_call(calls_to_live)
        code = cli.main(["train", *TRAIN, "--resume", *words(**OPTIONS), "--output_dir", str(folder), *options])
    finally:
        os._exit(code)


def die_at_call(number):
    """Kill this process at the n-th call that changes something on the disk, just before it or just after it."""
    left = [number]

    def fatal(function, after):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for module, name in [
        (os, "fsync"),
        (os, "replace"),
        (os, "unlink"),
        (os, "rmdir"),
        (os, "mkdir"),
        (torch, "save"),
    ]:
        setattr(module, name, fatal(getattr(module, name), after=number % 2 == 0))
    from convexlm.trainer import ConvexTrainer

    ConvexTrainer.get_batch_samples = fatal(ConvexTrainer.get_batch_samples, after=False)


def outcome(folder):
    """What has to be the same: the weights, their steps, and every line that was logged (without wall-clock times)."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]
    metrics = [{key: x for key, x in line.items() if not key.endswith(("_runtime", "_per_second"))} for line in lines]
    checkpoints = complete_checkpoints(folder)
    return {
        "weights": {path.name: file_sha256(path / "model.safetensors") for path in checkpoints},
        "folders": sorted(path.name for path in folder.glob("checkpoint-*")),
        "metrics": metrics,
    }


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main():
    home, kills, seed, *options = sys.argv[1:]
    home, draw = Path(home), random.Random(int(seed))
    torch.set_num_threads(1)
    from convexlm import trainer, training, training_data  # noqa: F401

    begun = time.monotonic()
    assert wait(attempt(home / "undisturbed", options, home / "undisturbed.log")) == 0
    seconds = time.monotonic() - begun
    wanted = outcome(home / "undisturbed")
    killed, rounds, lost = 0, [], []
    while killed < int(kills):
        folder, log = home / f"run-{len(rounds)}", home / f"run-{len(rounds)}.log"
        newest, code = 0, -9
        while code != 0 and killed < int(kills):
            by_call = draw.random() < 0.6
            # About 90 such calls a checkpoint: an attempt comes past one checkpoint, or past none.
            pid = attempt(folder, options, log, draw.randint(1, 110) if by_call else None)
            if not by_call:
                time.sleep(draw.uniform(0.1, 0.5) * seconds)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            code = wait(pid)
            assert code in (0, -9), log.read_text()
            killed += code == -9
            last = max(map(step_of, complete_checkpoints(folder)), default=0)
            if last < newest:
                lost.append([newest, last])
            newest = max(newest, last)
        if code != 0:
            code = wait(attempt(folder, options, log))
        assert code == 0, log.read_text()
        rounds.append(outcome(folder))
        shutil.rmtree(folder)
    text = "".join(path.read_text() for path in sorted(home.glob("run-*.log")))
    result = {"wanted": wanted, "rounds": rounds, "killed": killed, "lost": lost, "log": text}
    (home / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
