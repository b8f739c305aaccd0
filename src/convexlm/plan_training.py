"""What one training run would take: steps, tokens, memory, disk. Nothing is loaded, and no hub is asked."""

from __future__ import annotations

import contextlib
import math
import os
from typing import TYPE_CHECKING, Any

from convexlm.allocator import jemalloc_is_preloaded
from convexlm.launch.sharding import sharding_here, sharding_of_file
from convexlm.memory import gigabytes
from convexlm.pipeline import world_size
from convexlm.plan_checks import check_start
from convexlm.plan_data import Data, Rows, count_records, rows_of_epoch, tokenize_sample
from convexlm.plan_memory import plan_disk, plan_memory, planned_model
from convexlm.training_model import check_model_options

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rich.console import Console

    from convexlm.config import ConvexConfig

__all__ = [
    "checkpoint_steps",
    "describe_steps",
    "plan_lines",
    "plan_training",
    "saved_steps",
    "sharding_here",
    "sharding_of_file",
    "show_training_plan",
    "steps_of_epoch",
]

SHOWN_OPTIONS = (
    *("objective", "k", "level", "length_weighting", "mle_mix", "k_warmup", "learning_rate", "lr_scheduler_type"),
    *("warmup_ratio", "warmup_steps", "weight_decay", "max_length", "packing", "bf16", "fp16", "use_peft"),
)


def plan_training(
    values: Mapping[str, Any],
    *,
    processes: int | None = None,
    sharding: str | None = None,
    data: Data | None = None,
    config: Any = None,
    resume: bool = False,
) -> dict[str, Any]:
    """What `convexlm train` with these options would do.

    Args:
        values: option names and values of `convexlm train`.
        processes: how many train together; what the launcher says, if None.
        sharding: one of `memory.SHARDINGS`, or in words another one; what the launcher says, if None.
        data: what is known of the data; read from `values["dataset"]` if None.
        config: the model's config, if it is not to be found by the options.
        resume: it goes on from a checkpoint in the output folder, if one is there.

    Returns:
        `start`, `dataset`, `template`, `records`, `records_from`, `epochs`, `global_batch`, `batch`, `steps` (None
        where a sample alone says that records are dropped, or how they are packed), `steps_about` (by a sample),
        `tokens` (None, or of a sample: records, those dropped, mean, longest, targets, and in all),
        `checkpoints`, `memory` (None, or as `MemoryEstimate.as_dict`, with `length`, `config_from`), `memory_note`,
        `disk`, `options`, `output_dir`.

    Raises:
        UserError: as training would, for whatever can be told without weights.
    """
    from convexlm.launch.precision import choose_precision
    from convexlm.training_checks import check_numbers
    from convexlm.verbs.train import build_options

    processes = processes or world_size()
    sharding = sharding or sharding_here(processes)
    with _alone():
        made = build_options({**values, "use_cpu": True, "bf16": False, "fp16": False})
        if not sharding.startswith("zero"):  # DeepSpeed keeps weights in float32 itself
            choose_precision(values)
    options, model_options, train_config = made
    check_numbers(train_config)
    check_model_options(model_options, options)
    eval_dataset = options.eval_dataset if data is None else None  # a recipe's was read with the others
    data = data or count_records(options.dataset, options.template, options.max_records)
    if eval_dataset:
        count_records(eval_dataset, options.template)
    source = options.tokenizer_name or model_options.model_name_or_path or options.config_name
    sample = tokenize_sample(data, source, options.template, options.add_bos, train_config.max_length)
    planned = planned_model(values, config, sample)
    check_start(values, made, planned, sample, sharding=sharding, resume=resume)
    rows = rows_of_epoch(data, sample, train_config)
    if options.streaming:  # it has no end
        rows = Rows(None, tokens=rows.tokens)
    # That none of a sample is dropped is taken for all of them.
    likely = rows.count if not rows.about or (sample and not sample.dropped and not train_config.packing) else None
    if likely is not None and data.records is not None:
        kept = data.records if sample is None else sample.kept_of(data.records)
        check_batches(train_config, likely, kept, processes)
    epoch = None if likely is None else steps_of_epoch(train_config, likely, processes)
    steps = train_config.max_steps if train_config.max_steps > 0 else None
    about = None
    if steps is None and rows.count is not None:
        estimate = math.ceil(train_config.num_train_epochs * steps_of_epoch(train_config, rows.count, processes))
        steps, about = None if epoch is None else estimate, estimate if rows.about else None
    per_step = train_config.per_device_train_batch_size * train_config.gradient_accumulation_steps * processes
    tokens = sample.as_dict() if sample else None
    if tokens:
        tokens["in_all"] = _tokens_in_all(train_config, rows, per_step)
    memory, why = plan_memory(values, planned, model_options, train_config, processes, sharding, sample)
    checkpoints = checkpoint_steps(train_config, steps, epoch)
    return {
        "start": values.get("model_name_or_path") or "a new model",
        "dataset": values["dataset"],
        "template": options.template,
        "records": data.records,
        "records_from": data.source,
        "epochs": None if train_config.max_steps > 0 else train_config.num_train_epochs,
        "global_batch": per_step,
        "batch": f"{train_config.per_device_train_batch_size} x {train_config.gradient_accumulation_steps} "
        f"accumulated x {processes} processes",
        "steps": steps,
        "steps_about": about,
        "tokens": tokens,
        "save_strategy": str(getattr(train_config.save_strategy, "value", train_config.save_strategy)),
        "checkpoints": checkpoints,
        "memory": memory,
        "memory_note": why,
        "return_freed_memory": train_config.return_freed_memory,
        "jemalloc": jemalloc_is_preloaded(),
        "disk": plan_disk(memory, train_config, checkpoints, saved_steps(train_config, steps, epoch)),
        "options": {key: values[key] for key in SHOWN_OPTIONS if values.get(key) is not None},
        "output_dir": str(values.get("output_dir") or ""),
    }


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hide the launcher's variables: training options would else go and look for the other processes."""
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") or name.startswith("ACCELERATE_")
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


