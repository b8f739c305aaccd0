"""`convexlm diagnose`: what an objective would do to your data and model, before you train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.dataset_names import dataset_path
from convexlm.errors import UserError
from convexlm.options import VerbParser

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from rich.console import Console

    from convexlm.objectives import Objective

DEFAULT_K = (0.5, 1.0, 2.0, 4.0)


def make_parser(prog: str) -> VerbParser:
    """The options of `convexlm diagnose`."""
    parser = VerbParser(
        prog,
        "Measure a sample of your data with your model, once, and say for each objective where its gradient would go.",
    )
    parser.add_argument(
        "--model_name_or_path", required=True, metavar="M", help="checkpoint or adapter folder, or a hub name"
    )
    parser.add_argument("--revision", help="revision of a hub name")
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="D",
        help="training data: file, folder or hub name, as NAME:CONFIG[SPLIT] for one of several",
    )

    objective = parser.add_argument_group("objective")
    objective.add_argument(
        "--objective", nargs="+", default=["convex"], metavar="NAME", help="one or more (default: convex)"
    )
    objective.add_argument(
        "--k", nargs="+", type=float, metavar="K", help="one or more (default: 0.5 1 2 4 for convex, else its own)"
    )
    objective.add_argument("--level", choices=["sequence", "token"], help="default: the objective's own")
    objective.add_argument("--length_weighting", choices=["token", "sequence"], help="default: token")
    objective.add_argument("--mle_mix", type=float, metavar="A", help="share of maximum likelihood, from 0 to 1")
    objective.add_argument("--plugins", nargs="+", metavar="MODULE", help="modules or .py files that register some")

    data = parser.add_argument_group("sample")
    data.add_argument("--max_records", type=int, default=2000, metavar="N", help="records to draw (default: 2000)")
    data.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawing (default: 0)")
    data.add_argument("--max_length", type=int, metavar="N", help="longest row in tokens (default: the model's)")
    data.add_argument("--template", metavar="NAME", help="default: the checkpoint's own, else alpaca")
    data.add_argument(
        "--source_field",
        metavar="NAME",
        help="field to group records by (default: source, dataset, ... if there is one)",
    )
    data.add_argument(
        "--judged_field",
        metavar="NAME",
        help="field that says whether the answer is right (true, false; null: not judged), to see what p̄ makes of it",
    )

    parser.add_argument("--compare", metavar="CHECKPOINT", help="measure the same records with this one, too")
    parser.add_argument("--page", metavar="FILE.html", help="write a page with plots and texts")
    parser.add_argument("--output_file", metavar="FILE.json", help="write the result as JSON")

    parser.add_argument(
        "--records_file", metavar="FILE.jsonl", help="write p̄ and weights of every measured record, a line each"
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--batch_size", type=int, metavar="N", help="records a batch (default: by their length)")
    machine.add_argument("--device", help="torch device (default: the first GPU, else the CPU)")
    machine.add_argument("--dtype", help="float32, bfloat16, float16 (default: the checkpoint's; float32 on a CPU)")
    machine.add_argument("--trust_remote_code", action="store_true", help="run the checkpoint's own Python code")
    machine.add_argument("--no_cache", action="store_true", help="neither read nor keep measurements")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, analyse, and write what was asked for."""
    from convexlm.plugins import load_plugins

    load_plugins(args.plugins)
    objectives = _objectives(args)
    _check_files(args)
    if args.revision is not None and Path(args.model_name_or_path).exists():
        raise UserError(f"--revision is of a hub name, and {args.model_name_or_path} is a folder here: leave it out")

    from convexlm.decoding.checkpoint import find_checkpoint
    from convexlm.diagnosis.run import DiagnoseOptions, diagnose

    checkpoint = find_checkpoint(args.model_name_or_path, revision=args.revision)
    other = find_checkpoint(args.compare) if args.compare is not None else None
    options = DiagnoseOptions(
        dataset=args.dataset,
        template=args.template,
        max_records=args.max_records,
        seed=args.seed,
        max_length=args.max_length,
        source_field=args.source_field,
        judged_field=args.judged_field,
        batch_size=args.batch_size,
        device=args.device,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        use_cache=not args.no_cache,
    )
    notes = _Notes()
    result = diagnose(
        checkpoint, objectives, options, compare_with=other, note=notes.append, progress=_progress(notes)
    )
    notes.flush()
    measured = result.pop("measured")
    if args.records_file is not None:
        import json

        lines = (json.dumps(record, ensure_ascii=True) + "\n" for record in measured)
        _write("--records_file", args.records_file, "".join(lines))
        result = {**result, "records_file": args.records_file}
    if args.output_file is not None:
        import json

        from convexlm.report.text import finite

        text = json.dumps(finite(result), indent=1, ensure_ascii=True, allow_nan=False)
        _write("--output_file", args.output_file, text + "\n")
    if args.page is not None:
        from convexlm.diagnosis.page import render_page

        _write("--page", args.page, render_page(result))
        result = {**result, "page": args.page}
    return result


