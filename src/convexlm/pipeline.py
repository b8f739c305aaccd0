"""`convexlm run`: the corridor from a recipe to a report. Each stage reads and writes files, and skips what is done.

data -> train -> decode -> score and compare -> report. A stage that was killed goes on where it was; a finished one is
recognised by the hash of its inputs.
"""

from __future__ import annotations

import gc
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.files import file_sha256, json_sha256, to_json_line, write_atomic, write_jsonl
from convexlm.progress import note
from convexlm.recipe import is_whole
from convexlm.runs import RunFolder, TrainedRun, trained_runs
from convexlm.testsets import TestSet, load_test_set

if TYPE_CHECKING:
    from convexlm.recipe import Arm, Recipe

DONE_FILE = "done.json"


def run_recipe(recipe: Recipe, run_dir: str | Path) -> dict[str, Any]:
    """Run every stage that is not done yet.

    Returns:
        `run_dir`, `recipe`, `seconds`, `report`, `scores` (the file), and `table` (see `evaluation`).

    Raises:
        UserError: the folder is another recipe's or in use, a file that the recipe names cannot be used, or a test
            set's sources and references do not fit together.
    """
    from convexlm.evaluation import evaluate

    if world_size() > 1:
        raise UserError(
            "`convexlm run` is one process; under a launcher, train an arm with "
            "`accelerate launch -m convexlm.cli train ...`"
        )
    folder = RunFolder(Path(run_dir))
    begun = time.monotonic()
    # First of all, so that a wrong path is told before hours of training, and before it is in the folder's recipe.
    if not folder.check(recipe):
        check_files(recipe)
    test_sets = load_test_sets(recipe)
    with folder.lock():
        folder.claim(recipe)
        note(f"[1/5] data  {_prepare_data(recipe, folder)}")
        _write_references(folder, test_sets)
        runs = trained_runs(recipe)
        for number, run in enumerate(runs, start=1):
            _train(recipe, folder, run, f"[2/5] train {run.name} ({number} of {len(runs)})")
        _decode(recipe, folder, runs, test_sets)
        note("[4/5] score and compare")
        comparison = evaluate(recipe, folder, runs, test_sets)
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
    test_sets = [load_test_set(spec, pair, Path.cwd()) for spec in recipe.test_sets for pair in spec["pairs"]]
    for test_set in test_sets:
        if not test_set.references:
            raise UserError(f"test set `{test_set.name}`, {test_set.pair}: there are no `references` to score against")
    return test_sets


def check_files(recipe: Recipe) -> None:
    """Read the training data and the instruction that a recipe names, and look for its model.

    Raises:
        UserError: a file is missing or empty, a record cannot be used, or there is no model in the model's folder.
    """
    from convexlm.instructions import load_records

    for _, dataset in _datasets(recipe):
        if isinstance(dataset, str) and Path(dataset).exists():
            load_records(
                dataset, template=recipe.data.get("template", "alpaca"), max_records=recipe.data.get("max_records")
            )
        elif isinstance(dataset, str) and (
            Path(dataset).suffix in (".json", ".jsonl", ".gz") or dataset.startswith(("/", "./", "../"))
        ):
            raise UserError(f"data.dataset {dataset}: no such file")
    model = recipe.model.get("model_name_or_path")
    if model and Path(model).exists() and not (Path(model) / "config.json").is_file():
        raise UserError(f"model.model_name_or_path {model}: no model there (config.json is missing)")
    _instruction(recipe)


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
    options.update(
        {key: recipe.data[key] for key in ("template", "add_bos", "max_records", "eval_dataset") if key in recipe.data}
    )
    options["dataset"] = _dataset_of(recipe, folder, arm)
    tokenizer = recipe.model.get("tokenizer")
    if tokenizer:
        options["tokenizer_name"] = str(folder.data / "tokenizer") if tokenizer == "tinyworld" else tokenizer
    if arm.init_from:
        start = TrainedRun(arm.init_from, run.seed, run.name.replace(run.arm, arm.init_from, 1))
        options["model_name_or_path"] = _last_checkpoint(folder, start)
    elif recipe.model.get("config"):
        options["config_name"] = str(folder.data / "model")
    options.update(arm.train)
    if total := options.pop("global_batch_size", None):
        options["gradient_accumulation_steps"] = accumulation_steps(total, options, run.arm)
    options.update(output_dir=str(folder.train(run)), seed=run.seed)
    options.setdefault("report_to", "none")
    return options


