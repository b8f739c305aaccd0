"""That freed memory goes back to the system in training on a CPU, unless the user has chosen otherwise."""

from __future__ import annotations

import ctypes.util
import os
import platform
import subprocess
import sys

import pytest

from convexlm.allocator import return_freed_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is no glibc here")

# Blocks of 4 MiB, of which the last lives on: on glibc's heap it keeps all below it in the process.
SCRIPT = """
import sys
from convexlm.allocator import return_freed_memory

def resident():
    lines = open("/proc/self/status").read().split("\\n")
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

done = sys.argv[1] == "set" and return_freed_memory()
del_me = bytearray(30 << 20)  # glibc learns from it to keep blocks of such sizes
del del_me
before = resident()
blocks = [bytearray(b"1" * (4 << 20)) for _ in range(50)]
held = blocks[-1]
del blocks
print(done, resident() - before)
"""


def held_after(mode, **variables):
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_", "LD_PRE"))}
    command = [sys.executable, "-c", SCRIPT, mode]
    out = subprocess.run(command, env={**plain, **variables}, capture_output=True, text=True, check=True).stdout
    done, held = out.split()
    return done == "True", int(held)


def test_freed_blocks_leave_the_process():
    done, held = held_after("set")
    assert done and held < 20 << 20
    done, held = held_after("as it comes")
    assert not done and held > 100 << 20


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_what_the_user_has_chosen_stands(name, monkeypatch):
    for other in list(os.environ):
        if other.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")):
            monkeypatch.delenv(other)
    monkeypatch.setenv(
        name,
        {"MALLOC_ARENA_MAX": "2"}.get(
            name, "libjemalloc.so" if name == "LD_PRELOAD" else "glibc.malloc.trim_threshold=1"
        ),
    )
    assert not return_freed_memory("cpu")
    monkeypatch.delenv(name)
    assert not return_freed_memory("cuda")


def test_jemalloc_counts_where_it_is_loaded(tmp_path):
    library = ctypes.util.find_library("jemalloc")
    code = "from convexlm.allocator import jemalloc_is_preloaded as there; print(there())"

    def answer(preload):
        environment = {**os.environ, "LD_PRELOAD": preload}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    # What the loader cannot find it passes over with a warning: glibc allocates still.
    assert answer(str(tmp_path / "libjemalloc.so.2")) == "False"
    assert answer("") == "False"
    if library:
        assert answer(library) == "True"
