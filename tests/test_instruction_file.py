"""An instruction file means the same prompt in a recipe and on the command line."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from convexlm.instruction_file import said_of_placeholders
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


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Translate from [src] to [trg].", "[src], [trg]"),
        ("Translate {source_lang} to {{target}}: [TARGET LANG]", "{source_lang}, {{target}}, [TARGET LANG]"),
        ("Translate from [SRC] to [Tgt].", "[Tgt]"),
    ],
)
def test_placeholders_of_other_programs_are_told(text: str, found: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(said_of_placeholders(text)).startswith(f"warning: {found} of the instruction stays")
    args = argparse.Namespace(instruction=text, instruction_file=None, documents=None, pair="en-de")
    assert _instruction(args) == text and f"{found} of the instruction" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["Translate from [SRC] to [TGT].", 'Answer as {"answer": 1} [see 3].', "Say it. [INST]"]
)
def test_other_brackets_are_text(text: str) -> None:
    assert said_of_placeholders(text) is None
