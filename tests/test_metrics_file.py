"""`metrics.jsonl`: valid JSON, one line a log, cut back where a run goes on from an earlier step."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import torch

from convexlm.metrics_file import FILE_NAME, MetricsFile, read_metrics


def state(step, main=True):
    return SimpleNamespace(global_step=step, is_world_process_zero=main)


def log(folder, step, main=True, **logs):
    MetricsFile().on_log(SimpleNamespace(output_dir=str(folder)), state(step, main), None, logs=logs)


def begin(folder, step, main=True):
    MetricsFile().on_train_begin(SimpleNamespace(output_dir=str(folder)), state(step, main), None)


def test_what_json_cannot_hold_is_null(tmp_path):
    log(
        tmp_path / "new" / "folder",
        3,
        loss=float("nan"),
        nll=float("inf"),
        low=-np.float32("inf"),
        tensor=torch.tensor(1.5),
        count=np.int64(7),
        nested={"a": [float("nan"), 1]},
        flag=True,
        other=object,
    )
    text = (tmp_path / "new" / "folder" / FILE_NAME).read_text(encoding="utf-8")
    line = json.loads(text, parse_constant=lambda constant: 1 / 0)
    assert line.pop("other").startswith("<class")
    assert line == {
        **{"step": 3, "loss": None, "nll": None, "low": None, "tensor": 1.5, "count": 7},
        **{"nested": {"a": [None, 1]}, "flag": True},
    }


def test_a_log_is_a_line_but_for_the_summary_and_other_processes(tmp_path):
    log(tmp_path, 1, loss=1.0)
    log(tmp_path, 1, main=False, loss=2.0)
    log(tmp_path, 1, train_runtime=3.0, train_loss=1.0)
    log(tmp_path, 1)
    log(tmp_path, 1, eval_loss=4.0)
    log(tmp_path, 2, loss=5.0, train_runtime=6.0)  # with `include_num_input_tokens_seen`
    assert [line.get("loss") or line["eval_loss"] for line in read_metrics(tmp_path)] == [1.0, 4.0, 5.0]


def test_going_on_cuts_later_steps_and_a_torn_line(tmp_path):
    for step in range(1, 5):
        log(tmp_path, step, loss=float(step))
    with (tmp_path / FILE_NAME).open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')
    begin(tmp_path, 2, main=False)
    assert len(read_metrics(tmp_path)) == 4
    begin(tmp_path, 2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    log(tmp_path, 3, loss=30.0)
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0, 2.0, 30.0]
    begin(tmp_path, 0)
    assert read_metrics(tmp_path) == []


def test_no_file_no_lines(tmp_path):
    begin(tmp_path, 3)
    assert read_metrics(tmp_path) == []
