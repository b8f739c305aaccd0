"""`convexlm compare`: several systems on the same sentences, and whether their difference is more than luck."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.options import VerbParser

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from rich.console import Console

WIDTH_OF_FIGURES = 62  # of a table's columns beside the system's name


def make_parser(prog: str) -> VerbParser:
    """The options of `convexlm compare`."""
    from convexlm.scoring import DEFAULT_METRICS, DEFAULT_SEED, METRICS

    parser = VerbParser(prog, "Compare systems on the same sentences with a paired significance test.")
    parser.add_argument("--references", required=True, nargs="+", metavar="FILE", help="text, one a line; one or more")
    parser.add_argument(
        "--target_lang", required=True, metavar="LANG", help="code such as de or zh; sets the tokenizer"
    )
    parser.add_argument(
        "--systems",
        required=True,
        nargs="+",
        metavar="NAME=FILE",
        help="hypotheses: text, one a line, or decode's .jsonl; the first is the baseline",
    )
    parser.add_argument(
        "--metrics", nargs="+", default=list(DEFAULT_METRICS), metavar="METRIC", help=f"of: {', '.join(METRICS)}"
    )
    parser.add_argument(
        "--tokenize", metavar="NAME", help="another sacreBLEU tokenizer for BLEU than the language's own"
    )
    parser.add_argument(
        "--method",
        choices=["bs", "ar"],
        default="bs",
        help="paired bootstrap or approximate randomization (default: bs)",
    )
    parser.add_argument("--n_samples", type=int, help="resamples or trials (default: 1000 for bs, 10000 for ar)")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help=f"of the resampling (default: {DEFAULT_SEED})")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read, check and compare the files that `args` names."""
    from convexlm.files import text_sha256
    from convexlm.scoring import count_empty, package_versions, said_of_words
    from convexlm.segments import check_aligned, read_segments
    from convexlm.significance import DEFAULT_SAMPLES, paired_test

    files = parse_systems(args.systems)
    streams = [read_segments(path, "reference") for path in args.references]
    read = {name: read_segments(path, "hypothesis") for name, path in files.items()}
    names = [*args.references, *(f"{path} ({name})" for name, path in files.items())]
    check_aligned([*streams, *read.values()], names)
    if len(streams[0].texts) < 2:
        raise UserError("a paired test resamples sentences, and there is only one; `convexlm score` scores it")
    references, systems = [stream.texts for stream in streams], {name: one.texts for name, one in read.items()}
    tests = paired_test(
        systems,
        references,
        args.target_lang,
        args.metrics,
        method=args.method,
        n_samples=args.n_samples,
        seed=args.seed,
        tokenize=args.tokenize,
    )
    if said := said_of_words(args.target_lang, args.metrics, args.tokenize):
        from convexlm.progress import note  # slow to import

        note(said)
    return {
        "baseline": next(iter(files)),
        "systems": [
            {
                "name": name,
                "file": path,
                "num_empty": count_empty(systems[name]),
                "hypotheses_sha256": text_sha256(systems[name]),
            }
            for name, path in files.items()
        ],
        "tests": tests,
        "num_sentences": len(references[0]),
        "references": args.references,
        "references_sha256": [text_sha256(stream) for stream in references],
        "target_lang": args.target_lang,
        "method": args.method,
        "n_samples": DEFAULT_SAMPLES[args.method] if args.n_samples is None else args.n_samples,
        "seed": args.seed,
        "versions": {name: text for metric in args.metrics for name, text in package_versions(metric).items()},
    }


def parse_systems(words: Sequence[str]) -> dict[str, str]:
    """`NAME=FILE` words as a mapping, in their order.

    Raises:
        UserError: a word without `=`, an empty name or file, a name given twice, or a single system.
    """
    files: dict[str, str] = {}
    for word in words:
        name, mark, path = word.partition("=")
        if not mark or not name.strip() or not path or not name.isprintable():
            raise UserError(f"--systems: expected NAME=FILE, found {word!r}")
        if name in files:
            raise UserError(f"--systems: the name `{name}` is given twice")
        files[name] = path
    if len(files) < 2:
        raise UserError("--systems: a comparison needs at least two NAME=FILE, the baseline first")
    return files


