"""`convexlm run`: a recipe from end to end, going on where it stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.launch.settings import add_launch_options, launch_settings
from convexlm.options import VerbParser

if TYPE_CHECKING:
    import argparse

    from rich.console import Console


def make_parser(prog: str) -> VerbParser:
    """Options: the recipe, where the run goes, and what to change in the recipe."""
    parser = VerbParser(prog, "Run a recipe from end to end: train, decode, score, compare, report.")
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe; see the folder recipes/")
    parser.add_argument("--run_dir", metavar="DIR", help="where everything goes (default: runs/NAME)")
    parser.add_argument(
        "--dry_run", action="store_true", help="print every stage, step count, file and setting; do nothing"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change an entry of the recipe, such as train.max_steps=10 or vars.data_dir=/data; may be repeated",
    )
    add_launch_options(parser)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the recipe, or plan it."""
    from convexlm.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if launch := launch_settings(vars(args)).over(recipe.launch):
        recipe = replace(recipe, launch=launch.resolved(to_plan=args.dry_run))
    run_dir = args.run_dir or str(Path("runs") / recipe.name)
    if args.dry_run:
        from convexlm.plan import make_plan

        return {"dry_run": True, **make_plan(recipe, run_dir)}
    from convexlm.pipeline import run_recipe

    return run_recipe(recipe, run_dir)


def show(result: dict[str, Any], console: Console) -> None:
    """The table of results, or the plan."""
    if result.get("dry_run"):
        from convexlm.plan import show_plan

        show_plan(result, console)
        return
    if "machine_rank" in result:
        names = ", ".join(result["trained"]) or "none, for all were done"
        console.print(f"machine {result['machine_rank']} took part in {len(result['trained'])} trainings: {names}")
        console.print(f"machine 0 decodes, scores and reports in {result['run_dir']}")
        return
    from convexlm.tables import show_comparison

    show_comparison(result["comparison"], console)
    console.print(f"\n{result['recipe']} took {result['seconds']:.0f} s; everything lies in {result['run_dir']}")
    console.print(f"scores: {result['scores']}")
    console.print(f"report: {result['report']}")
