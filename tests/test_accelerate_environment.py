"""accelerate's defaults are taken without touching the environment that native threads read."""

from __future__ import annotations

import ctypes
import os
import sys

from accelerate.utils import FullyShardedDataParallelPlugin, GradScalerKwargs, environment

import convexlm.trainer  # noqa: F401
from convexlm.accelerate_environment import clear_environment

WATCHED: list[list[str]] = []


def hook(event, args):
    if WATCHED and event in ("os.putenv", "os.unsetenv"):
        WATCHED[-1].append(event)


sys.addaudithook(hook)


def changes_of(function):
    WATCHED.append([])
    try:
        return function(), WATCHED[-1]
    finally:
        WATCHED.pop()


def test_the_watch_sees_a_change(monkeypatch):
    _, seen = changes_of(lambda: monkeypatch.setenv("CONVEXLM_TEST", "1"))
    assert seen == ["os.putenv"]


def test_options_are_compared_with_plain_defaults_and_nothing_is_written():
    assert environment.clear_environment is clear_environment
    found, seen = changes_of(GradScalerKwargs(init_scale=8.0).to_kwargs)
    assert found == {"init_scale": 8.0} and seen == []


def test_inside_python_sees_no_variable_and_c_sees_all(monkeypatch):
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    monkeypatch.setenv("FSDP_VERSION", "2")
    whole = os.environ
    with clear_environment():
        assert not os.environ and getenv(b"FSDP_VERSION") == b"2"
        default = FullyShardedDataParallelPlugin().fsdp_version
    assert os.environ is whole and os.environ["FSDP_VERSION"] == "2"
    assert default == 1 and FullyShardedDataParallelPlugin().fsdp_version == 2
