"""Standard output and error as people, pipes and full disks have them: what cannot be encoded, closed, or written."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any


def make_forgiving() -> None:
    r"""Have text that a stream's encoding cannot hold printed as `\u2605`, in place of an error after all the work."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            with contextlib.suppress(AttributeError, ValueError):  # a stream of somebody else's, or closed
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def json_text(result: Any) -> str:
    r"""A result as one line of JSON; in ASCII where standard output cannot hold its characters.

    A lone surrogate, which a file name that is no UTF-8 has, is written as `\udce9`.
    """
    text = json.dumps(result, ensure_ascii=False, default=str)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return json.dumps(result, ensure_ascii=True, default=str)
    return text
