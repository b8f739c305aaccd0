"""Trains with two processes in which something happens to one; run as a script by tests/test_interrupts.py.

`on_two_ranks.py FOLDER MODEL DATA` does each job of `JOBS` in two forked processes and writes their exit codes and
what they said to `FOLDER/result.json`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
from pathlib import Path

import torch

from convexlm import cli
from training_helpers import TRAIN, words

RANK = 1  # the one it happens to; the other has to hear of it
JOBS = {
    "whole": {},
    "stopped": {"step": 5, "event": "SIGTERM"},
    "stopped, resumed": {"folder": "stopped"},
    "nan": {"step": 3, "event": "nan"},
    "skipped": {"step": 3, "event": "nan", "options": ["--skip_nonfinite_steps"]},
    "streamed": {"options": ["--streaming"]},
    "each step": {"options": ["--logging_steps", "1"]},
    # 25 records in steps of 8: an epoch's last step has one of its own and three that fill it up.
    "rebalanced": {
        "options": ["--train_sampling_strategy", "batch_rebalance", "--gradient_accumulation_steps", "2"],
    },
}
OPTIONS = {
    "max_steps": 8,
    "save_steps": 8,
    "logging_steps": 3,
    "per_device_train_batch_size": 2,
    "optim": "adamw_torch",
}


def arrange(step, event):
    """Let something happen to this process in a step of its own count."""
    from convexlm.nonfinite import NonFiniteGuard
    from convexlm.trainer import ConvexTrainer

    steps, begin, watch = [0], ConvexTrainer._begin_step, NonFiniteGuard._watch_loss

    def begin_step(self):
        steps[0] += 1
        if steps[0] == step and event == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        begin(self)

    def watch_loss(self, loss):
        return watch(self, loss * math.nan if steps[0] == step and event == "nan" else loss)

    ConvexTrainer._begin_step = begin_step
    NonFiniteGuard._watch_loss = watch_loss


def keep_mean_loss(file):
    """Write down what `train` gives as the mean loss of its steps."""
    from convexlm.trainer import ConvexTrainer

    original = ConvexTrainer.train

    def kept(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        file.write_text(json.dumps(output.training_loss))
        return output

    ConvexTrainer.train = kept


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(rank, port, job, folder, model, data):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
        out = os.open(f"{folder}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        keep_mean_loss(Path(f"{folder}.{rank}.loss"))
        if rank == RANK and "event" in job:
            arrange(job["step"], job["event"])
        given = words(dataset=data, config_name=model, tokenizer_name=model, output_dir=folder, **OPTIONS)
        code = cli.main(["train", *TRAIN, *given, "--resume", *job.get("options", [])])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def main():
    home, model, data = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    from convexlm import trainer, training, training_data  # noqa: F401

    result = {}
    for name, job in JOBS.items():
        folder, port = home / job.get("folder", name), free_port()
        pids = [start(rank, port, job, folder, model, data) for rank in range(2)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        logs = [Path(f"{folder}.{rank}.log") for rank in range(2)]
        result[name] = {"codes": codes, "logs": [log.read_text() for log in logs]}
        result[name]["folders"] = sorted(path.name for path in folder.glob("checkpoint-*"))
        losses = [Path(f"{folder}.{rank}.loss") for rank in range(2)]
        result[name]["train_loss"] = [json.loads(file.read_text()) for file in losses if file.exists()]
        for file in (*logs, *losses):
            file.unlink(missing_ok=True)
    (home / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
