"""Modules of the user's own that register objectives, formats, metrics, test sets or backends."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence


def load_plugins(names: Sequence[str] | None) -> None:
    """Import modules by name (also from the current folder) or by path (`my_objectives.py`), each once.

    They are the user's own code and run as such; nothing is ever imported that the user did not name.

    Raises:
        UserError: there is no such module or file, or it fails while it is imported.
    """
    for name in names or []:
        try:
            if str(name).endswith(".py"):
                _load_file(Path(name))
            else:
                _load_module(str(name))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"plugin {name}: cannot be imported ({type(error).__name__}: {error})") from error


def _load_module(name: str) -> None:
    if name in sys.modules:
        return
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        importlib.import_module(name)
    finally:
        sys.path.remove(here)


def _load_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"plugin {path}: no such file")
    name = f"convexlm_plugin_{path.resolve().stem}_{abs(hash(str(path.resolve()))):x}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"plugin {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
