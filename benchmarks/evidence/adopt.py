"""Take trainings of one run folder over into another recipe's, where nothing but the arm's name differs.

Tuning trains every arm with every learning rate; the final run of the same seed would train the chosen ones once more,
to the last bit. `adopt` copies them instead and writes down that they are done, so that `convexlm run` goes on with
decoding.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def adopt(
    recipe_file: Path, run_dir: Path, tuned: Path, rates: dict[str, float], overrides: Sequence[str] = ()
) -> list[str]:
    """Copy the trainings `ARM.lrRATE` of `tuned` into `run_dir` as `ARM`; those that are there already are left.

    Args:
        recipe_file: the recipe of `run_dir`, of one seed.
        run_dir: where to, made if need be.
        tuned: a finished run folder.
        rates: the learning rate of every arm.
        overrides: of both recipes, as `convexlm run --set` takes them.

    Returns:
        The arms that were copied.

    Raises:
        ValueError: a training of `tuned` was made with other options than the recipe's.
    """
    from convexlm.pipeline import train_options
    from convexlm.recipe import load_recipe
    from convexlm.runs import RunFolder, trained_runs
    from convexlm.training_identity import InputHashes, options_sha256

    recipe, folder = load_recipe(recipe_file, overrides), RunFolder(run_dir)
    theirs = load_recipe(tuned.with_suffix(".yaml"), overrides)
    sources = {run.arm: run for run in trained_runs(theirs)}
    run_dir.mkdir(parents=True, exist_ok=True)
    folder.claim(recipe)
    copied, hashes = [], InputHashes()
    for run in trained_runs(recipe):
        target = folder.train(run)
        if (target / "done.json").exists():
            continue
        source = sources[f"{run.arm}.lr{rates[run.arm]:g}"]
        options = train_options(recipe, folder, run)
        old = train_options(theirs, RunFolder(tuned), source)
        if difference := _difference(options, old):
            raise ValueError(f"{tuned.name}/{source.name} was trained with another {', '.join(difference)}")
        staging = target.with_name(f".{target.name}")
        shutil.copytree(RunFolder(tuned).train(source), staging, dirs_exist_ok=True)
        done = json.loads((staging / "done.json").read_text(encoding="utf-8"))
        done["identity"] = options_sha256(options, folder, hashes)
        (staging / "done.json").write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
        staging.rename(target)
        copied.append(run.arm)
    return copied


def _difference(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(key for key in {*one, *other} - {"output_dir"} if one.get(key) != other.get(key))
