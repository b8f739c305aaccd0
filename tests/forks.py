"""A process that forks for each attempt at a piece of work, so that a kill does not wait for its imports."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVER = """
import os, sys, traceback
from pathlib import Path
sys.path.insert(0, {tests!r})
{setup}
while line := sys.stdin.readline():
    pid = os.fork()
    if not pid:
        try:
            attempt(Path(line.strip()))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(pid, flush=True)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    print("ended", flush=True)
    sys.stdin.readline()  # until then the number is nobody else's, and a kill that comes late meets a dead process
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forks:
    """Runs `attempt(folder)`, which the script `setup` defines, in forks of one process."""

    def __init__(self, setup: str, words: list[str]):
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        script = SERVER.format(tests=str(Path(__file__).parent), setup=setup)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", script, *words]
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def send(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def run(self, folder: Path, seconds: float | None = None) -> bool:
        """Whether an attempt came to its end; with `seconds` it is killed (`SIGKILL`) when it has taken so long."""
        output = self.process.stdout
        self.send(str(folder))
        pid = int(output.readline())
        if seconds is not None and not select.select([output], [], [], seconds)[0]:
            os.kill(pid, signal.SIGKILL)
        assert output.readline() == "ended\n"
        self.send("")
        status = int(output.readline())
        assert status in (0, -signal.SIGKILL), "it failed by itself"
        return status == 0


@contextmanager
def forks(setup: str, *words: str) -> Iterator[Forks]:
    server = Forks(setup, list(words))
    with server.process:
        yield server
        server.process.stdin.close()
