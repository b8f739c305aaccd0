"""The one exception that means "the user's input is wrong"."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave cannot be used: a file, a line, an option, a recipe entry.

    The message is one line that says what is wrong, where, and how to mend it. The command line prints it on
    stderr without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split("\n")))
