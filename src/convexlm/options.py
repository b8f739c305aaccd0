"""Command-line options as every verb has them: one-line errors, `--config FILE.yaml`, `--json`."""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import re
from typing import TYPE_CHECKING, Any, NoReturn

from convexlm.errors import UserError
from convexlm.option_names import NEVER_MEANT, by_another_name

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

_ALIKE = 0.75  # difflib's ratio from which a name is taken for a slip of the other


class VerbParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, and that takes its defaults from `--config FILE.yaml`.

    Keys of the YAML file are option names without dashes; options on the command line win over them.
    """

    def __init__(self, prog: str, description: str, **kwargs: Any) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, **kwargs)
        self.add_argument("--config", metavar="FILE.yaml", help="read options from a YAML file; those given here win")
        self.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage: the command line turns it into one line and exit code 2."""
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `argv`, with defaults from the file that `--config` names.

        Raises:
            UserError: unknown or missing options, a bad value, or an unreadable or unknown-keyed config file.
        """
        finder = _ConfigFinder(add_help=False, allow_abbrev=False)
        finder.add_argument("--config")
        config = finder.parse_known_args(argv)[0].config
        self._refuse_unknown(argv)
        if not config:
            return self.parse_args(list(argv))
        # Positionals come first: an option of the file that takes several values would take them, too.
        first = next((number for number, word in enumerate(argv) if word.startswith("-")), len(argv))
        return self.parse_args([*argv[:first], *self._as_options(config), *argv[first:]])

    def _refuse_unknown(self, argv: Sequence[str]) -> None:
        """Name the option that was probably meant; argparse would only say which words are left over, or missing."""
        for word in argv[: argv.index("--")] if "--" in argv else argv:
            option = word.split("=", 1)[0]
            if option.startswith("--") and option not in self._option_string_actions:
                hint = did_you_mean(option, self._option_string_actions).split("; known")[0]
                raise UserError(f"unknown option {option}{hint} (see {self.prog} --help)")

    def _as_options(self, path: str) -> list[str]:
        """The entries of a YAML file as command-line words, so that they are checked like typed ones."""
        actions = {word.lstrip("-"): action for action in self._actions for word in action.option_strings}
        positionals = {action.dest for action in self._actions if not action.option_strings}
        words: list[str] = []
        entries = load_yaml(path)
        written = _as_written(path)
        for key, value in entries.items():
            if key in positionals:
                raise UserError(f"{path}: `{key}` is given on the command line, not in the config file")
            action = actions.get(str(key))
            if action is None or key in ("config", "help", "h"):
                known = sorted(name for name in actions if name not in ("config", "help", "h"))
                raise UserError(f"{path}: unknown option `{key}`{did_you_mean(key, known)}")
            if action.nargs == 0 and value is not None and not isinstance(value, bool):
                raise UserError(f"{path}: `{key}` is true or false, not {value!r}")
            words += _words(path, str(key), action, value, written.get(str(key)))
        return words


def _words(path: str, key: str, action: argparse.Action, value: Any, written: Any) -> list[str]:
    """One entry of a config file as typed on a command line; `written` is its text there, or the texts of its list."""
    option = f"--{key}"
    if value is None:
        return []
    if action.nargs == 0:
        return [option] if value else []
    several = isinstance(action, argparse._AppendAction)
    # Joined by `=`, a value may begin with a dash.
    if not isinstance(value, list):
        if isinstance(value, dict) and (several or action.nargs is not None):
            raise UserError(f"{path}: `{key}` is a value or a list of them, not a mapping")
        return [f"{option}={_word(value, action, written)}"]
    if action.nargs is None and not several and len(value) != 1:
        raise UserError(f"{path}: `{key}` takes one value, not a list of {len(value)}")
    for entry in value:
        if entry is None or isinstance(entry, (dict, list)):
            raise UserError(f"{path}: `{key}` is a list of plain values, and {json.dumps(entry)} is none")
    texts = written if isinstance(written, list) and len(written) == len(value) else [None] * len(value)
    words = [_word(entry, action, text) for entry, text in zip(value, texts, strict=True)]
    return [f"{option}={word}" for word in words] if several else [option, *words]


def _word(value: Any, action: argparse.Action, written: Any) -> str:
    """A value as one would type it: as it is written in the file, so that no `010` becomes 8 and no `no` false."""
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    if isinstance(value, bool):
        takes_text = action.type in (None, str) and isinstance(written, str)
        return written if takes_text else str(value).lower()
    if isinstance(written, str) and value == value and value not in (float("inf"), float("-inf")):
        return written
    return str(value)


def _as_written(path: str) -> dict[str, Any]:
    """The plain values of a YAML mapping that is read without error, and those of its lists, as they stand there."""
    import yaml

    from convexlm.files import read_text

    root: Any = yaml.compose(read_text(path), _loader())
    found: dict[str, Any] = {}
    for key, node in getattr(root, "value", None) or []:
        if isinstance(node, yaml.ScalarNode):
            found[key.value] = node.value
        elif isinstance(node, yaml.SequenceNode):
            found[key.value] = [one.value if isinstance(one, yaml.ScalarNode) else None for one in node.value]
    return found


class _ConfigFinder(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def did_you_mean(key: Any, known: Collection[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """What follows "unknown option `key`": what it is called here, else the name that was probably meant.

    Args:
        key: what was typed.
        known: the names that there are; where none is near and they are few, all are told.
        elsewhere: names that belong to another place, and how they are spelled there.
    """
    if elsewhere and (place := elsewhere.get(str(key))):
        return f"; in a recipe it is `{place}`"
    if said := by_another_name(key, known):
        return said
    # Without dashes, which would make any two options alike.
    names = {name.lstrip("-"): name for name in sorted(known) if name.lstrip("-").replace("-", "_") not in NEVER_MEANT}
    close = difflib.get_close_matches(str(key).lstrip("-"), names, n=1, cutoff=_ALIKE)
    if close:
        return f"; did you mean `{names[close[0]]}`?"
    return f"; known: {', '.join(sorted(known))}" if len(known) < 30 else ""


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader.

    Raises:
        UserError: no such file, not YAML (the message names the line), or not a mapping.
    """
    from convexlm.files import read_text

    value = parse_yaml(read_text(path), str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a YAML mapping (`key: value` lines)")
    return value


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text: safe tags only, `1e-3` is a number, and no key may stand twice in a mapping.

    Raises:
        UserError: not YAML; the message begins with `where` and names the line.
    """
    import yaml

    try:
        return yaml.load(text, _loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML ({getattr(error, 'problem', None) or error})") from None
    except (ValueError, RecursionError) as error:  # a date that is none, brackets nested by the thousand
        raise UserError(f"{where}: not valid YAML ({error})") from None


def dump_yaml(value: Any) -> str:
    """A value as YAML that `parse_yaml` reads back the same: a text such as `1e-4` is quoted."""
    import yaml

    return str(yaml.dump(value, Dumper=_dumper(), sort_keys=False, allow_unicode=True))


def written_numbers(path: str | Path, section: str) -> dict[str, str]:
    """The whole numbers in a section of a YAML file that is read without error, as they are written there."""
    import yaml

    from convexlm.files import read_text

    root: Any = yaml.compose(read_text(path), _loader())
    found = [node for key, node in root.value if key.value == section and isinstance(node, yaml.MappingNode)]
    return {key.value: node.value for own in found for key, node in own.value if node.tag == "tag:yaml.org,2002:int"}


# PyYAML keeps to YAML 1.1, where a float needs a dot; a learning rate of 1e-5 would be a text.
_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")

# There a whole number with a leading 0 is octal, and one with colons to the base of 60.
_OCTAL = re.compile(r"[-+]?0[0-7_]+")


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML's, which would take the last of two equal keys and follow an alias into itself."""

        def __init__(self, stream: Any) -> None:
            super().__init__(stream)
            self.unfinished: list[Any] = []

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent) and (event := self.peek_event()).anchor in self.unfinished:
                raise yaml.composer.ComposerError(
                    problem=f"the alias *{event.anchor} stands within what it names", problem_mark=event.start_mark
                )
            return super().compose_node(parent, index)

        def compose_sequence_node(self, anchor: Any) -> Any:
            self.unfinished.append(anchor)
            node = super().compose_sequence_node(anchor)
            self.unfinished.pop()
            return node

        def compose_mapping_node(self, anchor: Any) -> Any:
            self.unfinished.append(anchor)
            node = super().compose_mapping_node(anchor)
            self.unfinished.pop()
            # Now, for later there are those among the keys that `<<` merges, which may be given anew.
            seen = set()
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:str" and key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key `{key.value}` is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value if isinstance(key.value, str) else "")
            return node

        def construct_number(self, node: Any) -> Any:
            """A number as YAML 1.2 has it, and as everybody means it: 010 is ten, and 12:30 is a text."""
            if ":" in node.value:
                return node.value
            if _OCTAL.fullmatch(node.value):
                return int(node.value)
            return (
                super().construct_yaml_int(node) if node.tag.endswith(":int") else super().construct_yaml_float(node)
            )

        def flatten_mapping(self, node: Any) -> None:
            # PyYAML 6.0.4 takes two keys for one by the identity of their texts, and of `k: 1` merged into what says
            # `k: 2` keeps the 1 where that is merged again.
            own = [pair for pair in node.value if pair[0].tag != "tag:yaml.org,2002:merge"]
            if len(own) == len(node.value):
                return super().flatten_mapping(node)
            found = {_key_of(pair) for pair in own}
            merged = []
            for source in [one for key, value in node.value if (key, value) not in own for one in _sources(value)]:
                self.flatten_mapping(source)
                merged += [pair for pair in source.value if _key_of(pair) not in found]
                found |= {_key_of(pair) for pair in source.value}
            node.value = [*merged, *own]
            return super().flatten_mapping(node)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
    for kind in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", Loader.construct_number)
    return Loader


def _key_of(pair: tuple[Any, Any]) -> tuple[str, Any]:
    key = pair[0]
    return key.tag, key.value if isinstance(key.value, str) else id(key)


def _sources(value: Any) -> list[Any]:
    """The mappings that a `<<` names."""
    import yaml

    found = value.value if isinstance(value, yaml.SequenceNode) else [value]
    for one in found:
        if not isinstance(one, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(
                problem="`<<` merges a mapping or a list of them", problem_mark=one.start_mark
            )
    return list(found)


@functools.cache
def _dumper() -> Any:
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
    return Dumper
