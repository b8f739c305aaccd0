"""An instruction file means the same prompt in a recipe and on the command line."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from convexlm.sweep import read_instruction
from convexlm.verbs.decode import _instruction

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("content", "meant"),
    [
        ("Say it.\n", "Say it."),
        ("Say it.", "Say it."),
        ("\nSay it.\r\n\n", "\nSay it."),
        ("\r\n  Say it.  \n", "\r\n  Say it.  "),
        ("Say it.\n\nIn German.\n", "Say it.\n\nIn German."),
    ],
)
def test_only_the_line_ends_at_the_end_are_no_part_of_it(tmp_path: Path, content: str, meant: str) -> None:
    file = tmp_path / "instruction.txt"
    file.write_bytes(content.encode())
    args = argparse.Namespace(instruction=None, instruction_file=str(file), documents=None, pair="en-de")
    recipe: Any = SimpleNamespace(decode={"instruction_file": str(file)})
    assert _instruction(args) == read_instruction(recipe) == meant
