"""The instruction of a prompt out of a file, the same for `convexlm run` and `convexlm decode`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convexlm.errors import UserError
from convexlm.files import read_text

if TYPE_CHECKING:
    from pathlib import Path


def read_instruction_file(path: str | Path, option: str) -> str:
    """A file's text without the line ends at its end, which editors put there; an empty line at its head stays.

    Args:
        path: the file.
        option: what names it, for a message.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    text = read_text(path).rstrip("\r\n")
    if not text.strip():
        raise UserError(f"{option} {path}: the file is empty")
    return text
