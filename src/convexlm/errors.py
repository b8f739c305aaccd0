"""The exception that means "the user's input is wrong", and the one that means "stopped, and here is why"."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave cannot be used: a file, a line, an option, a recipe entry.

    The message is one line that says what is wrong, where, and how to mend it. The command line prints it on
    stderr without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split("\n")))


class Stopped(Exception):
    """Work ended before it was done, by a signal or for its own good; what is on disk is whole.

    The message is one line that says why, what was left and how to go on. The command line prints it on stderr
    without a traceback and exits with `exit_code`.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(" ".join(message.split("\n")))
        self.exit_code = exit_code


def without_worker_traceback(error: UserError) -> UserError:
    """An error as it was raised, without the traceback of a data loader's worker that torch puts into its text."""
    text = str(error)
    if "in DataLoader worker process" not in text:
        return error
    return UserError(text.rstrip().rsplit(f"{UserError.__name__}: ", 1)[-1])


def first_line(error: Exception) -> str:
    """The first line of what an error says, or what it is called if it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__
