"""`metrics.jsonl`: what a training run logs, one line a logging step, each step once however often it is resumed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from convexlm.files import read_jsonl, to_json_line, write_jsonl

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

FILE_NAME = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Appends every log of a run to `metrics.jsonl` in its output folder, on the main process.

    A number that JSON cannot hold (NaN or infinite, as the loss of a diverged run) stands there as null.

    When training goes on from a checkpoint, lines of later steps (logged before the run was stopped) are cut first,
    so that no step stands there twice.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut what a run logged after the checkpoint from which it now goes on."""
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / FILE_NAME
        if path.exists():
            kept = [
                line for line in read_jsonl(path, torn_last_line_ok=True) if line.get("step", 0) <= state.global_step
            ]
            write_jsonl(path, [] if state.global_step == 0 else kept)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line."""
        # The summary at the end of training repeats what the lines before it say. (`train_runtime` is in every log
        # under `include_num_input_tokens_seen`.)
        if not state.is_world_process_zero or not logs or "train_loss" in logs:
            return
        path = Path(args.output_dir) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        line = {"step": state.global_step, **{key: _plain(value) for key, value in logs.items()}}
        with path.open("a", encoding="utf-8") as file:
            file.write(to_json_line(line))
            file.flush()
            os.fsync(file.fileno())


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; empty if there is none."""
    path = Path(folder) / FILE_NAME
    return list(read_jsonl(path, torn_last_line_ok=True)) if path.exists() else []


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)
