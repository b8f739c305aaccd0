"""`convexlm` called in this process, for the tests of the command line."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from convexlm import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest


def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a fixture does around each test: no hub, and afterwards the SIGPIPE of before, which `cli.main` sets."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = signal.getsignal(signal.SIGPIPE)
    yield
    signal.signal(signal.SIGPIPE, before)


def refused(words: list[Any], capfd: pytest.CaptureFixture[str]) -> str:
    """Run in this process; the one line on stderr."""
    capfd.readouterr()
    code = cli.main([str(word) for word in words])
    out, err = capfd.readouterr()
    assert code == cli.EXIT_USER_ERROR, err
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1, err
    assert err.startswith(f"convexlm {words[0]}: error: ")
    return err.rstrip("\n")
