"""Data with prompts of their own (`prompt`, `prefix`), which the template did not make, and cannot for decoding.

They are trained on as they are. A test set has sources, and the template says what becomes a prompt of one. Where that
is another kind of prompt than the trained ones, all that is decoded is worth nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from convexlm.errors import UserError
from convexlm.files import read_json_object
from convexlm.templates import get_template

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from convexlm.instructions import Record

KEY = "own_prompts"  # of a checkpoint's `convexlm.json`; true where they are there
_HOW = "a name, or the text itself, such as 'Translate to German: {input}\\n', or '{input}' if the source is all"


def first_own_prompt(records: Iterable[Record], template: str) -> str | None:
    """The id of the first record whose prompt the template cannot have made; None if it can have made all.

    Args:
        records: with their prompts.
        template: its name.
    """
    made = get_template(template)
    return next((one.id for one in records if one.messages is None and not made.may_have_made(one.prompt)), None)


def said_of_own_prompts(record: str, template: str) -> str:
    """What to tell at the start of a training on such prompts."""
    return (
        f"the data have prompts of their own ({record}), used as they are, which the template `{template}` cannot "
        f"have made: to decode with what is trained here, say with --template what makes one of a source: {_HOW}"
    )


def refuse_own_prompts(record: str | None, where: str, template: str) -> None:
    """See that a run will decode with such prompts as it trains on.

    Args:
        record: its id, as `first_own_prompt` found it.
        where: the recipe's key and the dataset.
        template: the recipe's `data.template`.

    Raises:
        UserError: there is a record.
    """
    if record is not None:
        raise UserError(
            f"{where}: the prompts are the data's own ({record}), and the template `{template}` makes other ones of "
            f"the test sets' sources; give as data.template what makes such prompts: {_HOW}"
        )


def has_own_prompts(checkpoint: Path) -> bool:
    """Whether a checkpoint was trained on prompts that no template is known to make."""
    file = checkpoint / "convexlm.json"
    return file.is_file() and read_json_object(file).get(KEY) is True


def refuse_unknown_prompts(checkpoint: Path, option: str = "--template") -> None:
    """See that a checkpoint's own settings say what its prompts are.

    Args:
        checkpoint: the folder.
        option: by what they can be told.

    Raises:
        UserError: it was trained on prompts that no template is known to make.
    """
    if has_own_prompts(checkpoint):
        raise UserError(
            f"{checkpoint} was trained on whole prompts, as its data had them; say with {option} what makes one of "
            f"a source: {_HOW}"
        )
