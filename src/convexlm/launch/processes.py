"""Starting the processes of a launch on this machine, passing signals on to them, and waiting for them.

`torchrun` would do, but for three things: it ends workers some seconds after a signal, which is too soon for a large
model that is being saved; it prints a page for every failure, also where a user's mistake is told in one line; and a
Ctrl-C in a terminal reaches its workers twice. Here the workers are out of the terminal's reach, and every signal
reaches them once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import FrameType

PASSED_ON = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
INTERRUPTS_TO_KILL = 3
SECONDS_TO_FOLLOW = 10.0  # for the others, after one has failed; they mostly fail of the same
SECONDS_TO_END = 5.0  # after SIGTERM, before SIGKILL
SECONDS_BETWEEN_LOOKS = 0.05


class Workers:
    """Child processes that work together: they all succeed, or all end.

    Args:
        command: what each of them runs.
        environments: one a process.

    Attributes:
        failed: the number of the first that was seen to fail; None while none has.
    """

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._interrupts = 0
        self.failed: int | None = None
        try:
            for environment in environments:
                self._processes.append(
                    subprocess.Popen(
                        list(command),
                        env=dict(environment),
                        stdin=subprocess.DEVNULL,
                        stdout=2,  # standard output belongs to the result
                        start_new_session=True,
                    )
                )
        except BaseException:
            self.kill()
            raise

    def wait(self) -> list[int]:
        """Wait for all of them, passing on signals; after a failure the others are given a while, and then ended.

        Returns:
            Exit codes, in order; -N for one that ended by signal N.
        """
        with self._passing_on():
            deadline = None
            while True:
                codes = [process.poll() for process in self._processes]
                if deadline is None and any(codes):
                    deadline = time.monotonic() + SECONDS_TO_FOLLOW
                    self.failed = next(number for number, code in enumerate(codes) if code)
                if None not in codes:
                    break
                if deadline is not None and time.monotonic() > deadline:
                    self._end()
                time.sleep(SECONDS_BETWEEN_LOOKS)
        return [process.wait() for process in self._processes]

    def kill(self) -> None:
        """End all of them at once."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()

    def _end(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        end = time.monotonic() + SECONDS_TO_END
        while time.monotonic() < end and any(process.poll() is None for process in self._processes):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        self.kill()

    @contextlib.contextmanager
    def _passing_on(self) -> Iterator[None]:
        before: dict[int, Any] = {}
        for number in PASSED_ON:
            if signal.getsignal(number) != signal.SIG_IGN:  # `nohup`, or a shell's background job
                before[number] = signal.signal(number, self._pass_on)
        try:
            yield
        except BaseException:
            self.kill()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        to_kill = self._interrupts >= INTERRUPTS_TO_KILL
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL if to_kill else number)


def die_with(parent: int) -> None:
    """Have this process killed when its parent is gone, however that came (Linux; elsewhere nothing happens)."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        set_signal_at_parents_death = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_signal_at_parents_death, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it was gone before the line above
        os._exit(1)