# -- steps


def steps_of_epoch(config: ConvexConfig, records: int, processes: int | None = None) -> int:
    """Optimizer steps of one pass over so many records, as transformers' Trainer counts them."""
    per_batch = config.per_device_train_batch_size * (processes or world_size())
    batches = records // per_batch if config.dataloader_drop_last else math.ceil(records / per_batch)
    return max(1, math.ceil(batches / config.gradient_accumulation_steps))


def check_batches(config: ConvexConfig, rows: int, records: int, processes: int) -> None:
    """See that the rows of so many records make a batch, as `training_checks.check_loader` will of the loader.

    Raises:
        UserError: they make none.
    """
    from convexlm.training_checks import refuse_no_batch

    if config.dataloader_drop_last and rows < config.per_device_train_batch_size * processes:
        refuse_no_batch(records, config.per_device_train_batch_size, processes)


def _tokens_in_all(config: ConvexConfig, rows: Rows, per_step: int) -> int | None:
    """Tokens of all rows that training will go through; None if that is not known."""
    if rows.tokens is None:
        return None
    if config.max_steps > 0:
        return round(config.max_steps * per_step * rows.tokens)
    return None if rows.count is None else round(rows.tokens * rows.count * config.num_train_epochs)


def saved_steps(config: ConvexConfig, steps: int | None, epoch: int | None) -> list[int]:
    """The steps at which training saves; empty if they are not known, or it does not."""
    strategy = getattr(config.save_strategy, "value", config.save_strategy)
    every = epoch
    if strategy == "steps" and steps:
        every = int(config.save_steps) if config.save_steps >= 1 else math.ceil(config.save_steps * steps)
        every = every if every > 0 else steps  # 0 and below: at the end alone
    if not steps or not every or strategy not in ("steps", "epoch"):
        return []
    return [*range(every, steps, every), steps]


def checkpoint_steps(config: ConvexConfig, steps: int | None, epoch: int | None) -> list[int]:
    """The steps at which training saves and that are kept; empty if they are not known.

    Args:
        config: the training options.
        steps: all steps; None if not known.
        epoch: the steps of an epoch; None if not known.
    """
    saved = saved_steps(config, steps, epoch)
    limit = config.save_total_limit or 0
    return saved[-limit:] if limit > 0 else saved  # 0 and below is no limit, as in `checkpoints.rotate`