def accumulation_steps(global_batch_size: int, options: dict[str, Any], arm: str) -> int:
    """The gradient accumulation that makes up a global batch on as many processes as there are.

    Raises:
        UserError: the global batch is no multiple of what all processes take at once.
    """
    if "gradient_accumulation_steps" in options:
        raise UserError(f"arm `{arm}`: give `global_batch_size` or `gradient_accumulation_steps`, not both")
    at_once = int(options.get("per_device_train_batch_size", 8)) * world_size()
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


def _train(recipe: Recipe, folder: RunFolder, run: TrainedRun, title: str) -> None:
    options = train_options(recipe, folder, run)
    done = folder.train(run) / DONE_FILE
    identity = _training_identity(options, folder)
    if done.exists():
        if json.loads(done.read_text(encoding="utf-8"))["identity"] != identity:
            raise UserError(f"{done.parent}: trained on other data or from another model; choose another --run_dir")
        note(f"{title}: done")
        return
    from convexlm.training import train_model
    from convexlm.verbs.train import build_options

    note(title)
    data, model_options, config = build_options(options)
    result = train_model(model_options, data, config, resume=True, title=run.name)
    if not result["checkpoints"]:
        raise UserError(f"{run.name}: training left no checkpoint; `save_strategy: no` cannot be used in a recipe")
    kept = {key: result[key] for key in ("checkpoints", "steps", "records", "dropped", "truncated", "seconds")}
    write_atomic(done, json.dumps({"identity": identity, **kept}, indent=2) + "\n")
    gc.collect()


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


# -- decode


def decoded_checkpoints(recipe: Recipe, folder: RunFolder, run: TrainedRun) -> list[Path]:
    """The checkpoints of a run that the recipe decodes.

    Raises:
        UserError: the recipe asks for a step that was not saved.
    """
    done = json.loads((folder.train(run) / DONE_FILE).read_text(encoding="utf-8"))
    names = done["checkpoints"]
    wanted = recipe.decode["checkpoints"]
    if wanted == "last":
        names = names[-1:]
    elif wanted != "all":
        chosen = [f"checkpoint-{step}" for step in wanted]
        if missing := [name for name in chosen if name not in names]:
            raise UserError(f"decode.checkpoints: {run.name} has no {missing[0]}; it has: {', '.join(names)}")
        names = chosen
    return [folder.train(run) / name for name in names]


def _decode(recipe: Recipe, folder: RunFolder, runs: list[TrainedRun], test_sets: list[TestSet]) -> None:
    from convexlm.decoding import DecodeJob, Search, decode_jobs
    from convexlm.decoding.progress import progress_lines
    from convexlm.tokenization import PromptSettings

    searches = [Search.from_mapping(options) for options in recipe.decode["searches"]]
    todo = [
        (run, checkpoint)
        for run in runs
        if recipe.arm(run.arm).decode
        for checkpoint in decoded_checkpoints(recipe, folder, run)
    ]
    for number, (run, checkpoint) in enumerate(todo, start=1):
        settings = PromptSettings.load(checkpoint)
        jobs = [
            DecodeJob(
                test_set=test_set,
                search=search,
                output_file=folder.decode(run, checkpoint.name, test_set.name, test_set.pair, search.name),
                settings=settings,
                instruction=_instruction(recipe),
            )
            for test_set in test_sets
            for search in searches
        ]
        title = f"[3/5] decode {run.name} {checkpoint.name} ({number} of {len(todo)})"
        with progress_lines(title) as progress:
            results = decode_jobs(
                checkpoint,
                jobs,
                backend=recipe.decode.get("backend", "hf"),
                device=recipe.decode.get("device"),
                dtype=recipe.decode.get("dtype"),
                batch_size=recipe.decode.get("batch_size"),
                progress=progress,
            )
        note(f"{title}: {_decoded(results)}")
        gc.collect()


def _decoded(results: list[Any]) -> str:
    fresh = sum(result.num_sentences - result.resumed for result in results)
    if not fresh:
        return "done"
    cut = sum(result.cut for result in results)
    return f"{fresh} sentences" + (f", {cut} cut at max_new_tokens" if cut else "")


def _instruction(recipe: Recipe) -> str | None:
    from convexlm.files import read_text

    if path := recipe.decode.get("instruction_file"):
        text = read_text(path).strip("\r\n")
        if not text.strip():
            raise UserError(f"decode.instruction_file {path}: the file is empty")
        return text
    return recipe.decode.get("instruction")


def _report(folder: RunFolder) -> None:
    """Write the report; one that says the same already is left as it is."""
    from convexlm.report import write_report

    fresh = write_report(folder.path, folder.path / ".report.html")
    if folder.report.exists() and folder.report.read_bytes() == fresh.read_bytes():
        fresh.unlink()
    else:
        fresh.replace(folder.report)


def world_size() -> int:
    """How many processes train together, as launchers tell it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
