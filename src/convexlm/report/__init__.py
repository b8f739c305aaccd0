"""The report of a run: one self-contained page, and the same tables as Markdown, LaTeX or JSON.

`data` and `sentences` read the run folder, `findings` says what it comes to, `svg` and `charts` draw, `page` and
`tables_text` write. A new output format is one function with `@register_format`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from convexlm.errors import UserError
from convexlm.files import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable

    from convexlm.report.data import RunData

# format name -> (what follows the dot in the file's name, what writes the text)
FORMATS: dict[str, tuple[str, Callable[[RunData], str]]] = {}


def register_format(name: str, suffix: str) -> Callable[[Callable[[RunData], str]], Callable[[RunData], str]]:
    """Register a function from what was read of a run to the text of a report."""

    def register(write: Callable[[RunData], str]) -> Callable[[RunData], str]:
        FORMATS[name] = (suffix, write)
        return write

    return register


def format_names() -> list[str]:
    """The names of the registered formats."""
    import convexlm.report.page
    import convexlm.report.tables_text  # noqa: F401  (both register what they define)

    return list(FORMATS)


def write_report(run_dir: str | Path, output_file: str | Path | None = None, *, format: str = "html") -> Path:
    """Write the report of a run whose scores were compared.

    Args:
        run_dir: the run folder; only its files are read.
        output_file: where to write; `report.html` (or `.md`, `.tex`, `.json`) in the run folder by default.
        format: `html` (a page with figures and the sentences), `md`, `latex` or `json` (its tables).

    Returns:
        The file. Its content is a function of the run folder's files: no time, no path.

    Raises:
        UserError: no run folder, a stage of it is not done yet, a file of it cannot be read, an unknown format.
    """
    from convexlm.report.data import read_run

    known = format_names()
    if format not in known:
        raise UserError(f"unknown report format `{format}`; known: {', '.join(known)}")
    suffix, write = FORMATS[format]
    run = read_run(Path(run_dir))
    path = Path(output_file) if output_file is not None else run.path / f"report.{suffix}"
    try:
        _refuse_to_write_over(path, run.path)
        write_atomic(path, write(run))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    return path


# How pages and tables begin: what is there and begins otherwise is no earlier report.
_BEGINNINGS = (b"<!doctype html>", b'{\n "schema"', b"% needs ", b"## ")


def _refuse_to_write_over(path: Path, run_path: Path) -> None:
    """An earlier report may be written anew; what else is there, may not."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file to write")
    if path.name == "-":
        raise UserError("a report is written to a file: give its name in place of -")
    if not path.exists() or (path.name.startswith("report.") and path.parent.resolve() == run_path.resolve()):
        return
    inside = path.resolve().is_relative_to(run_path.resolve())
    if inside or not path.read_bytes().startswith(_BEGINNINGS):
        raise UserError(f"{path}: is there, and is no earlier report; give another name or remove it")
