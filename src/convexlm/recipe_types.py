"""Values of a recipe against the types of the options that they are for, so that a quoted `"false"` is not true."""

from __future__ import annotations

import enum
import functools
import json
import types
import typing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# A file's path may stand in place of the mapping.
_FILES = ("deepspeed", "fsdp_config", "accelerator_config")
_ANYTHING = {"fsdp", "debug"}  # more kinds of values are taken than the annotation says
_OWN: dict[str, Any] = {
    "dataset": str | dict,
    "num_records": int | None,
    "config": dict | None,
    "tokenizer": str | None,
    "global_batch_size": int | None,
    "init_from": str | None,
    "decode": bool,
}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}


def check_types(options: Mapping[str, Any], place: str, wrong: Callable[[str], Exception]) -> None:
    """See that every value is of its option's type.

    Args:
        options: known options of a training, a model, data or an arm, with their values.
        place: what stands before an option's name in a complaint: `train.`, or "arm `mle`: ".
        wrong: makes an error of a text.

    Raises:
        UserError: the first that is not (by `wrong`), with what is expected.
    """
    hints, mappings = _hints()
    for key, value in options.items():
        hint = _OWN.get(key, hints.get(key))
        if hint is None or key in _ANYTHING:
            continue
        members = _members(hint)
        if key in mappings:
            said = None if value is None and type(None) in members else _no_mapping(key, value)
        else:
            said = None if any(_is_a(value, member) for member in members) else _expected(members)
        if said:
            name = f"{place}`{key}`" if place.endswith(" ") else f"`{place}{key}`"
            unquoted = isinstance(value, str) and any(_is_a(_read(value), member) for member in members)
            hint_text = "; leave the quotes out" if unquoted else ""
            raise wrong(f"{name} must be {said}, not {value!r}{hint_text}")


def as_mapping(value: Any) -> Any:
    """A value that may be JSON text, as `convexlm train` takes it, read."""
    return json.loads(value) if isinstance(value, str) and value.strip().startswith("{") else value


@functools.cache
def _hints() -> tuple[dict[str, Any], set[str]]:
    """The types of all options, and which of them are mappings that may be JSON text."""
    from trl import ModelConfig

    from convexlm.config import ConvexConfig
    from convexlm.data_options import DataOptions

    found: dict[str, Any] = {}
    for cls in (DataOptions, ModelConfig, ConvexConfig):
        found.update(typing.get_type_hints(cls))
    return found, set(ConvexConfig._VALID_DICT_FIELDS)


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_a(value: Any, member: Any) -> bool:
    kind = typing.get_origin(member) or member
    if kind is typing.Literal:
        return any(value is one or (value == one and type(value) is type(one)) for one in typing.get_args(member))
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is list:  # a bare text is one name, or a word such as `all-linear`
        return isinstance(value, (list, str))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return isinstance(value, (str, kind)) or value is False  # what YAML makes of an unquoted `no`
    if kind in (bool, str, dict, type(None)):
        return isinstance(value, kind)
    return True  # a class that no YAML makes; whoever reads it says more


def _no_mapping(key: str, value: Any) -> str | None:
    """What a mapping was expected to be; None if it is one, JSON text of one, or may be a file's path."""
    try:
        if isinstance(as_mapping(value), dict) or (key in _FILES and isinstance(value, str)):
            return None
    except ValueError:
        return "a mapping (this is not valid JSON)"
    return "a mapping"


def _expected(members: tuple[Any, ...]) -> str:
    words = [
        _WORDS.get(typing.get_origin(member) or member, "a mapping" if member is dict else "a text")
        for member in members
        if member is not type(None)
    ]
    return " or ".join(dict.fromkeys(words))


def _read(text: str) -> Any:
    from convexlm.errors import UserError
    from convexlm.options import parse_yaml

    try:
        return parse_yaml(text, "")
    except UserError:
        return text
