"""What to say of errors that are the disk's: full, or not to be written. Libraries have words of their own for it."""

from __future__ import annotations

import errno

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
# torch's writer says nothing of the reason; Rust's libraries (tokenizers, safetensors) put the number into a text.
_FULL_TEXTS = ("No space left on device", "(os error 28)", "PytorchStreamWriter failed writing", "unexpected pos")


def disk_failure(error: BaseException) -> str | None:
    """One line for an error of the disk, whoever raised it; None for any other error."""
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        seen.append(one)
        one = one.__cause__ or one.__context__
    for found in seen:
        if isinstance(found, OSError) and found.errno in _CLOSED:
            return f"{found.filename or 'a file'}: cannot be used ({found.strerror})"
        if isinstance(found, OSError) and found.errno in _FULL:
            return _full(found.filename)
        if any(text in str(found) for text in _FULL_TEXTS):
            return _full(None)
    return None


def _full(name: object) -> str:
    where = f"{name}: " if name else ""
    return f"{where}no space left on the disk; what was finished before is kept, so go on once there is room"
