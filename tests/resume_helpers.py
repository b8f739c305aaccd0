"""A model with dropout, its data and options, and one run held against another, for the tests of resumed training."""

from __future__ import annotations

import json
import os

import torch

from convexlm.metrics_file import read_metrics
from training_helpers import Run, write_model_files, write_records


def write_files(folder):
    """A model with dropout, whose training depends on the random state, and data."""
    write_model_files(folder / "model")
    config = folder / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.1}))
    write_records(folder / "data.jsonl", 25, weights=True)
    write_records(folder / "eval.jsonl", 3, seed=5)
    return folder


def given(files, **settings):
    made = {
        "config_name": files / "model",
        "tokenizer_name": files / "model",
        "dataset": files / "data.jsonl",
        "max_steps": 8,
        "save_steps": 4,
        "logging_steps": 3,
        "per_device_train_batch_size": 4,
        "optim": "adamw_torch",
        "lr_scheduler_type": "linear",
    }
    return {**made, **settings}


def metrics(folder):
    return [
        {key: value for key, value in line.items() if not key.endswith(("_runtime", "_per_second"))}
        for line in read_metrics(folder)
    ]


def assert_same_run(got, wanted, step=8):
    assert metrics(got) == metrics(wanted)
    theirs = Run(wanted, step).weights
    for name, value in Run(got, step).weights.items():
        assert torch.equal(value, theirs[name]), name


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))
