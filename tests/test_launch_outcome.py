"""What a process of a launch leaves of its end, and what the launcher tells of it."""

from __future__ import annotations

import errno
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from convexlm.errors import Stopped
from convexlm.launch import child, training
from convexlm.launch.environment import Plan

if TYPE_CHECKING:
    from pathlib import Path

TWO = Plan("MULTI_GPU", 2, 2, 0, False, True, {})


@pytest.fixture
def ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a process's part, whose training fails with an error."""
    (tmp_path / training.JOB_FILE).write_text(json.dumps({"options": {}, "resume": False, "title": "train"}))
    monkeypatch.setattr(child, "die_with", lambda parent: None)

    def run(rank: int, error: BaseException) -> int:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr("convexlm.verbs.train.train_here", fail)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv(training.JOB_VARIABLE, str(tmp_path / training.JOB_FILE))
        monkeypatch.setenv(training.PARENT_VARIABLE, str(os.getppid()))
        return child.main()

    return run


@pytest.mark.parametrize(
    ("number", "told"),
    [(errno.ENOSPC, "optimizer.pt: no space left on the disk"), (errno.EACCES, "optimizer.pt: cannot be used")],
)
def test_a_disk_that_is_full_or_closed_is_one_line(
    ended: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, told: str
) -> None:
    codes = [ended(1, OSError(number, os.strerror(number), "optimizer.pt")), ended(0, RuntimeError("lost the other"))]
    with pytest.raises(Stopped, match=told) as stopped:
        training._outcome(tmp_path, TWO, codes[::-1], 0, "train")
    assert stopped.value.exit_code == 1
    assert "Traceback" not in capsys.readouterr().err


def test_only_the_first_traceback_is_shown(ended: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = [ended(1, ArithmeticError("the cause")), ended(0, RuntimeError("lost the other"))]
    early, late = tmp_path / "traceback.000001.txt", tmp_path / "traceback.000000.txt"
    os.utime(early, ns=(0, late.stat().st_mtime_ns - 1))
    with pytest.raises(SystemExit) as left:
        training._outcome(tmp_path, TWO, codes[::-1], 0, "train")
    said = capsys.readouterr().err
    assert left.value.code == 1 and said.count("Traceback") == 1 and "ArithmeticError: the cause\n" in said
    with pytest.raises(SystemExit):  # that of one which only lost another that was killed tells nothing
        training._outcome(tmp_path, TWO, [1, -9], 1, "train")
    said = capsys.readouterr().err
    assert "process 1 of 2 ended by SIGKILL" in said and "Traceback" not in said
