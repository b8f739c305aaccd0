"""`convexlm run`: the corridor from a recipe to a report. Each stage reads and writes files, and skips what is done.

data -> train -> decode -> score and compare -> report. A stage that was killed goes on where it was; a finished one is
recognised by the hash of its inputs.
"""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.checkpoints import all_checkpoints
from convexlm.errors import UserError
from convexlm.files import write_atomic
from convexlm.launch.settings import started_processes
from convexlm.preflight import (
    check_apart,
    check_decoding,
    check_files,
    check_scoring,
    check_trainings,
    load_test_sets,
    load_validation_sets,
)
from convexlm.progress import note
from convexlm.recipe import DATA_OPTIONS, is_whole
from convexlm.run_checks import check_decoded, check_lengths
from convexlm.run_data import dataset_of, prepare_data, write_references
from convexlm.runs import DONE_FILE, RunFolder, TrainedRun, identity_sha256, read_done, run_name, trained_runs
from convexlm.sweep import decode_stage
from convexlm.training_identity import InputHashes, check_identity, options_sha256, training_identity, write_identity

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from convexlm.recipe import Recipe

Train = Callable[[dict[str, Any], str], dict[str, Any]]  # options and a name -> as `train_model` returns


def run_recipe(recipe: Recipe, run_dir: str | Path) -> dict[str, Any]:
    """Run every stage that is not done yet.

    Returns:
        `run_dir`, `recipe`, `seconds`, `report`, `scores` (the file), and `table` (see `evaluation`).

    Raises:
        UserError: the folder is another recipe's or in use, a file that the recipe names cannot be used, a library
            for its decoding is missing, or a test set's sources and references do not fit together.
    """
    from convexlm.evaluation import evaluate

    if world_size() > 1:
        raise UserError(
            "`convexlm run` is one process, which starts others itself: give it --num_processes; under a launcher, "
            "train an arm with `accelerate launch -m convexlm.cli train ...`"
        )
    folder = RunFolder(Path(run_dir))
    begun = time.monotonic()
    if recipe.launch.machines > 1 and recipe.launch.machine_rank:
        return _take_part(recipe, folder, begun)
    # First of all, so that a mistake is told before hours of training, and before it is in the folder's recipe.
    known = folder.check(recipe)
    recipe = folder.continued(recipe)
    if not known:
        trainings = [(run, train_options(recipe, folder, run)) for run in trained_runs(recipe)]
        check_trainings(recipe, trainings, check_files(recipe), world_size(recipe))
        check_decoding(recipe)
    test_sets, validation_sets = load_test_sets(recipe), load_validation_sets(recipe)
    check_apart(test_sets, validation_sets)
    if not known:
        check_scoring(recipe, [*test_sets, *validation_sets])
    with folder.lock():
        runs, hashes = trained_runs(recipe), InputHashes()
        _check_all_begun(recipe, folder, runs, hashes)  # before the folder takes what the recipe has got more
        check_decoded(folder, [*test_sets, *validation_sets])
        folder.claim(recipe)
        note(f"[1/5] data  {prepare_data(recipe, folder)}")
        if any(not (folder.train(run) / DONE_FILE).exists() for run in runs):
            check_lengths(recipe, folder, [*test_sets, *validation_sets])
        write_references(folder, [*test_sets, *validation_sets])
        with _trainer(recipe) as train:
            for number, run in enumerate(runs, start=1):
                _train(recipe, folder, run, f"[2/5] train {run.name} ({number} of {len(runs)})", train, hashes)
        _check_all_begun(recipe, folder, runs, hashes)
        decode_stage(_decoding_like_training(recipe), folder, runs, test_sets, validation_sets)
        note("[4/5] score and compare")
        comparison = evaluate(recipe, folder, runs, test_sets, validation_sets)
        note("[5/5] report")
        _report(folder)
    return {
        "recipe": recipe.name,
        "run_dir": str(folder.path),
        "seconds": round(time.monotonic() - begun, 1),
        "scores": str(folder.scores),
        "report": str(folder.report),
        "comparison": comparison,
    }


