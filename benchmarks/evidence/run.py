r"""One experiment of the evidence, from Multi30k's files to rows: data, base model, tuning on validation, final runs.

    OMP_NUM_THREADS=1 python benchmarks/evidence/run.py --multi30k DATA/multi30k \
        --work_dir WORK --noise exchanged --share 0.3 --rows results/evidence.jsonl

WORK/NAME/ (NAME is `multi30k-en-de-exchanged-30`) gets `data/` and run folders of `convexlm run`: `base`
(recipes/evidence/base.yaml), `tune` and `final-seedN` (both made from recipes/evidence/arms.yaml). What is done is
skipped, so the same command goes on where it was stopped. Other data (`--data_dir`) and recipes go the same way.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from convexlm.recipe_text import with_parents

sys.path.insert(0, str(Path(__file__).parent))

from adopt import adopt  # noqa: E402
from make_data import make  # noqa: E402
from noise import KINDS, OFF_TOPIC  # noqa: E402
from rows import collect, read_jsonl, replace_experiment  # noqa: E402
from side_by_side import train_side_by_side  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parents[1] / "recipes" / "evidence"
TUNING_SEED = 1


def tune_recipe(recipe: Path, arms: dict[str, Any], rates: list[float], variables: dict[str, str]) -> dict[str, Any]:
    """The recipe `tune`: every arm with every learning rate, one seed, scored on validation alone.

    Args:
        recipe: the arms' recipe file, which it extends.
        arms: those of the recipe's that are run.
        rates: the learning rates.
        variables: the recipe's `vars`.
    """
    raw = with_parents(recipe, ())
    return {
        "extends": str(recipe.resolve()),
        "name": "evidence-tune",
        "vars": variables,
        "seeds": [TUNING_SEED],
        "arms": {f"{name}.lr{rate:g}": {**arm, "learning_rate": rate} for name, arm in arms.items() for rate in rates},
        # The recipe's `test_sets` is the validation set: no test set is looked at here.
        "test_sets": raw["validation_sets"],
        "validation_sets": None,
        "selection": "last",
        "decode": {"searches": raw["decode"]["searches"][:1]},
        "compare": {"baseline": f"{next(iter(arms))}.lr{rates[0]:g}", "n_samples": 20},
    }


def choose(scores: list[dict[str, Any]], metric: str = "bleu") -> dict[str, dict[str, Any]]:
    """The best (learning rate, checkpoint) of every arm in a tuning run's scores; of equal ones the first.

    Args:
        scores: rows of its `scores.jsonl`, arms named `ARM.lrRATE`.
        metric: the metric to choose by, of which more is better.
    """
    best: dict[str, dict[str, Any]] = {}
    for row in scores:
        arm, _, rate = row["arm"].rpartition(".lr")
        if row["metric"] == metric and (arm not in best or row["score"] > best[arm]["score"]):
            best[arm] = {"learning_rate": float(rate), "checkpoint": row["checkpoint"], "score": row["score"]}
    return best


def final_recipe(
    recipe: Path, arms: dict[str, Any], chosen: dict[str, dict[str, Any]], seed: int, variables: dict[str, str]
) -> dict[str, Any]:
    """The recipe `final`: every arm with its own learning rate; the stopping step is chosen on validation."""
    return {
        "extends": str(recipe.resolve()),
        "name": "evidence-final",
        "vars": variables,
        "seeds": [seed],
        "arms": {name: {**arm, "learning_rate": chosen[name]["learning_rate"]} for name, arm in arms.items()},
    }


def run(todo: Sequence[tuple[Path, Path]], overrides: Sequence[str], log: Path, *, at_once: bool = False) -> None:
    """`convexlm run` for every (recipe, run folder), progress appended to a file.

    A failure ends this program with the log's last lines.

    Args:
        todo: recipes and their run folders.
        overrides: as of `convexlm run --set`.
        log: the file.
        at_once: all side by side.
    """
    words = [word for one in overrides for word in ("--set", one)]
    running = []
    with log.open("a", encoding="utf-8") as stream:
        for recipe, run_dir in todo:
            command = [sys.executable, "-m", "convexlm.cli", "run", str(recipe), "--run_dir", str(run_dir), *words]
            running.append((command, subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)))
            if not at_once:
                running[-1][1].wait()
                if running[-1][1].returncode:
                    break
    for command, process in running:
        if code := process.wait():
            tail = log.read_text(encoding="utf-8").split("\n")[-6:]
            raise SystemExit(f"{' '.join(command)} ended with {code}:\n" + "\n".join(tail))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_group = parser.add_mutually_exclusive_group(required=True)
    data_group.add_argument("--multi30k", type=Path, help="folder with Multi30k's files")
    data_group.add_argument("--data_dir", type=Path, help="data that are made already, as make_ambiguity.py does")
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--pair", default="en-de", choices=["en-de", "de-en"])
    parser.add_argument("--noise", default="exchanged", choices=[*KINDS, OFF_TOPIC])
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--other_text", type=Path, nargs="+", default=[], help="for `off_topic`, as of make_data.py")
    parser.add_argument("--data_seed", type=int, default=1, help="draws which records are wrong, and joins")
    parser.add_argument("--max_records", type=int, help="training records, as of make_data.py")
    parser.add_argument("--join", type=int, default=1, help="pairs in a record at most, as of make_data.py")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3], help="learning rates to try")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the final runs; tuning has 1")
    parser.add_argument("--base_checkpoint", type=Path, help="start from this one, without the stage `base`")
    parser.add_argument("--name", help="of the experiment; by default from pair, noise and share")
    parser.add_argument("--base_recipe", type=Path, default=RECIPES / "base.yaml")
    parser.add_argument("--recipe", type=Path, default=RECIPES / "arms.yaml", help="whose arms are run")
    parser.add_argument("--arms", nargs="+", help="some of the recipe's; by default all that the noise allows")
    parser.add_argument("--set", nargs="+", default=[], help="changes to the arms' recipes, as of `convexlm run`")
    parser.add_argument("--set_base", nargs="+", default=[], help="likewise, to base.yaml")
    parser.add_argument("--stop_after", choices=["data", "base", "tune", "final"], default="final")
    parser.add_argument("--vocab_size", type=int, default=4000)
    parser.add_argument(
        "--processes", type=int, default=1, help="trainings that run side by side, on a GPU with room for them"
    )
    parser.add_argument(
        "--rows",
        type=Path,
        help="file to put the experiment's rows into, in place of its old ones; versions go into FILE-versions.json",
    )
    return parser


def main() -> None:
    """Run what is not done yet."""
    args = parser().parse_args()
    name = args.name or f"multi30k-{args.pair}-" + (
        f"{args.noise}-{round(100 * args.share)}" if args.share else "clean"
    )
    if not args.name and args.data_seed != 1:
        name += f"-draw{args.data_seed}"
    arms = with_parents(args.recipe, ())["arms"]
    if unknown := [arm for arm in args.arms or () if arm not in arms]:
        parser().error(f"--arms {' '.join(unknown)}: {args.recipe} has {', '.join(arms)}")
    folder = args.work_dir.resolve() / name
    data, log = folder / "data", folder / "log.txt"
    if args.data_dir and not data.exists():
        folder.mkdir(parents=True, exist_ok=True)
        data.symlink_to(args.data_dir.resolve())
    if not (data / "data.json").exists():
        settings = (args.pair, args.noise, args.share, args.data_seed, args.vocab_size, args.other_text)
        make(args.multi30k, data, *settings, args.join, args.max_records)
    stages = {"data": 0, "base": 1, "tune": 2, "final": 3}
    variables = {"data_dir": str(data), "pair": args.pair}
    base = args.base_checkpoint and args.base_checkpoint.resolve()
    if stages[args.stop_after] >= 1 and base is None:
        settings = [*(f"vars.{key}={value}" for key, value in variables.items()), *args.set_base]
        run([(args.base_recipe, folder / "base")], settings, log)
        chosen = json.loads((folder / "base" / "selection.json").read_text(encoding="utf-8"))["chosen"]["start"]
        base = folder / "base" / "train" / "start" / chosen
    variables["base"] = str(base)
    share = json.loads((data / "data.json").read_text(encoding="utf-8")).get("share") or 0.0
    if not share:  # nothing to clean
        arms = {arm: entry for arm, entry in arms.items() if "dataset" not in entry}
    arms = {arm: arms[arm] for arm in args.arms or arms}
    if stages[args.stop_after] >= 2:
        for wanted, dropped in filtered_files(arms, share).items():
            filter_file(data, wanted, dropped, base)
        recipe = tune_recipe(args.recipe, arms, args.rates, variables)
        if args.processes > 1:
            recipe["decode"]["num_processes"] = args.processes
        write_yaml(folder / "tune.yaml", recipe)
        tuning = [(folder / "tune.yaml", folder / "tune")]
        if args.processes > 1:
            train_side_by_side(tuning, args.set, args.processes, log)
        run(tuning, args.set, log)
        best = choose(read_jsonl(folder / "tune" / "scores.jsonl"))
        (folder / "chosen.json").write_text(json.dumps(best, indent=1) + "\n", encoding="utf-8")
    # A run folder a seed, so that more of them can be added, and run side by side.
    final = []
    for seed in args.seeds if stages[args.stop_after] >= 3 else []:
        final.append((folder / f"final-seed{seed}.yaml", folder / f"final-seed{seed}"))
        write_yaml(final[-1][0], final_recipe(args.recipe, arms, best, seed, variables))
        if seed == TUNING_SEED:
            rates = {arm: entry["learning_rate"] for arm, entry in best.items()}
            adopt(*final[-1], folder / "tune", rates, args.set)
    if args.processes > 1:
        train_side_by_side(final, args.set, args.processes, log)
    run(final, args.set, log, at_once=args.processes > 1)
    if args.rows:
        replace_experiment(args.rows, name, collect(folder, name))


def filtered_files(arms: dict[str, Any], share: float) -> dict[str, float]:
    """The files that arms train on and a model has to filter first, with the share of the records to drop.

    Args:
        arms: of a recipe; `train.filter.jsonl` drops the true share of noise, `train.filter-25.jsonl` 25 %.
        share: the true one.
    """
    names = {Path(arm.get("dataset", "")).name for arm in arms.values()}
    found = {name: re.fullmatch(r"train\.filter(?:-(\d+))?\.jsonl", name) for name in sorted(names)}
    return {name: int(match[1]) / 100 if match[1] else share for name, match in found.items() if match}


def filter_file(data: Path, name: str, share: float, base: Path) -> None:
    """Make a filtered file in the data folder, and beside it (.json) what was dropped; one that is there is kept."""
    if (data / name).exists():
        return
    options = {"checkpoint": base, "dataset": data / "train.jsonl", "share": share, "output": data / name}
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    command = [sys.executable, str(HERE / "filter_data.py"), *words]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    (data / f"{name.removeprefix('train.').removesuffix('.jsonl')}.json").write_text(out, encoding="utf-8")


def write_yaml(path: Path, recipe: dict[str, Any]) -> None:
    """A recipe as a file."""
    path.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")


if __name__ == "__main__":
    main()
