"""`convexlm run --dry_run`: what a recipe would do, stage by stage, without loading a model or writing a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.dataset_names import dataset_path
from convexlm.errors import UserError
from convexlm.memory import gigabytes
from convexlm.pipeline import train_options, world_size
from convexlm.plan_data import Data, count_records
from convexlm.plan_training import (
    checkpoint_steps,
    describe_steps,
    plan_lines,
    plan_training,
    sharding_here,
    sharding_of_file,
    steps_of_epoch,
)
from convexlm.preflight import (
    check_apart,
    check_decoding,
    check_files,
    check_trainings,
    load_scored_set,
)
from convexlm.runs import RunFolder, trained_runs
from convexlm.spelled_config import spelled_config
from convexlm.testsets import NotAtHandError, name_in_files

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from convexlm.recipe import Recipe
    from convexlm.testsets import TestSet

TINYWORLD_VOCABULARY = 2048  # at most: `train_tokenizer` stops where the corpus has no more to merge

__all__ = ["checkpoint_steps", "describe_steps", "make_plan", "show_plan", "steps_of_epoch"]


def make_plan(recipe: Recipe, run_dir: str | Path) -> dict[str, Any]:
    """Every stage with its steps, files and settings, after checking all that can be checked without weights.

    Returns:
        `recipe`, `run_dir`, `train` (a run each: what `plan_training` says of it), `selection`, `decode` (a
        file each; `checkpoint-SELECTED` stands for what validation will choose), `decode_jobs`, `decode_sentences`
        (None where a test set is still to be downloaded), `disk` (bytes of all checkpoints), `score`, `outputs`.

    Raises:
        UserError: as running the recipe would, for whatever is wrong before training begins.
    """
    from convexlm.decoding import Search

    folder = RunFolder(Path(run_dir))
    counted = check_files(recipe)
    folder.check(recipe)
    recipe = folder.continued(recipe)
    runs = trained_runs(recipe)
    processes, sharding = _launch(recipe)
    trainings = [(run, train_options(recipe, folder, run)) for run in runs]
    check_trainings(recipe, trainings, counted, processes, here=False)
    check_decoding(recipe, here=False)
    found: dict[str, Data] = {}
    trains = [_plan_arm(recipe, folder, run, processes, sharding, found) for run in runs]
    decode = _plan_decoding(recipe, folder, runs, trains)
    sizes = [job["sentences"] for job in decode]
    return {
        "recipe": recipe.name,
        "run_dir": str(folder.path),
        "processes": processes,
        "train": trains,
        "searches": {search.name: search.settings() for search in map(Search.from_mapping, recipe.decode["searches"])},
        "selection": dict(recipe.selection),
        "decode": decode,
        "decode_jobs": len(decode),
        "decode_sentences": None if None in sizes else sum(sizes),
        "disk": _disk(trains),
        "score": {"metrics": list(recipe.metrics), **recipe.compare},
        "outputs": [str(folder.scores), str(folder.comparison), str(folder.report)],
    }


def _plan_arm(
    recipe: Recipe, folder: RunFolder, run: Any, processes: int, sharding: str, found: dict[str, Data]
) -> dict[str, Any]:
    arm = recipe.arm(run.arm)
    options = train_options(recipe, folder, run)
    dataset = arm.dataset or recipe.data["dataset"]
    if str(dataset) not in found:
        found[str(dataset)] = _data(recipe, dataset)
    config, origin = _model_config(recipe, folder)
    # A checkpoint that this run will have made is as large as what the first arm starts from.
    ready = {**options, "model_name_or_path": origin} if arm.init_from and origin else options
    try:
        plan = plan_training(
            ready,
            processes=processes,
            sharding=sharding,
            data=found[str(dataset)],
            config=config if config else None,
            resume=True,
        )
    except UserError as error:
        raise UserError(f"arm `{run.arm}`: {error}") from None
    return {"run": run.name, "seed": run.seed, **plan, "start": options.get("model_name_or_path") or "a new model"}


def _launch(recipe: Recipe) -> tuple[int, str]:
    """How many processes will train, and how they divide the model."""
    if world_size() > 1 or not recipe.launch:
        return world_size(), sharding_here(world_size())
    from convexlm.launch.settings import config_file
    from convexlm.options import load_yaml

    settings = recipe.launch.resolved(to_plan=True)
    name = settings.accelerate_config
    return settings.processes, sharding_of_file(load_yaml(config_file(name)) if name else {}, settings.processes)


def _model_config(recipe: Recipe, folder: RunFolder) -> tuple[Any, str | None]:
    """The config of a model that the recipe spells out; else None, and the name of the model it starts from."""
    config = spelled_config(recipe)
    if config is None:
        return None, recipe.model.get("model_name_or_path")
    tokenizer = recipe.model.get("tokenizer")
    if tokenizer == "tinyworld":
        config.vocab_size = TINYWORLD_VOCABULARY
    elif tokenizer and Path(tokenizer).exists():
        from convexlm.tokenization import load_tokenizer

        config.vocab_size = len(load_tokenizer(tokenizer))
    return config, None


def _data(recipe: Recipe, dataset: Any) -> Data:
    limit = recipe.data.get("max_records")
    if isinstance(dataset, dict):
        directions = len(dataset.get("directions", ["en-de"]))
        size = int(dataset.get("size", 20000)) // directions * directions
        return Data(min(size, limit) if limit else size, "generated")
    if dataset_path(dataset).exists():
        return count_records(dataset, recipe.data.get("template", "alpaca"), limit)
    # What the recipe says is of the dataset that it names there, not of an arm's own.
    known = recipe.data.get("num_records") if dataset == recipe.data.get("dataset") else None
    if known is None:
        return Data(limit, "the hub was not asked")
    return Data(min(known, limit) if limit else known, "as the recipe says (`data.num_records`)")


def _disk(trains: list[dict[str, Any]]) -> int | None:
    """Bytes of all kept checkpoints of all runs; None where one is not known."""
    each = [train["disk"] for train in trains]
    return None if None in each else sum(disk["kept"] for disk in each)


def _plan_decoding(recipe: Recipe, folder: RunFolder, runs: Any, trains: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from convexlm.decoding import Search

    test_sets, validation_sets = _sets(recipe.test_sets), _sets(recipe.validation_sets)
    check_apart(*([one for *_, one in sets if one is not None] for sets in (test_sets, validation_sets)))
    searches = [Search.from_mapping(options).name for options in recipe.decode["searches"]]
    validating = recipe.selection["on"] == "validation"
    planned: list[dict[str, Any]] = []

    def plan(run: Any, step: Any, sets: list[tuple[str, str, TestSet | None]], names: list[str], role: str) -> None:
        for name, pair, test_set in sets:
            size = None if test_set is None else len(test_set.sources)
            for search in names:
                path = folder.decode(run, f"checkpoint-{step}", name, pair, search)
                planned.append({"file": str(path), "search": search, "sentences": size, "role": role})

    for run, train in zip(runs, trains, strict=True):
        if not recipe.arm(run.arm).decode:
            continue
        wanted = recipe.decode["checkpoints"]
        steps = train["checkpoints"] or ["LAST"]
        if wanted == "last":
            steps = steps[-1:]
        elif wanted != "all":
            if missing := [step for step in wanted if train["checkpoints"] and step not in steps]:
                raise UserError(f"decode.checkpoints: {run.name} will have no checkpoint at step {missing[0]}")
            steps = wanted
        for step in steps:
            if validating:
                plan(run, step, validation_sets, [recipe.selection["search"]], "validation")
            else:
                plan(run, step, test_sets, searches, "test")
        if validating:
            plan(run, "SELECTED", test_sets, searches, "test")
    return planned


def _sets(specs: Sequence[dict[str, Any]]) -> list[tuple[str, str, TestSet | None]]:
    """Name, pair and content of every test set; None for one that sacreBLEU would first have to download."""
    found: list[tuple[str, str, TestSet | None]] = []
    for spec in specs:
        for pair in spec["pairs"]:
            try:
                test_set = load_scored_set(spec, pair)
            except NotAtHandError:
                found.append((name_in_files(spec["name"]), pair, None))
            else:
                found.append((test_set.name, pair, test_set))
    return found


def show_plan(plan: dict[str, Any], console: Console) -> None:
    """Print a plan for people."""
    from rich.markup import escape

    def line(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    run_dir = escape(plan["run_dir"])
    console.print(f"[bold]{plan['recipe']}[/bold] -> {run_dir}  (dry run: nothing is loaded or written)\n")
    for train in plan["train"]:
        console.print(f"[bold]train {train['run']}[/bold]  seed {train['seed']}, from {escape(train['start'])}")
        for text in plan_lines(train):
            line("  " + text)
    if plan["disk"] is not None:
        line(f"disk     {gigabytes(plan['disk'])} of checkpoints when all runs are trained")
    sentences = "" if plan["decode_sentences"] is None else f", {plan['decode_sentences']:,} sentences"
    console.print(f"[bold]decode[/bold]  {plan['decode_jobs']} jobs{sentences}")
    for name, settings in plan["searches"].items():
        line("  " + name.ljust(8) + " " + ", ".join(f"{key}={value}" for key, value in settings.items()))
    selection = plan["selection"]
    if selection["on"] == "last":
        line("  compared at the last checkpoint")
    else:
        by = f"the best {selection['metric']} with {selection['search']} search"
        sets = "the validation sets" if selection["on"] == "validation" else "the TEST sets themselves"
        line(f"  compared at the checkpoint with {by} on {sets}")
    for text in _decode_lines(plan["decode"]):
        line("  " + text)
    compare = ", ".join(f"{key}={value}" for key, value in plan["score"].items() if key != "metrics")
    line(f"score    {', '.join(plan['score']['metrics'])}; compare: {compare}")
    line(f"outputs  {', '.join(plan['outputs'])}")


def _decode_lines(jobs: Sequence[dict[str, Any]]) -> list[str]:
    """A line a checkpoint: how much is decoded with it, its folder, and the files there."""
    by_folder: dict[Path, list[dict[str, Any]]] = {}
    for job in jobs:
        by_folder.setdefault(Path(job["file"]).parent, []).append(job)
    lines = []
    for folder, own in by_folder.items():
        known = [job["sentences"] for job in own if job["sentences"] is not None]
        size = f"{sum(known):>6,} sentences" if len(known) == len(own) else "to be downloaded"
        if known and len(known) < len(own):
            size = f"{sum(known):>6,} sentences and {len(own) - len(known)} sets to be downloaded"
        lines.append(f"{size} -> {folder}/ {', '.join(Path(job['file']).name for job in own)}")
    return lines