# -- train


def train_options(recipe: Recipe, folder: RunFolder, run: TrainedRun) -> dict[str, Any]:
    """The options of `convexlm train` for one arm and seed; relative paths are relative to the current folder."""
    arm = recipe.arm(run.arm)
    options = {key: value for key, value in recipe.model.items() if key not in ("config", "tokenizer")}
    options.update({key: recipe.data[key] for key in sorted(DATA_OPTIONS) if key in recipe.data})
    options["dataset"] = dataset_of(recipe, folder, arm)
    tokenizer = recipe.model.get("tokenizer")
    if tokenizer:
        options["tokenizer_name"] = str(folder.data / "tokenizer") if tokenizer == "tinyworld" else tokenizer
    if arm.init_from:
        options["model_name_or_path"] = _last_checkpoint(folder, _start_of(recipe, arm.init_from, run.seed))
    elif recipe.model.get("config"):
        options["config_name"] = str(folder.data / "model")
    options.update(arm.train)
    if total := options.pop("global_batch_size", None):
        options["gradient_accumulation_steps"] = accumulation_steps(total, options, run.arm, world_size(recipe))
    options.update(output_dir=str(folder.train(run)), seed=run.seed)
    options.setdefault("report_to", "none")
    if plugins := recipe.resolved.get("plugins"):  # for processes that a launch starts
        options["plugins"] = list(plugins)
    return options


def accumulation_steps(global_batch_size: int, options: dict[str, Any], arm: str, processes: int) -> int:
    """The gradient accumulation that makes up a global batch on so many processes.

    Raises:
        UserError: the global batch is no multiple of what all processes take at once.
    """
    if "gradient_accumulation_steps" in options:
        raise UserError(f"arm `{arm}`: give `global_batch_size` or `gradient_accumulation_steps`, not both")
    at_once = int(options.get("per_device_train_batch_size", 8)) * processes
    if at_once < 1 or not is_whole(global_batch_size, 1) or global_batch_size % at_once:
        raise UserError(
            f"arm `{arm}`: global_batch_size {global_batch_size!r} is no multiple of per_device_train_batch_size x "
            f"processes = {at_once}"
        )
    return global_batch_size // at_once


def _last_checkpoint(folder: RunFolder, run: TrainedRun) -> str:
    done = folder.train(run) / DONE_FILE
    if not done.exists():  # in a dry run
        return str(folder.train(run) / "checkpoint-LAST")
    return str(folder.train(run) / read_done(folder.train(run))["checkpoints"][-1])


def _train(
    recipe: Recipe,
    folder: RunFolder,
    run: TrainedRun,
    title: str,
    train: Train,
    hashes: InputHashes | None = None,
) -> None:
    hashes = hashes or InputHashes()
    options = train_options(recipe, folder, run)
    done = folder.train(run) / DONE_FILE
    identity = _check_begun(recipe, folder, run, options, hashes, batch=not done.exists())
    if done.exists():
        note(f"{title}: done")
        return
    # A file may have changed while another arm was trained on it; and may while this one is, so its hash is of now.
    _check_all_begun(recipe, folder, trained_runs(recipe), hashes)
    made_from = options_sha256(options, folder, hashes)
    note(title)
    write_identity(done.parent, identity)
    result = train(options, run.name)
    if not result["checkpoints"]:
        raise UserError(f"{run.name}: training left no checkpoint; `save_strategy: no` cannot be used in a recipe")
    kept = {key: result[key] for key in ("checkpoints", "steps", "records", "dropped", "truncated", "seconds")}
    write_atomic(done, json.dumps({"identity": made_from, **kept}, indent=2) + "\n")
    gc.collect()


