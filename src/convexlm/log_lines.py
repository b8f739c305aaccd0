"""What a script sees of a training: transformers' progress bar, and each log as a line, both on stderr.

transformers prints the lines to stdout, which belongs to results. `convexlm train` has lines of its own (`progress`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import ProgressCallback, TrainerCallback

from convexlm.progress import note

if TYPE_CHECKING:
    from collections.abc import Mapping


class LogLines(TrainerCallback):
    """Prints each log, as SFTTrainer does, in four digits."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print one."""
        if state.is_world_process_zero and logs:
            note(line_of(logs))


class ProgressLines(ProgressCallback):
    """The progress bar, which moves down for the lines."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print one."""
        if state.is_world_process_zero and logs and self.training_bar is not None:
            self.training_bar.write(line_of(logs), file=self.training_bar.fp)


def line_of(logs: Mapping[str, Any]) -> str:
    """A log as one line: `{'loss': 0.9821, 'nll': 4.107, ...}`."""
    return str({key: _short(value) for key, value in logs.items() if key != "total_flos"})


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
