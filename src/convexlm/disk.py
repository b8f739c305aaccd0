"""What to say of errors that are the disk's: full, or not to be written. Libraries have words of their own for it."""

from __future__ import annotations

import errno
import re

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
# torch's writer says nothing of the reason; Rust's libraries (tokenizers, safetensors) put the number into a text.
_FULL_TEXT = re.compile(
    r"No space left on device|\(os error 28\)|PytorchStreamWriter failed writing|inline_container\.cc.*unexpected pos"
)


def disk_failure(error: BaseException) -> str | None:
    """One line for an error of the disk, whoever raised it; None for any other error."""
    found: BaseException | None = error
    while found is not None:  # not along `__context__`, where an error that was dealt with may stand
        if isinstance(found, OSError) and found.errno in _CLOSED:
            return f"{found.filename or 'a file'}: cannot be used ({found.strerror})"
        if isinstance(found, OSError) and found.errno in _FULL:
            return _full(found.filename)
        if _FULL_TEXT.search(str(found)):
            return _full(None)
        found = found.__cause__
    return None


def _full(name: object) -> str:
    where = f"{name}: " if name else ""
    return f"{where}no space left on the disk; what was finished before is kept, so go on once there is room"
