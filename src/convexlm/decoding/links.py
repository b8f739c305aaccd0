"""Lines of JSON to and from a decoding process: one that we started, or another rank over a socket."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import queue
    import socket

    Inbox = queue.Queue[tuple[int, Any]]


SECONDS_TO_FINISH = 30
"""How long a worker may take to end what it has started."""


class Link:
    """One worker, as the process that gives out the work sees it.

    Args:
        number: the worker's number.
        inbox: where its messages go, and None at its end.
        reader: its lines.
        writer: takes ours.
    """

    def __init__(self, number: int, inbox: Inbox, reader: IO[str], writer: IO[str]) -> None:
        self.number = number
        self.device: str | None = None
        self._inbox = inbox
        self._reader = reader
        self._writer = writer
        threading.Thread(target=self._listen, daemon=True).start()

    def tell(self, message: Any) -> None:
        """Send a message; if the worker is gone, its end is on the queue."""
        with contextlib.suppress(OSError, ValueError):
            self._writer.write(json.dumps(message) + "\n")
            self._writer.flush()

    def how_it_ended(self) -> str:
        """For people, in brackets."""
        return " (its connection ended)"

    def finish(self) -> None:
        """Nothing is left for it to do: let the worker put away what it has started, if anything."""

    def end(self) -> None:
        """End the worker: it holds nothing that could be left half-done."""
        for stream in (self._writer, self._reader):
            with contextlib.suppress(OSError):
                stream.close()

    def _listen(self) -> None:
        with contextlib.suppress(ValueError, OSError):  # a line torn by its death; a pipe that we closed
            for line in self._reader:
                self._inbox.put((self.number, json.loads(line)))
        self._inbox.put((self.number, None))


class Child(Link):
    """A worker process on this machine.

    Args:
        number: its number.
        inbox: see `Link`.
        threads: of its computations on a CPU; 0: as its environment says.
        takes_along: what it has started ends with it; see `convexlm.decoding.worker`.
    """

    def __init__(self, number: int, inbox: Inbox, threads: int, *, takes_along: bool = False) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}
        self._takes_along = takes_along
        us = [str(os.getpid())] if takes_along else []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "convexlm.decoding.worker", str(threads), *us],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="ascii",
            env=environment,
            start_new_session=takes_along,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        super().__init__(number, inbox, self._process.stdout, self._process.stdin)

    def how_it_ended(self) -> str:
        """For people, in brackets."""
        code = self._process.wait()
        return f" (signal {-code})" if code < 0 else f" (exit code {code})"

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def finish(self) -> None:
        """Let what it has started end by itself, which would else leave shared memory behind."""
        if self._takes_along:
            with contextlib.suppress(OSError):
                self._writer.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(SECONDS_TO_FINISH)

    def end(self) -> None:
        """End the worker, and wait until it is gone."""
        self._process.kill()
        if self._takes_along:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        super().end()


class Remote(Link):
    """A worker on the other side of a socket."""

    def __init__(self, number: int, inbox: Inbox, connection: socket.socket) -> None:
        self._socket = connection
        super().__init__(
            number, inbox, connection.makefile(encoding="ascii"), connection.makefile("w", encoding="ascii")
        )

    def end(self) -> None:
        """Let the worker go."""
        import socket

        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
