"""The end of a process that was part of a group."""

from __future__ import annotations

import subprocess
import sys

import pytest

from training_helpers import environment

GROUP = """
import atexit, os, sys, threading, time
import torch.distributed as dist
from convexlm.launch import leave
class Late:
    def __del__(self, write=os.write):
        write(1, b"torn down")
late = Late()
atexit.register(lambda: print("registered"))
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
if {group}:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
print("printed", end="")
leave({code})
"""


@pytest.mark.parametrize("code", [0, 3])
@pytest.mark.parametrize("group", [True, False])
def test_all_is_done_but_the_interpreters_own_end(group, code):
    """With a group, module globals are not torn down: that is when native threads would meet a dying interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", GROUP.format(group=group, code=code)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == "printedthread\nregistered\n" + ("" if group else "torn down")


def test_without_torch_it_is_an_ordinary_exit():
    script = "import sys; from convexlm.launch.ending import leave; assert 'torch' not in sys.modules; leave(4)"
    assert subprocess.run([sys.executable, "-c", script], env=environment(), timeout=240).returncode == 4
