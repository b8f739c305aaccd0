"""Keeps accelerate from emptying the process's environment while native threads may be reading it.

accelerate (1.12 to 1.15) takes every variable out of the environment and puts it back at each
`KwargsHandler.to_kwargs()`, which preparing a model calls. The C library's `getenv` in another thread, of a BLAS or of
a runtime, then reads a list that is being rewritten; one training has ended in a segmentation fault in it about there.
What accelerate wants, defaults that no variable has changed, needs only Python's view of the environment emptied.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from accelerate.utils import environment

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def clear_environment() -> Iterator[None]:
    """While entered, `os.environ` is empty; the process's own environment stays as it is."""
    kept = os.environ
    os.environ = {}  # type: ignore[assignment]  # noqa: B003 (not to clear it is the point)
    try:
        yield
    finally:
        os.environ = kept  # noqa: B003


def leave_the_environment() -> None:
    """Let accelerate use the function above in place of its own.

    Raises:
        RuntimeError: accelerate has none of that name, so a new release does it in another way.
    """
    if not hasattr(environment, "clear_environment"):
        raise RuntimeError("accelerate has no `utils.environment.clear_environment` any more; see this module's page")
    environment.clear_environment = clear_environment
