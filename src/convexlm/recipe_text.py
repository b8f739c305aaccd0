"""What a recipe's text says before it is checked: `extends`, `--set` and `${variables}`."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.options import load_yaml, parse_yaml

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def with_parents(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The entries of a file over those of the recipe that it `extends`."""
    if path.resolve() in seen:
        raise UserError(f"{path}: `extends` goes in a circle")
    raw = load_yaml(path)
    if parent := raw.pop("extends", None):
        raw.setdefault("name", path.stem)
        return merge(with_parents(path.parent / str(parent), (*seen, path.resolve())), raw)
    return raw


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; mappings are merged key by key, but `arms` are replaced as a whole."""
    out = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(out.get(key), dict) and isinstance(value, dict) and key != "arms"
        out[key] = merge(out[key], value) if both else copy.deepcopy(value)
    return out


def override(raw: dict[str, Any], word: str) -> None:
    """Set one entry, as `--set dotted.key=value` says."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise UserError(f"--set {word}: expected dotted.key=value, such as train.max_steps=10")
    *path, last = key.split(".")
    place = raw
    for part in path:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise UserError(f"--set {word}: `{part}` is no mapping in this recipe")
    place[last] = parse_yaml(text, f"--set {word}")


def variables(raw: dict[str, Any], path: Path) -> dict[str, str]:
    """The recipe's `vars`, as text."""
    values = raw.get("vars") or {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: `vars` must be a mapping")
    return {str(key): str(value) for key, value in values.items()}


def substitute(value: Any, variables: Mapping[str, str], where: str) -> Any:
    """Replace `${name}` in every string by the variable's value."""
    if isinstance(value, dict):
        return {key: substitute(entry, variables, where) for key, entry in value.items()}
    if isinstance(value, list):
        return [substitute(entry, variables, where) for entry in value]
    if not isinstance(value, str):
        return value

    def look_up(match: re.Match[str]) -> str:
        if match[1] not in variables:
            raise UserError(
                f"{where}: `${{{match[1]}}}` is not in `vars` ({', '.join(variables) or 'which is empty'})"
            )
        return variables[match[1]]

    return re.sub(r"\$\{(\w+)\}", look_up, value)
