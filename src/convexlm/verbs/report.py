"""`convexlm report`: a run's report as one HTML page, or its tables as Markdown, LaTeX or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.options import VerbParser

if TYPE_CHECKING:
    import argparse

    from rich.console import Console


def make_parser(prog: str) -> VerbParser:
    """The options of `convexlm report`."""
    from convexlm.report import format_names

    parser = VerbParser(prog, "Write the report of a run that was scored and compared.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run folder that `convexlm run` made")
    parser.add_argument(
        "--output_file", metavar="FILE", help="where to write (default: report.html, .md, .tex or .json in RUN_DIR)"
    )
    parser.add_argument(
        "--format", choices=format_names(), default="html", help="a page, or its tables only (default: html)"
    )
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the report."""
    from convexlm.report import write_report

    path = write_report(Path(args.run_dir), Path(args.output_file) if args.output_file else None, format=args.format)
    return {"report": str(path), "format": args.format, "bytes": path.stat().st_size}


def show(result: dict[str, Any], console: Console) -> None:
    """Say where the report is."""
    console.print(f"{result['report']} ({result['bytes'] / 1000:.0f} kB)", markup=False, soft_wrap=True)
