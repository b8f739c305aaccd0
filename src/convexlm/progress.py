"""Progress on stderr: a live bar on a terminal, plain lines anywhere else. Nothing here writes to stdout."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from rich.progress import TaskID
    from transformers import TrainerControl, TrainerState, TrainingArguments

SHOWN = (
    ("loss", "loss {:.4f}"),
    ("nll", "nll {:.4f}"),
    ("weight_mean", "weight {:.3f}"),
    ("effective_sample_size", "ess {:.2f}"),
)
SECONDS_BETWEEN_LINES = 5.0


def note(text: str) -> None:
    """One line for people on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


class TrainProgress(TrainerCallback):
    """Shows a training run's steps, rate, time left and latest statistics, in place of transformers' own output."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._live = sys.stderr.isatty()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._latest = ""
        self._printed_at = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self._begun, self._first_step = time.monotonic(), state.global_step
        if not state.is_world_process_zero:
            return
        if self._live:
            self._progress = Progress(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[latest]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(
                self.title, total=state.max_steps, completed=state.global_step, latest=""
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=state.global_step, latest=self._latest)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take up the latest statistics."""
        values = [form.format(logs[key]) for key, form in SHOWN if logs and isinstance(logs.get(key), (int, float))]
        if not values:
            return
        self._latest = "  ".join(values)
        now = time.monotonic()
        last = state.global_step >= state.max_steps
        if not self._live and state.is_world_process_zero and (now - self._printed_at > SECONDS_BETWEEN_LINES or last):
            self._printed_at = now
            rate = (state.global_step - self._first_step) / max(now - self._begun, 1e-9)
            left = (state.max_steps - state.global_step) / rate if rate > 0 else 0.0
            note(f"  {self.title}: step {state.global_step}/{state.max_steps}  {self._latest}  {left:.0f} s left")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Give the terminal back; safe to call twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
