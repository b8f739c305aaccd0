"""`convexlm demo`: the whole comparison on the embedded corpus, in a few minutes on a CPU."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.options import VerbParser
from convexlm.verbs.run import show

if TYPE_CHECKING:
    import argparse

__all__ = ["make_parser", "run", "show"]


def make_parser(prog: str) -> VerbParser:
    """Options: where the run goes, and the first seed."""
    parser = VerbParser(prog, "Train a tiny Llama with MLE and with convex objectives, decode, score and compare.")
    parser.add_argument("--run_dir", metavar="DIR", default=str(Path("runs") / "demo"), help="default: runs/demo")
    parser.add_argument("--seed", type=int, help="first training seed; the others count up from it")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the packaged recipe."""
    from convexlm.pipeline import run_recipe
    from convexlm.recipe import load_recipe

    with resources.as_file(resources.files("convexlm.tinyworld") / "demo.yaml") as path:
        recipe = load_recipe(path)
        if args.seed is not None:
            seeds = [args.seed + number for number in range(len(recipe.seeds))]
            recipe = load_recipe(path, [f"seeds={seeds}"])
    return run_recipe(recipe, args.run_dir)
