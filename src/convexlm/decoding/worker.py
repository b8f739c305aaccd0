"""A decoding process: `python -m convexlm.decoding.worker`, started by `convexlm.decoding.pool`.

It reads JSON Lines from stdin (first the jobs, then batches) and writes JSON Lines to what was its stdout. It holds no
file and no lock: whenever it dies, what it had not yet told is all that is lost.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from convexlm.decoding.work import Worker, from_message
from convexlm.errors import UserError


def main() -> int:
    """Serve until stdin ends."""
    # An interrupt reaches the whole process group; the parent ends us by closing our stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # Whatever libraries print goes to stderr, so that our lines are alone on the pipe.
    out = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)

    def tell(**message: object) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    first = json.loads(sys.stdin.readline())
    try:
        if first["threads"]:
            import torch

            torch.set_num_threads(first["threads"])
        worker = Worker(*from_message(first))
        tell(lengths=worker.start())
        for line in sys.stdin:
            number, batch = json.loads(line)
            for _, part, answers in worker.run([(number, batch)]):
                tell(number=number, part=list(part), answers=answers)
            tell(idle=True)
    except UserError as error:
        tell(refused=str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