def _objectives(args: argparse.Namespace) -> list[tuple[str, Objective]]:
    """Every objective at every k, each with a label that says how they differ."""
    from dataclasses import fields

    from convexlm.objective_slope import check_slope
    from convexlm.objectives import get_objective

    names = ("level", "length_weighting", "mle_mix")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    found: dict[str, Objective] = {}
    for name in args.objective:
        try:
            plain = get_objective(name, **settings)
            has_k = any(field.name == "k" for field in fields(plain))
            if args.k is not None and not has_k:
                raise UserError(f"objective `{name}` has no k; leave --k out (maximum likelihood is always shown)")
            if args.k is None and name != "convex":
                made = [plain]
            else:
                made = [get_objective(name, k=k, **settings) for k in args.k or DEFAULT_K]
            for one in made:
                check_slope(one)
        except ValueError as error:
            raise UserError(str(error)) from None
        for one in made:
            found.setdefault(_label(name, one, has_k), one)
    return list(found.items())


def _label(name: str, objective: Objective, has_k: bool) -> str:
    words = [name]
    if has_k and name != "dft":
        k = objective.k  # type: ignore[attr-defined]
        words.append(f"k={k:g}" if float(f"{k:g}") == k else f"k={k!r}")
    if objective.level == "token" and name != "dft":
        words.append("by token")
    if objective.mle_mix:
        words.append(f"mle_mix={objective.mle_mix:g}")
    return " ".join(words)


def _check_files(args: argparse.Namespace) -> None:
    """Refuse places that cannot be written to, or would be written over, before a model is loaded."""
    taken = {dataset_path(args.dataset).resolve(): "--dataset"} if "\0" not in args.dataset else {}
    for option in ("page", "output_file", "records_file"):
        value = getattr(args, option)
        if value is not None and (not value or "\0" in value or Path(value).is_dir()):
            raise UserError(f"--{option} {value}: is no name of a file to write")
        if value is not None:
            other = taken.setdefault(Path(value).resolve(), f"--{option}")
            if other != f"--{option}":
                raise UserError(f"--{option} {value}: is the file of {other}; name another")
            try:
                _try_writing(Path(value))
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"--{option} {value}: cannot be written ({reason})") from None


def _try_writing(path: Path) -> None:
    """Make the file's folder, and beside the file, as `write_atomic` will, one that goes again at once.

    Raises:
        OSError: one of them cannot be made.
        ValueError: no file can have such a name.
    """
    import os
    import tempfile

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    os.unlink(temporary)


def _write(option: str, path: str, text: str) -> None:
    from convexlm.files import write_atomic

    try:
        write_atomic(path, text)
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None


class _Notes:
    """Lines for stderr, held back until there is something to show, so that a refusal stays the only line."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def append(self, text: str) -> None:
        self._lines.append(text)

    def flush(self) -> None:
        from convexlm.progress import note

        for line in self._lines:
            note(f"  {line}")
        self._lines.clear()


def _progress(notes: _Notes, seconds_between: float = 5.0) -> Callable[[int, int, float], None]:
    """Records done, rate and time left: rewritten in place on a terminal, a line now and then elsewhere."""
    import sys

    live = sys.stderr.isatty()
    printed_at = 0.0

    def report(done: int, total: int, seconds: float) -> None:
        nonlocal printed_at
        notes.flush()
        if not live and done < total and seconds - printed_at < seconds_between:
            return
        printed_at = seconds
        rate = done / max(seconds, 1e-9)
        text = f"  measured {done}/{total} records  {rate:.1f}/s"
        if done < total:
            text += f"  {(total - done) / rate:.0f} s left"
        sys.stderr.write(f"\r\x1b[K{text}" if live else f"{text}\n")
        if live and done == total:
            sys.stderr.write("\n")
        sys.stderr.flush()

    return report


def show(result: dict[str, Any], console: Console) -> None:
    """Print the summary: p̄, a table of the objectives, the tenths, and the advice."""
    from convexlm.diagnosis.summary import print_summary

    print_summary(result, console)
