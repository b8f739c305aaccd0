"""Decoding's progress on stderr: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from convexlm.decoding.run import DecodeProgress

SECONDS_BETWEEN_LINES = 5.0


@contextlib.contextmanager
def progress_lines(title: str = "", *, note: str = "") -> Iterator[Callable[[DecodeProgress], None]]:
    """A callback for `decode_jobs(progress=...)` that shows sentences done, rate and time left on stderr.

    Args:
        title: what the lines begin with, in place of the checkpoint's name. Whoever gives one tells of starts and ends
            himself: there are lines for jobs that take long only, and a bar is removed at the end.
        note: a line to begin with once there is progress, so that a refusal stays the only line.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _Lines(console, title, note)
        return
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    tasks: dict[int, TaskID] = {}
    with Progress(*columns, console=console, transient=bool(title)) as bar:

        def update(state: DecodeProgress) -> None:
            if note and not tasks:
                bar.console.print(note, markup=False, soft_wrap=True)
            if state.job_number not in tasks:
                name = escape(_name(state, title))
                tasks[state.job_number] = bar.add_task(name, total=state.num_sentences, rate="")
            bar.update(tasks[state.job_number], completed=state.done, rate=_rate(state))

        yield update


class _Lines:
    """Prints a job's start, its end, and a line now and then between."""

    def __init__(self, console: Console, title: str, note: str) -> None:
        self.console = console
        self.title = title
        self.note = note
        self.printed_at = time.monotonic()

    def __call__(self, state: DecodeProgress) -> None:
        if self.note:
            self.console.print(self.note, markup=False, soft_wrap=True)
            self.note = ""
        now = time.monotonic()
        edge = not self.title and (not state.tokens or state.done == state.num_sentences)
        if edge or now - self.printed_at > SECONDS_BETWEEN_LINES:
            self.printed_at = now
            line = f"{_name(state, self.title)}: {state.done}/{state.num_sentences} sentences  {_rate(state)}"
            self.console.print(line.rstrip(), markup=False, soft_wrap=True)


def _name(state: DecodeProgress, title: str) -> str:
    number = f" ({state.job_number}/{state.num_jobs})" if state.num_jobs > 1 else ""
    return f"{title or state.checkpoint} {state.job}{number}"


def _rate(state: DecodeProgress) -> str:
    new = state.done - state.resumed
    parts = [f"{state.resumed} done before"] if state.resumed else []
    if new and state.seconds > 0:
        left = (state.num_sentences - state.done) * state.seconds / new
        minutes, seconds = divmod(round(left), 60)
        parts.append(f"{new / state.seconds:.1f} sentences/s, {state.tokens / state.seconds:.0f} tokens/s")
        if state.done < state.num_sentences:
            parts.append(f"{minutes}:{seconds:02d} left")
    return ", ".join(parts)
