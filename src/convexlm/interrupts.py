"""SIGTERM and SIGINT while training: noted, and acted upon where a step has ended.

A preemptible machine sends SIGTERM some seconds before it goes; a user presses Ctrl-C. Neither may cost the steps
since the last checkpoint. The handler only notes the signal; the trainer asks after every step, all its processes
agree (`agreed_signal`), save and stop. A second Ctrl-C is meant, and aborts at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import torch

from convexlm.launch.settings import under_a_launcher

if TYPE_CHECKING:
    from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# `torchrun` passes on to its workers a Ctrl-C that the terminal has sent to them already.
SECONDS_OF_ECHO = 1.0


class SignalWatch:
    """While entered, SIGINT and SIGTERM are noted in `number` in place of ending the process.

    Outside the main thread, and for a signal that the process was started to ignore (`nohup`), nothing changes. A
    second SIGINT raises KeyboardInterrupt; repeated SIGTERMs, of which schedulers send several, do nothing more.

    Attributes:
        number: the first signal that came, None before.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A forked worker of a data loader: it ends when this process says so, and not by the terminal's Ctrl-C.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if self.number is None:
            self.number, self._since = number, now
            if os.environ.get("RANK", "0") == "0":
                again = "; Ctrl-C again aborts at once" if number == signal.SIGINT else ""
                text = f"  {signal_name(number)}: finishing this step, then saving{again}\n"
                with contextlib.suppress(
                    OSError
                ):  # sys.stderr may be in the middle of a write; this is safe in a handler
                    os.write(2, text.encode())
        elif number == signal.SIGINT and (not under_a_launcher() or now - self._since > SECONDS_OF_ECHO):
            raise KeyboardInterrupt


def signal_name(number: int) -> str:
    """`SIGTERM` for 15."""
    return signal.Signals(number).name


def agreed_signal(number: int | None, device: torch.device) -> int | None:
    """The signal that any process has got, the same answer on all of them; every process has to call this."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return number
    if torch.distributed.get_world_size() == 1:
        return number
    highest = torch.tensor(number or 0, device=device)
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    return int(highest) or None