def show(result: dict[str, Any], console: Console) -> None:
    """Print a table a metric, the best system marked, and a sentence that says what it comes to."""
    from rich.markup import escape
    from rich.table import Table

    from convexlm.scoring import get_metric
    from convexlm.significance import DEFAULT_SAMPLES, is_sure
    from convexlm.tables import signed

    several = len(result["systems"]) > 2
    for metric in dict.fromkeys(row["metric"] for row in result["tests"]):
        rows = [row for row in result["tests"] if row["metric"] == metric]
        kind = get_metric(metric)
        best = _best(rows)
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("")
        longest = max(len(row["system"]) for row in rows)
        narrow = console.width < longest + WIDTH_OF_FIGURES
        table.add_column("system", overflow="fold", min_width=min(longest, 12))
        # With several systems to tell from the baseline, the p to look at is the corrected one.
        p_title = "p (Holm)" if several else "p"
        own = [kind.title] if narrow else [kind.title, "95 % interval"]
        for column in (*own, "delta", "95 % interval", p_title):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            cells = [f"{row['score']:.2f}"]
            if not narrow:  # a narrow terminal does without the score's own interval, not without the name
                cells.append(f"[{row['low']:.2f}, {row['high']:.2f}]")
            if row["delta"] is None:
                cells += ["baseline", "", ""]
            else:
                cells += [signed(row["delta"]), f"[{signed(row['delta_low'])}, {signed(row['delta_high'])}]"]
                cells.append(_p_text(row["p_holm"]))
            style = ("bold green" if is_sure(_rival(rows, best)) else "bold") if row is best else None
            table.add_row("★" if row is best else "", escape(row["system"]), *map(escape, cells), style=style)
        console.print(table)
        console.print(_verdict(rows, best, kind.title), markup=False, soft_wrap=True)
        console.print(f"{metric}|{rows[0]['signature']}", style="dim", markup=False, soft_wrap=True)
        console.print()
    test = f"paired bootstrap, {result['n_samples']} samples"
    if result["method"] == "ar":
        test = f"paired approximate randomization, {result['n_samples']} trials (intervals: bootstrap, "
        test += f"{DEFAULT_SAMPLES['bs']} samples)"
    text = f"{result['num_sentences']} sentences, {test}, seed {result['seed']}"
    for system in result["systems"]:
        if system["num_empty"]:
            text += f"; {system['name']}: {system['num_empty']} empty"
    console.print(text, style="dim", markup=False)


def _best(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row with the best score; None where two share it."""
    sign = 1 if rows[0]["higher_is_better"] else -1
    ordered = sorted(rows, key=lambda row: sign * row["score"], reverse=True)
    return None if ordered[0]["score"] == ordered[1]["score"] else ordered[0]


def _rival(rows: Sequence[dict[str, Any]], best: dict[str, Any]) -> dict[str, Any]:
    """The row whose test says whether `best` leads: its own, or the runner-up's where the baseline is best."""
    if best["delta"] is not None:
        return best
    sign = 1 if best["higher_is_better"] else -1
    return max((row for row in rows if row is not best), key=lambda row: sign * row["score"])


def _verdict(rows: Sequence[dict[str, Any]], best: dict[str, Any] | None, title: str) -> str:
    """One sentence on the best system and the one it was tested against."""
    from convexlm.significance import is_sure
    from convexlm.tables import signed

    if best is None:
        return f"No single system has the best {title}."
    tested = _rival(rows, best)
    # The lead of `best`: its delta, turned round where less is better or where the baseline is the one that leads.
    sign = (1 if best["higher_is_better"] else -1) * (1 if tested is best else -1)
    low, high = sorted((sign * tested["delta_low"], sign * tested["delta_high"]))
    p_name = "p" if len(rows) == 2 else "Holm-corrected p"
    figures = f"{sign * tested['delta']:.2f} {title} (95 % interval {signed(low)} to {signed(high)}"
    figures += f", {p_name} = {_p_text(tested['p_holm'])})"
    loser = best["baseline"] if tested is best else tested["system"]
    if is_sure(tested):
        return f"{best['system']} is ahead of {loser} by {figures}."
    return f"{best['system']} is best, but its lead over {loser} may be luck: {figures}."


def _p_text(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.2f}"