def _check_begun(
    recipe: Recipe,
    folder: RunFolder,
    run: TrainedRun,
    options: dict[str, Any],
    hashes: InputHashes,
    *,
    batch: bool,
) -> dict[str, Any]:
    """The identity of a training, after seeing that what there is of it was made from the same."""
    place = folder.train(run)
    identity = training_identity(options, folder, world_size(recipe), hashes)
    if (place / DONE_FILE).exists():
        both = (str(read_done(place).get("identity")), options_sha256(options, folder, hashes))
        check_identity(place, options, identity, done_sha256=both, batch=batch)
    elif all_checkpoints(place):  # without one it begins anew, from what is there now
        check_identity(place, options, identity, batch=batch)
    return identity


def _check_all_begun(recipe: Recipe, folder: RunFolder, runs: Sequence[TrainedRun], hashes: InputHashes) -> None:
    """See that all trainings that are done or begun were made from the files that are there now.

    It is done before the first training, for those that would be refused at their turn; before every other one, for
    files may change meanwhile; and after the last, before anything is compared.

    Global batches do not matter any more where all is trained: a run may be decoded on another machine.
    """
    waiting = any(not (folder.train(run) / DONE_FILE).exists() for run in runs)
    for run in runs:
        start = recipe.arm(run.arm).init_from
        if start and not (folder.train(_start_of(recipe, start, run.seed)) / DONE_FILE).exists():
            continue
        options = train_options(recipe, folder, run)
        generated = Path(options["dataset"]).is_relative_to(folder.path)
        if not generated or Path(options["dataset"]).exists():  # what is missing is generated anew, and looked at then
            _check_begun(recipe, folder, run, options, hashes, batch=waiting)


def _start_of(recipe: Recipe, arm: str, seed: int) -> TrainedRun:
    return TrainedRun(arm, seed, run_name(recipe, arm, seed))


@contextlib.contextmanager
def _trainer(recipe: Recipe) -> Iterator[Train]:
    """How a training is done: in this process, in those of a launch, or on all machines."""
    if not recipe.launch:
        from convexlm.verbs.train import train_here

        yield lambda options, name: train_here(options, resume=True, title=name)
    elif recipe.launch.machines == 1:
        from convexlm.launch.training import launch_training

        yield lambda options, name: launch_training(recipe.launch, options, resume=True, title=name)
    else:
        from convexlm.launch.machines import lead

        with lead(recipe.launch, identity_sha256(recipe)) as leading:
            yield leading.train


def _take_part(recipe: Recipe, folder: RunFolder, begun: float) -> dict[str, Any]:
    """What a machine other than the first does in a run."""
    from convexlm.launch.machines import take_part

    trained = take_part(recipe.launch, identity_sha256(recipe))
    return {
        "recipe": recipe.name,
        "run_dir": str(folder.path),
        "seconds": round(time.monotonic() - begun, 1),
        "machine_rank": recipe.launch.machine_rank,
        "trained": trained,
    }


def _decoding_like_training(recipe: Recipe) -> Recipe:
    """The recipe, decoding on as many processes of this machine as it trains on, if it does not say."""
    if not recipe.launch or recipe.decode.get("num_processes"):
        return recipe
    return replace(recipe, decode={**recipe.decode, "num_processes": recipe.launch.local_processes})


# -- report


def _report(folder: RunFolder) -> None:
    """Write the report; one that says the same already is left as it is."""
    from convexlm.report import write_report

    beside = folder.path / ".report.html"
    beside.unlink(missing_ok=True)  # of a call that was killed here
    fresh = write_report(folder.path, beside)
    if folder.report.exists() and folder.report.read_bytes() == fresh.read_bytes():
        fresh.unlink()
    else:
        fresh.replace(folder.report)


def world_size(recipe: Recipe | None = None) -> int:
    """How many processes train together: as a launcher has told this one, or as the recipe's launch will start."""
    started = started_processes()
    if started > 1 or recipe is None or not recipe.launch:
        return started
    return recipe.launch.processes
