"""`convexlm report`: a run's report as one HTML page, or its tables as Markdown, LaTeX or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
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
    parser.add_argument(
        "--comet", nargs="+", metavar="FILE", help="add the scores of `comet-score --to_json` files to the run first"
    )
    parser.add_argument("--comet_model", metavar="NAME", help="the COMET model they are of, for the signature")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the report."""
    from convexlm.report import write_report

    added = {}
    if args.comet:
        from convexlm.comet import import_comet
        from convexlm.runs import RunFolder

        added = {"comet": import_comet(RunFolder(Path(args.run_dir)), args.comet, args.comet_model)}
    elif args.comet_model:
        raise UserError("--comet_model says whose scores --comet has; give --comet FILE")
    path = write_report(Path(args.run_dir), Path(args.output_file) if args.output_file else None, format=args.format)
    return {"report": str(path), "format": args.format, "bytes": path.stat().st_size, **added}


def show(result: dict[str, Any], console: Console) -> None:
    """Say where the report is."""
    for row in result.get("comet", []):
        place = " ".join(str(row[key]) for key in ("arm", "checkpoint", "test_set", "pair", "search"))
        console.print(f"COMET {row['score']:.4f}  {place}", markup=False, soft_wrap=True)
    console.print(f"{result['report']} ({result['bytes'] / 1000:.0f} kB)", markup=False, soft_wrap=True)
