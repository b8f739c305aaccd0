"""`convexlm run --dry_run`: what a recipe would do, stage by stage, without loading a model or writing a file."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.pipeline import check_files, train_options, world_size
from convexlm.runs import RunFolder, trained_runs
from convexlm.testsets import NotAtHandError, load_test_set

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from convexlm.config import ConvexConfig
    from convexlm.recipe import Recipe

SHOWN_OPTIONS = (
    *("objective", "k", "level", "length_weighting", "mle_mix", "k_warmup", "learning_rate", "lr_scheduler_type"),
    *("warmup_ratio", "warmup_steps", "weight_decay", "max_length", "packing", "bf16", "fp16", "use_peft"),
)


def make_plan(recipe: Recipe, run_dir: str | Path) -> dict[str, Any]:
    """Every stage with its steps, files and settings, after checking all that can be checked without weights.

    Returns:
        `recipe`, `run_dir`, `train` (a run each: options, records, steps, checkpoints), `selection`, `decode` (a
        file each; `checkpoint-SELECTED` stands for what validation will choose), `score`, `outputs`.

    Raises:
        UserError: as running the recipe would, for whatever is wrong before training begins.
    """
    from convexlm.decoding import Search

    folder = RunFolder(Path(run_dir))
    check_files(recipe)
    folder.check(recipe)
    runs = trained_runs(recipe)
    trains = [_plan_training(recipe, folder, run) for run in runs]
    return {
        "recipe": recipe.name,
        "run_dir": str(folder.path),
        "processes": world_size(),
        "train": trains,
        "searches": {search.name: search.settings() for search in map(Search.from_mapping, recipe.decode["searches"])},
        "selection": dict(recipe.selection),
        "decode": _plan_decoding(recipe, folder, runs, trains),
        "score": {"metrics": list(recipe.metrics), **recipe.compare},
        "outputs": [str(folder.scores), str(folder.comparison), str(folder.report)],
    }


def _plan_training(recipe: Recipe, folder: RunFolder, run: Any) -> dict[str, Any]:
    from convexlm.verbs.train import build_options

    arm = recipe.arm(run.arm)
    options = train_options(recipe, folder, run)
    with _alone():
        _, _, config = build_options({**options, "use_cpu": True, "bf16": False, "fp16": False})
    records, how = _count_records(recipe, arm)
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size()
    epoch = None if records is None or config.packing else steps_of_epoch(config, records)
    steps = config.max_steps if config.max_steps > 0 else None
    if steps is None and epoch is not None:
        steps = math.ceil(config.num_train_epochs * epoch)
    return {
        "run": run.name,
        "seed": run.seed,
        "start": options.get("model_name_or_path") or "a new model",
        "dataset": options["dataset"],
        "template": options.get("template", "alpaca"),
        "records": records,
        "records_from": how,
        "epochs": None if config.max_steps > 0 else config.num_train_epochs,
        "global_batch": per_step,
        "batch": f"{config.per_device_train_batch_size} x {config.gradient_accumulation_steps} accumulated "
        f"x {world_size()} processes",
        "steps": steps,
        "checkpoints": checkpoint_steps(config, steps, epoch),
        "options": {key: options[key] for key in SHOWN_OPTIONS if options.get(key) is not None},
        "output_dir": str(folder.train(run)),
    }


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hide the launcher's variables: training options would else go and look for the other processes."""
    names = [name for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in os.environ]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _count_records(recipe: Recipe, arm: Any) -> tuple[int | None, str]:
    from convexlm.instructions import load_records

    dataset = arm.dataset or recipe.data["dataset"]
    limit = recipe.data.get("max_records")
    if isinstance(dataset, dict):
        directions = len(dataset.get("directions", ["en-de"]))
        size = int(dataset.get("size", 20000)) // directions * directions
        return (min(size, limit) if limit else size), "generated"
    if Path(dataset).exists():
        records = load_records(dataset, template=recipe.data.get("template", "alpaca"), max_records=limit)
        return len(records), "counted; those whose prompt fills max_length will be dropped"
    known = recipe.data.get("num_records")
    if known is None:
        return limit, "the hub was not asked"
    return (min(known, limit) if limit else known), "as the recipe says (`data.num_records`)"


def steps_of_epoch(config: ConvexConfig, records: int) -> int:
    """Optimizer steps of one pass over so many records, as transformers' Trainer counts them."""
    per_batch = config.per_device_train_batch_size * world_size()
    batches = records // per_batch if config.dataloader_drop_last else math.ceil(records / per_batch)
    return max(1, math.ceil(batches / config.gradient_accumulation_steps))


