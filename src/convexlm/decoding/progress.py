"""Decoding's progress on stderr: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console
    from rich.progress import Progress, TaskID

    from convexlm.decoding.run import DecodeProgress

SECONDS_BETWEEN_LINES = 5.0


@contextlib.contextmanager
def progress_lines(title: str = "", *, note: str = "") -> Iterator[_Bars | _Lines]:
    """A callback for `decode_jobs(progress=...)` that shows sentences done, rate and time left on stderr.

    Its `say` prints a line beside that.

    Args:
        title: of a sweep: what its lines begin with. One bar, or a line now and then, is for all of it, with the
            checkpoint and the job that were last worked on; starts and ends are the caller's to tell. Without it
            every job has its own bar, or lines at its start, its end and between.
        note: a line to begin with once there is progress, so that a refusal stays the only line.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _Lines(console, title, note)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, console=console, transient=bool(title)) as bar:
        yield _Bars(bar, title, note)


class _Bars:
    """A bar for every job, or one for the whole sweep."""

    def __init__(self, bar: Progress, title: str, note: str) -> None:
        self.bar = bar
        self.title = title
        self.note = note
        self.rows: dict[int, TaskID] = {}

    def __call__(self, state: DecodeProgress) -> None:
        from rich.markup import escape

        if self.note and not self.rows:
            self.say(self.note)
        key = 0 if self.title else state.job_number
        whole = state.sweep if self.title else state
        if key not in self.rows:
            self.rows[key] = self.bar.add_task("", total=whole.num_sentences, rate="")
        rate = _sweep_rate(state) if self.title else _rate(state)
        name = escape(_name(state, self.title))
        self.bar.update(self.rows[key], description=name, completed=whole.done, rate=rate)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.bar.console.print(text, markup=False, soft_wrap=True)


class _Lines:
    """Prints a job's start, its end, and a line now and then between; of a sweep a line now and then only."""

    def __init__(self, console: Console, title: str, note: str) -> None:
        self.console = console
        self.title = title
        self.note = note
        self.printed_at = time.monotonic()

    def __call__(self, state: DecodeProgress) -> None:
        if self.note:
            self.say(self.note)
            self.note = ""
        now = time.monotonic()
        edge = not self.title and (not state.tokens or state.done == state.num_sentences)
        if edge or now - self.printed_at > SECONDS_BETWEEN_LINES:
            self.printed_at = now
            line = f"{_name(state, self.title)}: {state.done}/{state.num_sentences} sentences"
            if self.title:
                line += f"; of all {state.sweep.done}/{state.sweep.num_sentences}  {_sweep_rate(state)}"
            else:
                line += f"  {_rate(state)}"
            self.say(line.rstrip())

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False, soft_wrap=True)


def _name(state: DecodeProgress, title: str) -> str:
    number = f" ({state.job_number}/{state.num_jobs})" if state.num_jobs > 1 else ""
    return " ".join(filter(None, (title, state.checkpoint, state.job))) + number


def _rate(state: DecodeProgress) -> str:
    new = state.done - state.resumed
    parts = [f"{state.resumed} done before"] if state.resumed else []
    if new and state.seconds > 0:
        parts.append(f"{new / state.seconds:.1f} sentences/s, {state.tokens / state.seconds:.0f} tokens/s")
        parts += _left(state.num_sentences - state.done, state.seconds / new)
    return ", ".join(parts)


def _sweep_rate(state: DecodeProgress) -> str:
    """Of all jobs together, model loads included."""
    sweep = state.sweep
    new = sweep.done - sweep.resumed
    parts = [f"{sweep.resumed} done before"] if sweep.resumed else []
    if new and sweep.seconds > 0:
        parts.append(f"{new / sweep.seconds:.1f} sentences/s")
        parts += _left(sweep.num_sentences - sweep.done, sweep.seconds / new)
    return ", ".join(parts)


def _left(sentences: int, seconds_each: float) -> list[str]:
    minutes, seconds = divmod(round(sentences * seconds_each), 60)
    return [f"{minutes}:{seconds:02d} left"] if sentences else []
