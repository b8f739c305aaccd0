"""How a process that trained together with others ends.

A worker thread of gloo lets go of a finished collective's tensors whenever it gets to run, which on a busy machine may
be after the interpreter began to shut down. A tensor that Python has seen needs the interpreter's lock to be let go
of, and CPython up to 3.13 ends a thread that asks for it then, in the middle of a C++ destructor: "terminate called
without an active exception", SIGABRT, after a training that was finished and saved. `destroy_process_group` ends those
threads only if nothing else refers to the group, and FSDP's modules do. So a process that was part of a group leaves
by `os._exit`, once all that Python does at its end is done.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn

_left_a_group = False


def leave_group(*, together: bool = True) -> None:
    """Leave the process group, if there is one.

    Args:
        together: wait until all processes are here, so that none loses the one that keeps the group's store. Not to be
            asked for where another process may have failed.
    """
    global _left_a_group
    if not _in_a_group():
        return
    import torch.distributed as dist

    if together:
        dist.barrier()
    dist.destroy_process_group()
    _left_a_group = True


def leave_process(code: int) -> NoReturn:
    """End the process as `sys.exit(code)` would; one that has been in a process group does not run into its threads.

    Threads are joined, what was registered with `atexit` runs, and the standard streams are flushed, as always.
    """
    if not _left_a_group and not _in_a_group():
        sys.exit(code)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed by its reader, or by the program
            stream.flush()
    os._exit(code)


def leave(code: int) -> NoReturn:
    """Leave the group, with the others if this process has done its work, and end the process."""
    leave_group(together=code == 0)
    leave_process(code)


def _in_a_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
