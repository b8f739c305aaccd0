"""Command-line options as every verb has them: one-line errors, `--config FILE.yaml`, `--json`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NoReturn

from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


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
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config")
        config = finder.parse_known_args(argv)[0].config
        return self.parse_args([*self._as_options(config), *argv] if config else list(argv))

    def _as_options(self, path: str) -> list[str]:
        """The entries of a YAML file as command-line words, so that they are checked like typed ones."""
        actions = {action.dest: action for action in self._actions}
        words: list[str] = []
        for key, value in load_yaml(path).items():
            action = actions.get(str(key))
            if action is None or key in ("config", "help"):
                known = ", ".join(sorted(set(actions) - {"config", "help"}))
                raise UserError(f"{path}: unknown option `{key}`; known: {known}")
            if value is None:
                continue
            if not action.option_strings:  # positionals are left to the command line
                raise UserError(f"{path}: `{key}` is given on the command line, not in the config file")
            option = action.option_strings[-1]
            if isinstance(value, bool):
                if action.nargs == 0:
                    words += [option] if value else []
                else:
                    words += [option, str(value).lower()]
            elif isinstance(value, list):
                words += [option, *map(str, value)]
            else:
                words += [option, str(value)]
        return words


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader.

    Raises:
        UserError: no such file, not YAML (the message names the line), or not a mapping.
    """
    import yaml

    from convexlm.files import read_text

    try:
        value = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a YAML mapping (`key: value` lines)")
    return value
