"""A decoding process: `python -m convexlm.decoding.worker THREADS [PARENT]`, started by `convexlm.decoding.links`.

It reads JSON Lines (checkpoints to open and batches of their jobs) and writes JSON Lines. It holds no file and no
lock: whenever it dies, what it had not yet told is all that is lost.

With the id of its parent it leads a process group, which holds whatever it starts (an engine that has most of a GPU's
memory), and which it kills once the parent is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from dataclasses import astuple, replace
from typing import IO, TYPE_CHECKING

from convexlm.decoding.work import Batch, Worker, from_message
from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable


def serve(reader: Iterable[str], writer: IO[str], local_rank: int | None = None) -> int:
    """Do what `reader` asks for until it ends; returns the exit code.

    Args:
        reader: lines from `convexlm.decoding.pool`.
        writer: takes the answers.
        local_rank: which GPU of this machine is ours where the line says `cuda`; None: as the line says.
    """

    def tell(**message: object) -> None:
        writer.write(json.dumps(message) + "\n")
        writer.flush()

    worker = Worker()
    try:
        for line in reader:
            message = json.loads(line)
            if "open" in message:
                load = from_message(message)
                if local_rank is not None and load.engine.device == "cuda":
                    import torch

                    device = f"cuda:{local_rank % max(1, torch.cuda.device_count())}"
                    load = replace(load, engine=replace(load.engine, device=device))
                sizes = worker.open(load)
                tell(opened=message["open"], sizes=[[job, *astuple(own)] for job, own in sizes.items()])
                continue
            job, positions, number, patient = message["batch"]
            for part in worker.decode(Batch(job, tuple(positions), number, patient)):
                tell(part=list(part.positions), answers=list(part.answers), seconds=part.seconds)
            tell(idle=True)
    except UserError as error:
        tell(refused=str(error))
        return 2
    finally:
        worker.close()
    return 0


def _end_with(parent: int) -> None:
    """Kill our process group once the parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpid(), signal.SIGKILL)


def main() -> int:
    """Serve until stdin ends."""
    # An interrupt reaches the whole process group; the parent ends us by closing our stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if len(sys.argv) > 2:
        threading.Thread(target=_end_with, args=[int(sys.argv[2])], daemon=True).start()
    else:  # else a lost pipe would end us before the others
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # Whatever libraries print goes to stderr, so that our lines are alone on the pipe.
    out = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    if threads := int(sys.argv[1]):
        import torch

        torch.set_num_threads(threads)
    try:
        return serve(sys.stdin, out)
    except BrokenPipeError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