def checkpoint_steps(config: ConvexConfig, steps: int | None, epoch: int | None) -> list[int]:
    """The steps at which training saves and that are kept; empty if they are not known.

    Args:
        config: the training options.
        steps: all steps; None if not known.
        epoch: the steps of an epoch; None if not known.
    """
    strategy = getattr(config.save_strategy, "value", config.save_strategy)
    every = epoch
    if strategy == "steps" and steps:
        every = int(config.save_steps) if config.save_steps >= 1 else math.ceil(config.save_steps * steps)
    if not steps or not every or strategy not in ("steps", "epoch"):
        return []
    saved = [*range(every, steps, every), steps]
    return saved[-config.save_total_limit :] if config.save_total_limit else saved


def _plan_decoding(recipe: Recipe, folder: RunFolder, runs: Any, trains: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from convexlm.decoding import Search

    test_sets, validation_sets = _set_sizes(recipe.test_sets), _set_sizes(recipe.validation_sets)
    searches = [Search.from_mapping(options).name for options in recipe.decode["searches"]]
    validating = recipe.selection["on"] == "validation"
    planned: list[dict[str, Any]] = []

    def plan(run: Any, step: Any, sets: list[tuple[str, str, int | None]], names: list[str], role: str) -> None:
        for name, pair, size in sets:
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


def _set_sizes(specs: Sequence[dict[str, Any]]) -> list[tuple[str, str, int | None]]:
    """Name, pair and sentences of every test set; None for one that sacreBLEU would first have to download."""
    sizes: list[tuple[str, str, int | None]] = []
    for spec in specs:
        for pair in spec["pairs"]:
            try:
                test_set = load_test_set(spec, pair, Path.cwd())
            except NotAtHandError:
                sizes.append((spec["name"], pair, None))
            else:
                sizes.append((test_set.name, pair, len(test_set.sources)))
    return sizes


def show_plan(plan: dict[str, Any], console: Console) -> None:
    """Print a plan for people."""
    from rich.markup import escape

    def line(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    run_dir = escape(plan["run_dir"])
    console.print(f"[bold]{plan['recipe']}[/bold] -> {run_dir}  (dry run: nothing is loaded or written)\n")
    for train in plan["train"]:
        records = "records not counted" if train["records"] is None else f"{train['records']:,} records"
        steps = "steps not known yet" if train["steps"] is None else f"{train['steps']:,} steps"
        epochs = f", {train['epochs']:g} epochs" if train["epochs"] else ""
        console.print(f"[bold]train {train['run']}[/bold]  seed {train['seed']}, from {escape(train['start'])}")
        line(f"  data     {train['dataset']}: {records} ({train['records_from']})")
        line(f"  prompts  template {train['template']}")
        line(f"  steps    {steps}{epochs}, global batch {train['global_batch']} = {train['batch']}")
        line(f"  saves    {_steps(train['checkpoints'])} in {train['output_dir']}")
        line("  options  " + ", ".join(f"{key}={value}" for key, value in train["options"].items()))
    console.print("[bold]decode[/bold]")
    for name, settings in plan["searches"].items():
        line("  " + name.ljust(8) + " " + ", ".join(f"{key}={value}" for key, value in settings.items()))
    selection = plan["selection"]
    if selection["on"] == "last":
        line("  compared at the last checkpoint")
    else:
        by = f"the best {selection['metric']} with {selection['search']} search"
        sets = "the validation sets" if selection["on"] == "validation" else "the TEST sets themselves"
        line(f"  compared at the checkpoint with {by} on {sets}")
    for job in plan["decode"]:
        size = f"{job['sentences']:>6,} sentences" if job["sentences"] is not None else "to be downloaded"
        line(f"  {size} -> {job['file']}")
    compare = ", ".join(f"{key}={value}" for key, value in plan["score"].items() if key != "metrics")
    line(f"score    {', '.join(plan['score']['metrics'])}; compare: {compare}")
    line(f"outputs  {', '.join(plan['outputs'])}")


def _steps(steps: list[int]) -> str:
    if not steps:
        return "checkpoints"
    shown = [str(step) for step in steps]
    return "checkpoints " + ", ".join(shown if len(shown) <= 14 else [*shown[:6], "...", shown[-1]])
