"""Foreign text in a model card, which is Markdown: shown as it is, whatever signs are in it, and without secrets."""

from __future__ import annotations

from typing import Any

from convexlm.redaction import clean


def plain(text: Any) -> str:
    """In a sentence or a heading: no HTML."""
    return clean(text).replace("<", "&lt;")


def code(text: Any) -> str:
    """Between backticks, of which it can hold none."""
    return f"`{clean(text).replace('`', chr(39))}`"


def cell(text: str) -> str:
    """In a table, which a `|` would split."""
    return text.replace("|", "\\|")