# -- for people


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """The plan of one training run in lines of text."""
    records = "records not counted" if plan["records"] is None else f"{plan['records']:,} records"
    steps = "steps not known yet" if plan["steps"] is None else f"{plan['steps']:,} steps"
    if plan["steps_about"]:
        steps = f"about {plan['steps_about']:,} steps"
    epochs = f", {plan['epochs']:g} epochs" if plan["epochs"] else ""
    lines = [
        f"data     {plan['dataset']}: {records} ({plan['records_from']})",
        f"prompts  template {plan['template']}",
        f"steps    {steps}{epochs}, global batch {plan['global_batch']} = {plan['batch']}",
    ]
    if tokens := plan["tokens"]:
        about = "" if tokens["sampled"] == plan["records"] else "about "
        in_all = f"{about}{tokens['in_all']:,} tokens in all; " if tokens["in_all"] else ""
        dropped = f" ({tokens['dropped']} of them dropped, too long)" if tokens["dropped"] else ""
        lines.append(
            f"tokens   {in_all}{tokens['sampled']} records sampled{dropped}: {tokens['mean']:.1f} each, longest "
            f"{tokens['longest']}, {tokens['targets']:.0%} are targets"
        )
    returned = plan["return_freed_memory"] or plan["jemalloc"]
    lines += _memory_lines(plan["memory"], plan["memory_note"], returned=returned)
    saves = f"saves    {_saves(plan)}"
    if disk := plan["disk"]:
        saves += f"; {gigabytes(disk['checkpoint'])} each, at most {gigabytes(disk['most'])}"
    lines.append(saves)
    lines.append("options  " + ", ".join(f"{key}={value}" for key, value in plan["options"].items()))
    return lines


def _memory_lines(memory: Mapping[str, Any] | None, why: str | None, *, returned: bool) -> list[str]:
    if memory is None:
        return [f"memory   not known: {why}"]
    several = memory["processes"] > 1
    trained = "" if memory["trainable"] == memory["parameters"] else f", {memory['trainable']:,} of them trained"
    where = f"{memory['device_is']}, {memory['precision']}"
    shared = f", {memory['sharding']} over {memory['processes']}" if several or memory["sharding"] != "none" else ""
    parts = [
        ("weights", memory["weights"]),
        ("gradients", memory["gradients"]),
        ("optimizer", memory["optimizer"]),
        ("activations", memory["activations"]),
        (f"head chunk of {memory['head_tokens']} tokens", memory["head"]),
        ("gathered", memory["gathered"]),
        ("buckets", memory["buckets"]),
        ("framework", memory["framework"]),
    ]
    shown = ", ".join(f"{name} {gigabytes(count)}" for name, count in parts if count)
    each = " a process" if memory["device"] == "cpu" else " a device"
    lines = [
        f"model    {memory['parameters']:,} parameters{trained} (by {memory['config_from']})",
        f"memory   about {gigabytes(memory['total'])}{each * several} at its peak, on {where}{shared}; "
        f"batch {memory['rows']} x {memory['length']} tokens",
        f"         {shown} (not all at the same time)",
    ]
    if memory["device"] == "cpu" and not returned:
        lines.append(
            "         where glibc keeps what is freed, 10 to 80 % more; jemalloc preloaded ends that "
            "(docs/training.md), and --return_freed_memory true, which is slower"
        )
    if memory["host"]:
        lines.append(f"         and {gigabytes(memory['host'])} of the host's memory a process, for what is offloaded")
    return [*lines, *(f"         {note}" for note in memory["notes"])]


def _saves(plan: Mapping[str, Any]) -> str:
    if plan["save_strategy"] == "no":
        return "nothing (--save_strategy no)"
    if plan["save_strategy"] == "best":
        return f"a checkpoint at each evaluation that is the best so far, in {plan['output_dir']}"
    return f"{describe_steps(plan['checkpoints'])} in {plan['output_dir']}"


def describe_steps(steps: list[int]) -> str:
    """Checkpoints in words, long lists cut in the middle."""
    if not steps:
        return "checkpoints"
    shown = [str(step) for step in steps]
    return "checkpoints " + ", ".join(shown if len(shown) <= 14 else [*shown[:6], "...", shown[-1]])


def show_training_plan(plan: Mapping[str, Any], console: Console) -> None:
    """Print the plan of one training run for people."""
    console.print("dry run: nothing is loaded or written", markup=False)
    console.print(f"start    {plan['start']}", soft_wrap=True, markup=False)
    for line in plan_lines(plan):
        console.print(line, soft_wrap=True, markup=False)
