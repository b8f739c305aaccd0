"""The C library's allocator while training on a CPU: if asked for, freed tensors go back to the system.

glibc learns not to: each freed block of up to 32 MiB raises the size below which blocks come from its heap and stay
there. What then lies between blocks that live on cannot be used for larger ones (before 2.38 not even for equal ones,
as torch's are aligned), so the process holds 10 to 80 % more than its tensors need (results/memory.md), and no
estimate could say how much. With a fixed size of 1 MiB it does not; but every such block is then mapped and faulted in
anew, which costs time (docs/training.md), so it is not the default. jemalloc, preloaded, keeps and costs little.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

MMAP_THRESHOLD = 1 << 20
_TRIM_THRESHOLD = 128 << 10  # glibc's own at the start of a process
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def jemalloc_is_preloaded() -> bool:
    """Whether this process has jemalloc through `LD_PRELOAD`; one that could not be loaded does not count."""
    if "jemalloc" not in os.environ.get("LD_PRELOAD", ""):
        return False
    maps = Path("/proc/self/maps")
    return maps.exists() and "libjemalloc" in maps.read_text(encoding="utf-8", errors="replace")


def return_freed_memory(device_type: str = "cpu") -> bool:
    """Let blocks of 1 MiB and more go back to the system when they are freed.

    To be called before the model is made, as it holds for what is allocated after. Nothing is done on a GPU, without
    glibc, or where the user has chosen: a variable `MALLOC_*`, `GLIBC_TUNABLES` or a preloaded allocator.

    Returns:
        Whether it was done.
    """
    if device_type != "cpu" or not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if chosen or "malloc" in os.environ.get("GLIBC_TUNABLES", "") or "malloc" in os.environ.get("LD_PRELOAD", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))
