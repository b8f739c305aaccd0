"""`convexlm theory`: the distribution that an objective wants, for given data; or the page that shows it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.options import VerbParser

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

    from convexlm.objectives import Objective

_BAR = 24


def make_parser(prog: str) -> VerbParser:
    """The options of `convexlm theory`."""
    parser = VerbParser(prog, "The distribution over answers at which an objective's expected loss is least.")
    parser.add_argument(
        "--probabilities", nargs="+", type=float, metavar="D", help="of the answers to one prompt in the data; sum 1"
    )
    parser.add_argument(
        "--length",
        nargs="+",
        type=float,
        metavar="T",
        help="target tokens of the answers: one number for all, or one each",
    )
    parser.add_argument("--objective", default="convex", help="mle, convex, power, dft or one from a plugin (convex)")
    parser.add_argument("--k", nargs="+", type=float, metavar="K", help="one or more; default: the objective's own")
    parser.add_argument("--level", choices=["sequence", "token"], help="default: the objective's own")
    parser.add_argument(
        "--length_weighting", choices=["token", "sequence"], help="default: token; matters where lengths differ"
    )
    parser.add_argument("--mle_mix", type=float, metavar="A", help="share of maximum likelihood, from 0 to 1")
    parser.add_argument("--plugins", nargs="+", metavar="MODULE", help="modules or .py files that register objectives")
    parser.add_argument(
        "--page", metavar="FILE.html", help="write the interactive page, opened at these settings (or at an example)"
    )
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The optima that `args` asks for, one for each k; and the page, if a file is named."""
    from convexlm.plugins import load_plugins
    from convexlm.theory import check_lengths, check_probabilities, entropy, optimum

    load_plugins(args.plugins)
    if args.probabilities is None or args.length is None:
        missing = " and ".join(f"--{name}" for name in ("probabilities", "length") if getattr(args, name) is None)
        if args.page is None or missing == "--length":
            raise UserError(f"{missing} missing: for instance --probabilities .4 .3 .2 .1 --length 10")
        args.probabilities, args.length = args.probabilities or [0.4, 0.3, 0.2, 0.1], args.length or [10.0]
    try:
        d = check_probabilities(args.probabilities)
        lengths = check_lengths(args.length, len(d))
        objectives = _objectives(args)
        optima = []
        for k, objective in objectives:
            best = optimum(d, lengths, objective)
            optima.append(
                {
                    "k": k,
                    "probabilities": best.probabilities.tolist(),
                    "entropy": best.entropy,
                    "mode_mass": best.mode_mass,
                    "temperature": best.temperature,
                    "method": best.method,
                    "concave": best.concave,
                    "kkt_residual": best.kkt_residual,
                    "expected_loss": best.expected_loss if best.expected_loss < float("inf") else None,
                    "notes": list(best.notes),
                }
            )
        if args.page is not None:
            _write_page(args.page, d, lengths, objectives[0][1])
    except ValueError as error:
        raise UserError(str(error)) from None
    settings = objectives[0][1].to_dict()
    settings.pop("k", None)
    return {
        "optima": optima,
        "data": {
            "probabilities": d.tolist(),
            "lengths": lengths.tolist(),
            "entropy": entropy(d),
            "mode_mass": float(d.max()),
        },
        "objective": settings,
        **({"page": args.page} if args.page is not None else {}),
    }


def _objectives(args: argparse.Namespace) -> list[tuple[float | None, Objective]]:
    """The objective at every k, each with its k; one without k if the objective has none."""
    from dataclasses import fields

    from convexlm.objectives import get_objective

    names = ("level", "length_weighting", "mle_mix")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    plain = get_objective(args.objective, **settings)
    has_k = any(field.name == "k" for field in fields(plain))
    if args.k is None:
        return [(getattr(plain, "k", None) if has_k else None, plain)]
    if not has_k:
        raise UserError(f"objective `{args.objective}` has no k; leave --k out")
    return [(k, get_objective(args.objective, k=k, **settings)) for k in args.k]


def _write_page(path: str, d: Any, lengths: Any, objective: Objective) -> None:
    from convexlm.files import write_atomic
    from convexlm.theory.page import is_page, render_page

    page = render_page(d, lengths, objective)
    try:
        if Path(path).is_file() and not is_page(Path(path).read_bytes()):
            raise UserError(f"--page {path}: is there, and is no earlier page; give another name or remove it")
        write_atomic(path, page)
    except OSError as error:
        raise UserError(f"--page {path}: cannot be written ({error.strerror or error})") from None


def show(result: dict[str, Any], console: Console) -> None:
    """Print the data and every optimum, with bars."""
    from rich.table import Table

    data, optima = result["data"], result["optima"]
    lengths = data["lengths"]
    equal = len(set(lengths)) == 1
    columns = [("data", data["probabilities"], {"entropy": data["entropy"], "mode_mass": data["mode_mass"]})]
    for best in optima:
        name = result["objective"]["name"] if best["k"] is None else f"k = {best['k']:g}"
        columns.append((name, best["probabilities"], best))
    # Bars take what the terminal leaves over; without room for them the numbers stay.
    room = (console.width - 16) // len(columns) - 10
    bar = max(0, min(_BAR, room))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("answer", justify="right")
    if not equal:
        table.add_column("T", justify="right")
    for name, _, _ in columns:
        table.add_column(name)
    for i, length in enumerate(lengths):
        cells = [_cell(p[i], bar, "" if name == "data" else "blue") for name, p, _ in columns]
        table.add_row(str(i + 1), *([] if equal else [f"{length:g}"]), *cells)
    table.add_section()
    rows = [
        ("entropy", lambda best: f"{best['entropy']:.3f} nats"),
        ("on mode", lambda best: f"{best['mode_mass']:.3f}"),
        ("temp.", lambda best: "" if best.get("temperature") is None else f"{best['temperature']:.4g}"),
        ("by", lambda best: best.get("method", "")),
    ]
    for title, text in rows:
        table.add_row(title, *([] if equal else [""]), *(text(best) for _, _, best in columns), style="dim")
    settings = result["objective"]
    mix = f", mle_mix {settings['mle_mix']:g}" if settings.get("mle_mix") else ""
    level = f" by {settings['level']}" if settings["name"] != "mle" else ""
    length_text = f", T = {lengths[0]:g}" if equal else f", {settings['length_weighting']} length weighting"
    console.print(f"{settings['name']}{level}{mix}{length_text}", style="bold", markup=False)
    console.print(table)
    for note in dict.fromkeys(note for best in optima for note in best["notes"]):
        which = [f"{best['k']:g}" for best in optima if note in best["notes"] and best["k"] is not None]
        prefix = f"k = {', '.join(which)}: " if which and len(optima) > 1 else ""
        console.print(f"{prefix}{note}", style="dim", markup=False)
    if "page" in result:
        console.print(f"page: {result['page']}", markup=False, soft_wrap=True)


def _cell(p: float, width: int, colour: str) -> Any:
    """A probability in figures and, where there is room, as a bar."""
    from rich.text import Text

    number = f"{p:.3f}" if p == 0 or p >= 0.0005 else "<.001"
    eighths = round(p * width * 8)
    bar = "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")
    return Text.assemble(number, " ", (bar, colour or "dim"))
