"""`convexlm score`: the scores of one file of hypotheses, each with what is needed to cite it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convexlm.options import VerbParser

DEFAULT_SAMPLES = 1000

if TYPE_CHECKING:
    import argparse

    from rich.console import Console


def make_parser(prog: str) -> VerbParser:
    """The options of `convexlm score`."""
    from convexlm.scoring import DEFAULT_METRICS, DEFAULT_SEED, METRICS

    parser = VerbParser(prog, "Score hypotheses with sacreBLEU (BLEU, chrF, TER) and rouge-score.")
    parser.add_argument("--hypotheses", required=True, metavar="FILE", help="text, one a line, or decode's .jsonl")
    parser.add_argument("--references", required=True, nargs="+", metavar="FILE", help="text, one a line; one or more")
    parser.add_argument(
        "--target_lang", required=True, metavar="LANG", help="code such as de or zh; sets the tokenizer"
    )
    parser.add_argument(
        "--metrics", nargs="+", default=list(DEFAULT_METRICS), metavar="METRIC", help=f"of: {', '.join(METRICS)}"
    )
    parser.add_argument(
        "--tokenize", metavar="NAME", help="another sacreBLEU tokenizer for BLEU than the language's own"
    )
    parser.add_argument("--confidence", action="store_true", help="add bootstrap 95 %% intervals")
    parser.add_argument("--n_samples", type=int, help=f"resamples for --confidence (default: {DEFAULT_SAMPLES})")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help=f"of the resampling (default: {DEFAULT_SEED})")
    parser.add_argument(
        "--export_comet", metavar="FILE.jsonl", help="write source, hypothesis and reference as comet-score reads them"
    )
    parser.add_argument(
        "--sources", metavar="FILE", help="text, one a line, for --export_comet; a decode file has them inside"
    )
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read, check and score the files that `args` names."""
    from convexlm.errors import UserError
    from convexlm.resampling import check_samples
    from convexlm.scoring import Scorer, first_references, said_of_words
    from convexlm.segments import check_aligned, read_segments

    if args.n_samples is not None and not args.confidence:
        raise UserError("--n_samples is of the interval that --confidence asks for; add it, or leave --n_samples out")
    n_samples = DEFAULT_SAMPLES if args.n_samples is None else args.n_samples
    try:
        check_samples(n_samples, least=2)
    except UserError as error:
        raise UserError(f"--n_samples: {error}") from None
    read = read_segments(args.hypotheses, "hypothesis")
    streams = [read_segments(path, "reference") for path in args.references]
    check_aligned([read, *streams], [f"{args.hypotheses} (hypotheses)", *args.references])
    hypotheses, references = read.texts, [stream.texts for stream in streams]
    scorer = Scorer(references, args.target_lang, args.metrics, tokenize=args.tokenize)
    if said := said_of_words(args.target_lang, args.metrics, args.tokenize):
        from convexlm.progress import note  # slow to import

        note(said)
    scores = scorer.score(hypotheses, confidence=n_samples if args.confidence else 0, seed=args.seed)
    exported = {}
    if args.export_comet:
        from convexlm.comet import export_comet

        sources = _read_sources(args)
        inputs = [args.hypotheses, *args.references, *filter(None, [args.sources])]
        first = first_references(references)
        exported = {"comet": export_comet(args.export_comet, sources, hypotheses, first, inputs)}
    elif args.sources:
        raise UserError("--sources is read for --export_comet only")
    return {
        "scores": [score.as_dict() for score in scores],
        "num_sentences": len(hypotheses),
        "num_empty": scores[0].num_empty,
        "hypotheses": args.hypotheses,
        "references": args.references,
        "target_lang": args.target_lang,
        **exported,
    }


def _read_sources(args: argparse.Namespace) -> list[str]:
    from convexlm.errors import UserError
    from convexlm.files import read_jsonl
    from convexlm.segments import read_plain

    if args.sources:
        return read_plain(args.sources, "source")
    if not args.hypotheses.lower().endswith((".jsonl", ".jsonl.gz")):
        raise UserError("--export_comet needs --sources FILE where the hypotheses are plain text")
    sources = [row.get("source") for row in read_jsonl(args.hypotheses)]
    if not all(isinstance(source, str) for source in sources):
        raise UserError(f"{args.hypotheses}: a record has no `source`; give --sources FILE")
    return [str(source) for source in sources]


def show(result: dict[str, Any], console: Console) -> None:
    """Print the scores as a table."""
    from rich.markup import escape
    from rich.table import Table

    from convexlm.scoring import get_metric

    with_interval = any("ci" in score for score in result["scores"])
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("metric")
    table.add_column("score", justify="right")
    if with_interval:
        table.add_column("95 % interval", justify="right")
    for score in result["scores"]:
        kind = get_metric(score["metric"])
        interval = []
        if with_interval:
            interval = [f"[{score['mean'] - score['ci']:.2f}, {score['mean'] + score['ci']:.2f}]"]
        title = kind.title if kind.higher_is_better else f"{kind.title} (less is better)"
        table.add_row(title, f"[bold]{score['score']:.2f}[/bold]", *map(escape, interval))
    console.print(table)
    console.print()
    for score in result["scores"]:
        # Not wrapped, so that a signature can be copied.
        console.print(f"{score['metric']}|{score['signature']}", style="dim", markup=False, soft_wrap=True)
    if "comet" in result:
        console.print(result["comet"]["command"], markup=False, soft_wrap=True)
    empty = f", {result['num_empty']} of them empty" if result["num_empty"] else ""
    console.print(f"{result['num_sentences']} sentences{empty}", style="dim")
