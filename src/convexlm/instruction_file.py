"""The instruction of a prompt out of a file, the same for `convexlm run` and `convexlm decode`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from convexlm.errors import UserError
from convexlm.files import read_text

if TYPE_CHECKING:
    from pathlib import Path


# What other programs write for the two languages, in brackets of any kind.
_FOREIGN = re.compile(
    r"\[[a-z]*(?:src|tgt|trg|source|target|lang)[a-z_ ]*\]|\{+[a-z_]*(?:src|tgt|trg|source|target|lang)[a-z_]*\}+",
    re.I,
)


def said_of_placeholders(instruction: str) -> str | None:
    """What to say of a text that seems to mean the languages and does not name them as they are named here."""
    found = [text for text in dict.fromkeys(_FOREIGN.findall(instruction)) if text not in ("[SRC]", "[TGT]")]
    if not found:
        return None
    return (
        f"warning: {', '.join(found)} of the instruction stays in the prompt as it is; the languages' names are put "
        "where [SRC] and [TGT] stand"
    )


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
