r"""Instruction data: files, folders and hub names in several formats -> prompt and completion records.

A format is recognised by the keys of a record, so a user never names it:

| format | keys | the prompt |
|---|---|---|
| `alpaca` | `instruction`, `output`, often `input` | the template, filled |
| `double_instruction` | `pre_instruction`, `post_instruction`, `output`, often `input` | the template, filled |
| `prefix_text` | `prefix`, `text` (the reference's JSON Lines) | as it is; one final `</s>` of `text` is cut |
| `prompt_completion` | `prompt`, `completion`, as text or as lists of messages (TRL) | as it is, or the messages |
| `messages` | `messages`, the last one the assistant's (TRL) | the messages before the last |

Any record may have a `weight` (default 1). Text is never changed: an answer with blanks around it is trained with
them. A new format is one function under `@register_format`.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.instruction_rows import iter_rows
from convexlm.templates import Template, get_template

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    Reader = Callable[[Mapping[str, Any], Template], "Record"]


@dataclass(frozen=True)
class Record:
    """One prompt and the answer to train on.

    Attributes:
        prompt: the filled prompt. For the template `chat` the text of the user's turn, or of all turns of `messages`.
        completion: the answer, without an end mark.
        weight: multiplies the record's part in the loss; finite, >= 0.
        id: where it comes from: `FILE:LINE` in JSON Lines, `FILE#N` (from 1) in a JSON array or a table.
        messages: the turns before the answer (`role` and `content`) of a conversational record, else None.
    """

    prompt: str
    completion: str
    weight: float = 1.0
    id: str = ""
    messages: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Format:
    """A record format: its name, the keys it is known by and the function that reads a record."""

    name: str
    keys: tuple[str, ...]
    read: Reader


FORMATS: dict[str, Format] = {}
"""Every known format by name, in the order they were registered."""


def register_format(name: str, keys: tuple[str, ...]) -> Callable[[Reader], Reader]:
    """Add a format: a decorator of a function from a record (a mapping) and a `Template` to a `Record`.

    The function may raise `UserError`; the caller puts the file and line in front, and sets `id` and `weight`.

    Args:
        name: its name, for messages.
        keys: the keys that a whole record of this format has, the most telling first. A record with only the first
            of them is taken as an incomplete record of this format. The format with most keys present wins.

    Raises:
        ValueError: the name is taken, or there are no keys.
    """
    if name in FORMATS or not keys:
        raise ValueError(f"a format `{name}` exists already" if keys else "a format needs at least one key")

    def decorate(function: Reader) -> Reader:
        FORMATS[name] = Format(name, keys, function)
        return function

    return decorate


def detect_format(row: Mapping[str, Any]) -> Format:
    """The format of a record, by its keys.

    Raises:
        UserError: no format has such keys; the message lists the keys found and the formats known. Or two formats
            have as many, none in common, and a value in each.
    """
    whole = [known for known in FORMATS.values() if all(key in row for key in known.keys)]
    if whole:
        best = max(whole, key=lambda known: len(known.keys))
        for other in whole:
            level = len(other.keys) == len(best.keys) and not set(other.keys) & set(best.keys)
            if level and all(row[key] is not None for key in (*best.keys, *other.keys)):
                either = " or ".join(f"{one.name} ({', '.join(one.keys)})" for one in (best, other))
                raise UserError(f"the record can be read as {either}; take the keys of one of them away")
        return best
    for known in FORMATS.values():
        if known.keys[0] in row:
            return known
    keys = ", ".join(f"`{key}`" for key in row) or "none"
    if "conversations" in row:  # ShareGPT's
        raise UserError(
            f"unknown record format with the keys {keys}; write `conversations` as `messages`, each with a `role` "
            "(system, user, assistant) and its `content`"
        )
    formats = "; ".join(f"{known.name} ({', '.join(known.keys)})" for known in FORMATS.values())
    raise UserError(f"unknown record format with the keys {keys}; known formats: {formats}")


@register_format("alpaca", ("instruction", "output"))
def _read_alpaca(row: Mapping[str, Any], template: Template) -> Record:
    instruction = _optional_text(row, "instruction")
    if not instruction.strip() and not _optional_text(row, "input").strip():
        raise UserError("`instruction` and `input` are both empty")
    return _from_fields(row, template, {"instruction": instruction})


@register_format("double_instruction", ("pre_instruction", "post_instruction", "output"))
def _read_double(row: Mapping[str, Any], template: Template) -> Record:
    instructions = {key: _optional_text(row, key) for key in ("pre_instruction", "post_instruction") if key in row}
    return _from_fields(row, template, instructions)


def _from_fields(row: Mapping[str, Any], template: Template, fields: dict[str, str]) -> Record:
    """Fill the template; the record's other texts are fields too, so a user's template may ask for any of them."""
    _refuse_media(row)
    others = {key: value for key, value in row.items() if isinstance(value, str) and key != "output"}
    completion = _answer(row, "output")
    given = {**others, "input": _optional_text(row, "input"), **fields}
    prompt = template.fill(given)
    for key in (*_BESIDE_A_PROMPT, "context"):
        if row.get(key) and (key not in others or template.fill({**given, key: ""}) == prompt):
            raise UserError(
                f"`{key}` is not in the prompt of the template `{template.name}` and would be left out; "
                f"{'put it into `input`' if key == 'context' else 'write the record as `messages`'}, or take it away"
            )
    return Record(prompt, completion)


# What some datasets have beside an instruction, a prompt or messages, and mean as a part of the prompt.
_BESIDE_A_PROMPT = ("system", "history", "tools")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")


def _refuse_media(row: Mapping[str, Any]) -> None:
    for key in _MEDIA:
        if row.get(key):
            raise UserError(
                f"`{key}` would be left out, for only text is trained on here; take it away, or the record"
            )


@register_format("prefix_text", ("prefix", "text"))
def _read_prefix_text(row: Mapping[str, Any], template: Template) -> Record:
    text = _answer(row, "text").removesuffix("</s>")
    if not text.strip():
        raise UserError("`text` has no answer before its `</s>`")
    return Record(_used_as_is(row, "prefix", template), text)


@register_format("prompt_completion", ("prompt", "completion"))
def _read_prompt_completion(row: Mapping[str, Any], template: Template) -> Record:
    if not isinstance(row.get("prompt"), list):
        return Record(_used_as_is(row, "prompt", template), _answer(row, "completion"))
    _refuse_template_settings(row)
    answer = row.get("completion")
    if not isinstance(answer, list) or len(answer) != 1:
        raise UserError("`completion` must be a list of one message, as `prompt` is a list of messages")
    return _from_messages([*row["prompt"], *answer], template, "completion")


@register_format("messages", ("messages",))
def _read_messages(row: Mapping[str, Any], template: Template) -> Record:
    if not isinstance(row["messages"], list):
        raise UserError(f"`messages` must be a list of messages, found {_kind(row['messages'])}")
    _refuse_template_settings(row)
    return _from_messages(row["messages"], template, "messages")


def _refuse_template_settings(row: Mapping[str, Any]) -> None:
    """What TRL hands to the chat template or the model beside the messages, and decoding would not have."""
    _refuse_media(row)
    for key in ("chat_template_kwargs", *_BESIDE_A_PROMPT):
        if row.get(key):
            raise UserError(
                f"`{key}` is not handed to the chat template here; write it into the messages, or train with "
                "ConvexTrainer in a script"
            )


def _from_messages(messages: list[Any], template: Template, key: str) -> Record:
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"message {number} must be an object with a `role`")
        if not isinstance(message.get("content"), str):
            raise UserError(f"message {number} must have its `content` as text, found {_kind(message.get('content'))}")
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError(f"`{key}` must end with a message of the role `assistant`: the answer to train on")
    if len(messages) == 1:
        raise UserError("there is no message before the assistant's answer")
    if template.name != "chat":
        raise UserError(f"records of messages need the template `chat`, not `{template.name}`")
    for name in ("reasoning_content", "thinking", "reasoning", "tool_calls"):
        if messages[-1].get(name):
            raise UserError(f"the answer's `{name}` would be left out; write it into `content`, or take it away")
    if messages[-1].get("weight", 1) not in (1, None):
        raise UserError("the answer's own `weight` would be left out; give it to the record, beside the messages")
    # Tables fill keys that a message lacks with null; a chat template would take them for given.
    turns = [{name: value for name, value in turn.items() if value is not None} for turn in messages[:-1]]
    prompt = "\n\n".join(turn["content"] for turn in turns)
    return Record(prompt, _answer(messages[-1], "content"), messages=turns)


def _used_as_is(row: Mapping[str, Any], key: str, template: Template) -> str:
    if not isinstance(row.get(key), str):
        raise UserError(f"`{key}` must be text, found {_kind(row.get(key))}")
    if template.name == "chat":
        raise UserError(f"`{key}` is a whole prompt and is used as it is; for the template `chat` give messages")
    _refuse_media(row)
    for other in _BESIDE_A_PROMPT:
        value = row.get(other)
        if value and not (isinstance(value, str) and value.strip() in row[key]):
            raise UserError(
                f"`{other}` is not in `{key}`, which is used as it is, and would be left out; write it there, or take "
                "it away"
            )
    return row[key]


def _answer(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        raise UserError(f"no output: the key `{key}` is {'null' if key in row else 'missing'}")
    if not isinstance(value, str):
        raise UserError(f"`{key}` must be text, found {_kind(value)}")
    if not value.strip():
        raise UserError(f"no output: `{key}` is empty")
    return value


def _optional_text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"`{key}` must be text, found {_kind(value)}")
    return value or ""


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


_LARGEST_WEIGHT = 3.4028234e38


def _weight(row: Mapping[str, Any]) -> float:
    value = row.get("weight")
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"`weight` must be a number, found {_kind(value)}")
    try:
        weight = float(value)
    except OverflowError:
        weight = math.inf
    if not math.isfinite(weight) or weight < 0:
        raise UserError(f"`weight` must be finite and not below 0, found {value}")
    if weight > _LARGEST_WEIGHT:
        raise UserError(f"`weight` must be at most {_LARGEST_WEIGHT} (float32's largest number), found {value}")
    return weight


def load_records(
    dataset: str | Path, *, template: str = "alpaca", split: str | None = None, max_records: int | None = None
) -> list[Record]:
    """Read instruction data.

    Args:
        dataset: a JSON array, JSON Lines (either plain or `.gz`, told apart by their first character) or `.parquet`
            file; a folder that `datasets` wrote or can load; or a name on the hub. The last two with a config and a
            split, if there are several: `NAME:CONFIG[SPLIT]`.
        template: the prompt template for formats that do not hold a filled prompt.
        split: of a folder or hub name whose name does not say it; default: `train`.
        max_records: read the first so many only.

    Raises:
        UserError: no such file or name, an empty file, a broken record (with its line), a record without output,
            wrong types, unknown or mixed formats, an unknown template.
    """
    check_max_records(max_records)
    found = (record for record, _ in iter_records(dataset, template=template, split=split))
    records = list(itertools.islice(found, max_records))
    if not records:
        raise no_records(dataset)
    return records


def check_max_records(max_records: int | None) -> None:
    """Refuse a number that would leave nothing.

    Raises:
        UserError: it is below 1, or more than can be counted.
    """
    if max_records is not None and (isinstance(max_records, bool) or not 1 <= max_records <= sys.maxsize):
        raise UserError(f"max_records must be at least 1 and at most {sys.maxsize}, found {max_records}")


def no_records(dataset: str | Path) -> UserError:
    """What to raise where a dataset turns out to be empty."""
    return UserError(f"{dataset}: there are no records in it")


def iter_records(
    dataset: str | Path, *, template: str = "alpaca", split: str | None = None, streaming: bool = False
) -> Iterator[tuple[Record, Mapping[str, Any]]]:
    """Records one after another, each with the row it was made of; see `load_records`.

    JSON Lines and parquet files are read as a stream, so memory does not grow with the file. With `streaming`, names
    on the hub are, too, and a JSON array, which cannot be, is refused.
    """
    filler = get_template(template)
    first: tuple[str, Format] | None = None
    for row_id, where, row in iter_rows(dataset, split, streaming):
        try:
            if not isinstance(row, dict):
                raise UserError(f"expected a JSON object, found {_kind(row)}")
            known = detect_format(row)
            first = first or (row_id, known)
            if known is not first[1]:
                raise UserError(f"a record of format {known.name}, but {first[0]} is {first[1].name}; split the file")
            record = known.read(row, filler)
            weight = _weight(row)
            _check_encodable(record)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        yield Record(record.prompt, record.completion, weight, row_id, record.messages), row


def _check_encodable(record: Record) -> None:
    try:
        json.dumps([record.prompt, record.completion, record.messages], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError("a lone surrogate (half of a \\uD83D\\uDE00-like pair) is in the text; repair it") from None
