"""What a recipe's text says before it is checked: `extends`, `--set` and `${variables}`."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.options import load_yaml, parse_yaml, written_numbers

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_KINDS = {bool: "true or false", float: "a number", list: "a list", dict: "a mapping"}


def with_parents(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The entries of a file over those of the recipe that it `extends`."""
    if path.resolve() in seen:
        raise UserError(f"{path}: `extends` goes in a circle")
    raw = load_yaml(path)
    for name, text in written_numbers(path, "vars").items():
        if isinstance(value := raw["vars"].get(name), int) and str(value) != text:
            raise UserError(f"{path}: `vars.{name}` is written {text}, which YAML reads as {value}; quote it")
    if (parent := raw.pop("extends", None)) is not None:
        if not isinstance(parent, str) or not parent or "\0" in parent:
            raise UserError(f"{path}: `extends` must be the name of a recipe's file, not {parent!r}")
        raw.setdefault("name", path.stem)
        return merge(with_parents(path.parent / parent, (*seen, path.resolve())), raw)
    return raw


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; mappings are merged key by key, but `arms` are replaced as a whole."""
    out = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(out.get(key), dict) and isinstance(value, dict) and key != "arms"
        out[key] = merge(out[key], value) if both else copy.deepcopy(value)
    return out


def override(raw: dict[str, Any], word: str) -> None:
    """Set one entry, as `--set dotted.key=value` says; a variable gets the text as it stands.

    A variable that the recipe has as a number or as true or false is read as one, if it can be.

    Raises:
        UserError: no such place, `extends`, or a value that is no YAML.
    """
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise UserError(f"--set {word}: expected dotted.key=value, such as train.max_steps=10")
    if key == "extends":
        raise UserError(f"--set {word}: what a recipe extends stands in its file; start from a file that extends it")
    *path, last = _split(raw, key)
    place = raw
    for part in path:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise UserError(f"--set {word}: `{part}` is no mapping in this recipe")
    place[last] = _variable(place.get(last), text) if path == ["vars"] else parse_yaml(text, f"--set {word}")


def _split(raw: dict[str, Any], key: str) -> list[str]:
    """The parts of a dotted key; a name that has dots itself, such as an arm's, is found where it is there."""
    parts: list[str] = []
    place: Any = raw
    while key:
        names = [name for name in place if isinstance(name, str)] if isinstance(place, dict) else []
        known = [name for name in names if name and (key == name or key.startswith(f"{name}."))]
        part = max(known, key=len, default=key.partition(".")[0])
        parts.append(part)
        place = place.get(part) if isinstance(place, dict) else None
        if len(key) == len(part) + 1:  # it ends in a dot
            parts.append("")
        key = key[len(part) + 1 :]
    return parts


def _variable(before: Any, text: str) -> Any:
    if isinstance(before, (bool, int, float)):
        try:
            value = parse_yaml(text, "")
        except UserError:
            return text
        both_numbers = isinstance(value, (int, float)) and not isinstance(before, bool)
        if isinstance(value, bool) == isinstance(before, bool) and (both_numbers or isinstance(value, bool)):
            return value
    return text


def variables(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """The recipe's `vars`, those that use others resolved.

    Raises:
        UserError: not a mapping, an empty value, or variables that use each other in a circle.
    """
    values = raw.get("vars") or {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: `vars` must be a mapping")
    values = {str(key): value for key, value in values.items()}
    if empty := [name for name, value in values.items() if value is None]:
        raise UserError(f"{path}: `vars.{empty[0]}` has no value; give one, with --set vars.{empty[0]}=... or there")
    done: dict[str, Any] = {}

    def resolve(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            circle = " -> ".join([*above[above.index(name) :], name])
            raise UserError(f"{path}: `vars` go in a circle: {circle}")
        for other in _used(values[name]):
            if other in values and other not in done:
                resolve(other, (*above, name))
        done[name] = substitute(values[name], {**values, **done}, f"{path}: `vars.{name}`")

    for name in values:
        if name not in done:
            resolve(name, ())
    return {name: done[name] for name in values}


def _used(value: Any) -> list[str]:
    """The variables that a value names, at any depth."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [name for entry in value for name in _used(entry)]
    return _VARIABLE.findall(value) if isinstance(value, str) else []


def substitute(value: Any, variables: Mapping[str, Any], where: str) -> Any:
    """Replace `${name}` in every string by the variable's value; one that is all of a string keeps its type.

    Raises:
        UserError: no such variable, one that is not a text within a longer text, or a `${` that names none.
    """
    if isinstance(value, dict):
        return {key: substitute(entry, variables, where) for key, entry in value.items()}
    if isinstance(value, list):
        return [substitute(entry, variables, where) for entry in value]
    if not isinstance(value, str):
        return value

    def look_up(match: re.Match[str]) -> Any:
        if match[1] not in variables:
            raise UserError(
                f"{where}: `${{{match[1]}}}` is not in `vars` ({', '.join(variables) or 'which is empty'})"
            )
        return variables[match[1]]

    def within(match: re.Match[str]) -> str:
        found = look_up(match)
        if isinstance(found, str) or type(found) is int:
            return str(found)
        kind = _KINDS.get(type(found), type(found).__name__)
        mend = "; quote it in `vars`" if isinstance(found, (bool, float)) else ""
        raise UserError(f"{where}: `vars.{match[1]}` is {kind} ({found!r}), but stands within a longer text{mend}")

    if left := re.search(r"\$\{[^}]{0,20}\}?", _VARIABLE.sub(" ", value)):
        raise UserError(f"{where}: `{left[0]}` names no variable; write ${{NAME}}, of letters, digits and `_`")
    whole = _VARIABLE.fullmatch(value)
    return copy.deepcopy(look_up(whole)) if whole else _VARIABLE.sub(within, value)
