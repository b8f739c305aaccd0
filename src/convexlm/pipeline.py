"""`convexlm run`: the corridor from a recipe to a report. Each stage reads and writes files, and skips what is done.

data -> train -> decode -> score and compare -> report. A stage that was killed goes on where it was; a finished one is
recognised by the hash of its inputs.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.files import file_sha256, json_sha256, to_json_line, write_atomic, write_jsonl
from convexlm.progress import note
from convexlm.recipe import DATA_OPTIONS, is_whole
from convexlm.runs import DONE_FILE, RunFolder, TrainedRun, identity_sha256, run_name, trained_runs
from convexlm.sweep import decode_stage, read_instruction
from convexlm.testsets import TestSet, load_test_set

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from convexlm.recipe import Arm, Recipe

Train = Callable[[dict[str, Any], str], dict[str, Any]]  # options and a name -> as `train_model` returns


def run_recipe(recipe: Recipe, run_dir: str | Path) -> dict[str, Any]:
    """Run every stage that is not done yet.

    Returns:
        `run_dir`, `recipe`, `seconds`, `report`, `scores` (the file), and `table` (see `evaluation`).

    Raises:
        UserError: the folder is another recipe's or in use, a file that the recipe names cannot be used, a library
            for its decoding is missing, or a test set's sources and references do not fit together.
    """
    from convexlm.decoding.backends import get_backend
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
    # First of all, so that a wrong path is told before hours of training, and before it is in the folder's recipe.
    if not folder.check(recipe):
        check_files(recipe)
        if (backend := recipe.decode.get("backend", "hf")) != "auto":
            get_backend(backend)().check_installed()
    recipe = folder.continued(recipe)
    test_sets, validation_sets = load_test_sets(recipe), load_validation_sets(recipe)
    check_apart(test_sets, validation_sets)
    with folder.lock():
        folder.claim(recipe)
        note(f"[1/5] data  {_prepare_data(recipe, folder)}")
        _write_references(folder, [*test_sets, *validation_sets])
        runs = trained_runs(recipe)
        with _trainer(recipe) as train:
            for number, run in enumerate(runs, start=1):
                _train(recipe, folder, run, f"[2/5] train {run.name} ({number} of {len(runs)})", train)
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


def load_test_sets(recipe: Recipe) -> list[TestSet]:
    """Every (test set, pair) of a recipe, paths relative to the current folder.

    Raises:
        UserError: as `load_test_set`, or there are no references to score against.
    """
    return _load_sets(recipe.test_sets)


def load_validation_sets(recipe: Recipe) -> list[TestSet]:
    """Every (validation set, pair) of a recipe, as `load_test_sets` reads test sets."""
    return _load_sets(recipe.validation_sets)


def _load_sets(specs: Sequence[dict[str, Any]]) -> list[TestSet]:
    sets = [load_test_set(spec, pair, Path.cwd()) for spec in specs for pair in spec["pairs"]]
    for one in sets:
        if not one.references:
            raise UserError(f"test set `{one.name}`, {one.pair}: there are no `references` to score against")
    return sets


def check_apart(test_sets: Sequence[TestSet], validation_sets: Sequence[TestSet]) -> None:
    """See that no validation set is a test set under another name.

    Raises:
        UserError: more than half of a validation set's sentence pairs are those of a test set.
    """
    for test in test_sets:
        seen = set(zip(test.sources, test.references[0], strict=True))
        for one in (one for one in validation_sets if one.pair == test.pair):
            shared = sum(pair in seen for pair in zip(one.sources, one.references[0], strict=True))
            if 2 * shared > len(one.sources):
                raise UserError(
                    f"validation set `{one.name}`, {one.pair}: {shared} of its {len(one.sources)} sentence pairs are "
                    f"in the test set `{test.name}`; name another, or say `selection: test`"
                )


def check_files(recipe: Recipe) -> None:
    """Read the training data and the instruction that a recipe names, and look for its model.

    Raises:
        UserError: a file is missing or empty, a record cannot be used, or there is no model in the model's folder.
    """
    from convexlm.instructions import load_records

    # A stream may be larger than memory: of it the first record has to do.
    limit = 1 if recipe.data.get("streaming") else recipe.data.get("max_records")
    for _, dataset in _datasets(recipe):
        here = isinstance(dataset, str) and Path(dataset).exists()
        if here and (Path(dataset).is_file() or not recipe.data.get("streaming")):
            load_records(dataset, template=recipe.data.get("template", "alpaca"), max_records=limit)
        elif (
            isinstance(dataset, str)
            and not here
            and (Path(dataset).suffix in (".json", ".jsonl", ".gz") or dataset.startswith(("/", "./", "../")))
        ):
            raise UserError(f"data.dataset {dataset}: no such file")
    model = recipe.model.get("model_name_or_path")
    if model and Path(model).exists() and not (Path(model) / "config.json").is_file():
        raise UserError(f"model.model_name_or_path {model}: no model there (config.json is missing)")
    read_instruction(recipe)


# -- data


def _prepare_data(recipe: Recipe, folder: RunFolder) -> str:
    """Write what the recipe generates (a corpus, its tokenizer, a new model's config); says what was done."""
    said = []
    for arm, dataset in _datasets(recipe):
        if isinstance(dataset, dict):
            path = _dataset_file(recipe, folder, arm)
            if path.exists():
                said.append(f"{path.name} (done)")
            else:
                rows = _generate(dataset)
                write_jsonl(path, rows)
                said.append(f"{path.name}: {len(rows)} records")
        else:
            said.append(str(dataset))
    if recipe.model.get("tokenizer") == "tinyworld" and not (folder.data / "tokenizer" / "tokenizer.json").exists():
        _train_tokenizer(recipe, folder)
    if recipe.model.get("config"):
        config_file = folder.data / "model" / "config.json"
        if not config_file.exists():
            write_atomic(config_file, json.dumps(recipe.model["config"], indent=2, sort_keys=True) + "\n")
    return ", ".join(dict.fromkeys(said))


def _write_references(folder: RunFolder, test_sets: list[TestSet]) -> None:
    """Keep what the hypotheses are scored against beside them, for the report and for whoever gets the folder."""
    rows = [{"test_set": t.name, "pair": t.pair, "references": t.references} for t in test_sets]
    text = "".join(map(to_json_line, rows))
    if not folder.references.exists() or folder.references.read_bytes() != text.encode():
        write_atomic(folder.references, text)


def _datasets(recipe: Recipe) -> list[tuple[Arm | None, Any]]:
    return [(None, recipe.data["dataset"]), *((arm, arm.dataset) for arm in recipe.arms if arm.dataset)]


def _dataset_file(recipe: Recipe, folder: RunFolder, arm: Arm | None) -> Path:
    return folder.data / (f"train.{arm.name}.jsonl" if arm else "train.jsonl")


def _dataset_of(recipe: Recipe, folder: RunFolder, arm: Arm) -> str:
    """The file or hub name that an arm is trained on."""
    own = arm.dataset is not None
    dataset = arm.dataset if own else recipe.data["dataset"]
    return str(_dataset_file(recipe, folder, arm if own else None)) if isinstance(dataset, dict) else str(dataset)


def _generate(spec: dict[str, Any]) -> list[dict[str, Any]]:
    from random import Random

    from convexlm.tinyworld import DIRECTIONS, records, sample_corpus

    known = {"kind", "directions", "size", "seed", "noise"}
    if spec.get("kind") != "tinyworld" or set(spec) - known:
        raise UserError(
            f"data.dataset: {spec} is not understood; generated data is {{kind: tinyworld, {sorted(known)}}}"
        )
    directions = spec.get("directions", ["en-de"])
    for direction in directions:
        if direction not in DIRECTIONS:
            raise UserError(f"data.dataset: tinyworld has no direction {direction}; it has: {', '.join(DIRECTIONS)}")
    size, seed, noise = spec.get("size", 20000), spec.get("seed", 1), spec.get("noise", 0.0)
    try:
        rows = [
            record
            for direction in directions
            for record in records(sample_corpus(direction, size // len(directions), seed, noise), direction)
        ]
    except (ValueError, TypeError) as error:
        raise UserError(f"data.dataset: {error}") from None
    Random(seed).shuffle(rows)
    return rows


def _train_tokenizer(recipe: Recipe, folder: RunFolder) -> None:
    from convexlm.files import read_jsonl
    from convexlm.tinyworld.tokenizer import train_tokenizer

    path = _dataset_file(recipe, folder, None)
    if not path.exists():
        raise UserError(
            "model.tokenizer: `tinyworld` is trained on a generated corpus; give data.dataset {kind: tinyworld}"
        )
    texts = [text for row in read_jsonl(path) for text in (row["input"], row["output"])]
    tokenizer = train_tokenizer(texts, template=recipe.data.get("template", "alpaca"))
    staging = folder.data / ".tokenizer"
    tokenizer.save_pretrained(staging)
    staging.rename(folder.data / "tokenizer")


# -- train


def train_options(recipe: Recipe, folder: RunFolder, run: TrainedRun) -> dict[str, Any]:
    """The options of `convexlm train` for one arm and seed; relative paths are relative to the current folder."""
    arm = recipe.arm(run.arm)
    options = {key: value for key, value in recipe.model.items() if key not in ("config", "tokenizer")}
    options.update({key: recipe.data[key] for key in sorted(DATA_OPTIONS) if key in recipe.data})
    options["dataset"] = _dataset_of(recipe, folder, arm)
    tokenizer = recipe.model.get("tokenizer")
    if tokenizer:
        options["tokenizer_name"] = str(folder.data / "tokenizer") if tokenizer == "tinyworld" else tokenizer
    if arm.init_from:
        start = TrainedRun(arm.init_from, run.seed, run_name(recipe, arm.init_from, run.seed))
        options["model_name_or_path"] = _last_checkpoint(folder, start)
    elif recipe.model.get("config"):
        options["config_name"] = str(folder.data / "model")
    options.update(arm.train)
    if total := options.pop("global_batch_size", None):
        options["gradient_accumulation_steps"] = accumulation_steps(total, options, run.arm, world_size(recipe))
    options.update(output_dir=str(folder.train(run)), seed=run.seed)
    options.setdefault("report_to", "none")
    return options


def accumulation_steps(global_batch_size: int, options: dict[str, Any], arm: str, processes: int) -> int:
    """The gradient accumulation that makes up a global batch on so many processes.

    Raises:
        UserError: the global batch is no multiple of what all processes take at once.
    """
    if "gradient_accumulation_steps" in options:
        raise UserError(f"arm `{arm}`: give `global_batch_size` or `gradient_accumulation_steps`, not both")
    at_once = int(options.get("per_device_train_batch_size", 8)) * processes
    if not is_whole(global_batch_size, 1) or global_batch_size % at_once:
        raise UserError(
            f"arm `{arm}`: global_batch_size {global_batch_size!r} is no multiple of per_device_train_batch_size x "
            f"processes = {at_once}"
        )
    return global_batch_size // at_once


def _last_checkpoint(folder: RunFolder, run: TrainedRun) -> str:
    done = folder.train(run) / DONE_FILE
    if not done.exists():  # in a dry run
        return str(folder.train(run) / "checkpoint-LAST")
    return str(folder.train(run) / json.loads(done.read_text(encoding="utf-8"))["checkpoints"][-1])


def _train(recipe: Recipe, folder: RunFolder, run: TrainedRun, title: str, train: Train) -> None:
    options = train_options(recipe, folder, run)
    done = folder.train(run) / DONE_FILE
    identity = _training_identity(options, folder)
    if done.exists():
        if json.loads(done.read_text(encoding="utf-8"))["identity"] != identity:
            raise UserError(f"{done.parent}: trained on other data or from another model; choose another --run_dir")
        note(f"{title}: done")
        return
    note(title)
    result = train(options, run.name)
    if not result["checkpoints"]:
        raise UserError(f"{run.name}: training left no checkpoint; `save_strategy: no` cannot be used in a recipe")
    kept = {key: result[key] for key in ("checkpoints", "steps", "records", "dropped", "truncated", "seconds")}
    write_atomic(done, json.dumps({"identity": identity, **kept}, indent=2) + "\n")
    gc.collect()


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


def _training_identity(options: dict[str, Any], folder: RunFolder) -> str:
    """The hash of options and of the local files behind them; the run folder itself may be moved."""
    root = str(folder.path)

    def movable(text: str) -> str:
        return "RUN" + text.removeprefix(root) if text == root or text.startswith(root + os.sep) else text

    # How many processes share a global batch is no part of it: a run may be decoded on another machine.
    plain = {key: movable(str(value)) for key, value in options.items() if key != "gradient_accumulation_steps"}
    for key in ("dataset", "eval_dataset"):
        if options.get(key) and Path(options[key]).is_file():
            plain[key] = file_sha256(options[key])
    return json_sha256(plain)


# -- report


def _report(folder: RunFolder) -> None:
    """Write the report; one that says the same already is left as it is."""
    from convexlm.report import write_report

    fresh = write_report(folder.path, folder.path / ".report.html")
    if folder.report.exists() and folder.report.read_bytes() == fresh.read_bytes():
        fresh.unlink()
    else:
        fresh.replace(folder.report)


def world_size(recipe: Recipe | None = None) -> int:
    """How many processes train together: as a launcher has told this one, or as the recipe's launch will start."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 or recipe is None or not recipe.launch:
        return started
    return recipe.launch.processes
