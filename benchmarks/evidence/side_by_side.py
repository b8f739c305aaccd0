"""Train the arms of run folders side by side on one machine, for models so small that one leaves most of a GPU idle.

`convexlm run` trains one arm after the other. Here every (run folder, arm, seed) goes to the next idle one of some
processes, each of which trains as `convexlm run` would and writes down that it is done, so that `convexlm run` in the
same folder goes on with decoding. Nothing of a training knows of the others.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def train_side_by_side(
    todo: Sequence[tuple[Path, Path]], overrides: Sequence[str], processes: int, log: Path
) -> list[str]:
    """Train what is not trained yet.

    Args:
        todo: recipe files and their run folders; arms that start from another arm are not for this.
        overrides: of the recipes, as `convexlm run --set` takes them.
        processes: how many trainings run at once.
        log: their progress is appended to it.

    Returns:
        The names `RUN FOLDER/RUN` of the trainings, done ones included.

    Raises:
        UserError: as `convexlm run`, from the first training that fails.
        ValueError: an arm starts from another arm.
    """
    from convexlm.recipe import load_recipe
    from convexlm.run_data import prepare_data
    from convexlm.runs import RunFolder, trained_runs

    jobs = []
    for file, run_dir in todo:
        recipe, folder = load_recipe(file, overrides), RunFolder(run_dir)
        if waiting := [arm.name for arm in recipe.arms if arm.init_from]:
            raise ValueError(f"{file}: arm `{waiting[0]}` starts from another arm, so it cannot be trained beside it")
        folder.path.mkdir(parents=True, exist_ok=True)
        recipe = folder.continued(recipe)
        folder.claim(recipe)
        with log.open("a", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
            prepare_data(recipe, folder)
        jobs += [(file, run_dir, tuple(overrides), run.name, log) for run in trained_runs(recipe)]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_train_one, jobs))


def _train_one(job: tuple[Path, Path, tuple[str, ...], str, Path]) -> str:
    """One training, in a process of the pool."""
    from convexlm.pipeline import _train, _trainer
    from convexlm.recipe import load_recipe
    from convexlm.runs import RunFolder, trained_runs

    file, run_dir, overrides, name, log = job
    recipe, folder = load_recipe(file, overrides), RunFolder(run_dir)
    run = next(run for run in trained_runs(recipe) if run.name == name)
    with (
        log.open("a", encoding="utf-8") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
        _trainer(recipe) as train,
    ):
        _train(recipe, folder, run, f"train {run_dir.name}/{name}", train)
    return f"{run_dir.name}/{name}"
