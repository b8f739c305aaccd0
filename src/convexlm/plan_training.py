"""What one training run would take: steps, tokens, memory, disk. Nothing is loaded, and no hub is asked."""

from __future__ import annotations

import contextlib
import math
import os
from typing import TYPE_CHECKING, Any

from convexlm.allocator import jemalloc_is_preloaded
from convexlm.errors import UserError
from convexlm.launch.sharding import sharding_here, sharding_of_file
from convexlm.memory import gigabytes
from convexlm.pipeline import world_size
from convexlm.plan_data import Data, count_records, sample_lengths
from convexlm.training_model import check_model_options, peft_config_of

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
LARGE_MODEL = 1_000_000_000  # parameters from which a GPU is meant, though none is here


def plan_training(
    values: Mapping[str, Any],
    *,
    processes: int | None = None,
    sharding: str | None = None,
    data: Data | None = None,
    config: Any = None,
) -> dict[str, Any]:
    """What `convexlm train` with these options would do.

    Args:
        values: option names and values of `convexlm train`.
        processes: how many train together; what the launcher says, if None.
        sharding: one of `memory.SHARDINGS`, or in words another one; what the launcher says, if None.
        data: what is known of the data; read from `values["dataset"]` if None.
        config: the model's config, if it is not to be found by the options.

    Returns:
        `start`, `dataset`, `template`, `records`, `records_from`, `epochs`, `global_batch`, `batch`, `steps`,
        `steps_about` (under packing), `tokens` (None, or of a sample: records, mean, longest, targets, and in all),
        `checkpoints`, `memory` (None, or as `MemoryEstimate.as_dict`, with `length`, `config_from`), `memory_note`,
        `disk`, `options`, `output_dir`.

    Raises:
        UserError: an option cannot be used, or the data cannot be read.
    """
    from convexlm.training_checks import check_numbers
    from convexlm.verbs.train import build_options

    processes = processes or world_size()
    sharding = sharding or sharding_here(processes)
    with _alone():
        made = build_options({**values, "use_cpu": True, "bf16": False, "fp16": False})
    options, model_options, train_config = made
    check_numbers(train_config)
    check_model_options(model_options, options)
    data = data or count_records(options.dataset, options.template, options.max_records)
    if data.records is not None:
        check_batches(train_config, data.records, processes)
    epoch = (
        None if data.records is None or train_config.packing else steps_of_epoch(train_config, data.records, processes)
    )
    steps = train_config.max_steps if train_config.max_steps > 0 else None
    if steps is None and epoch is not None:
        steps = math.ceil(train_config.num_train_epochs * epoch)
    per_step = train_config.per_device_train_batch_size * train_config.gradient_accumulation_steps * processes
    source = options.tokenizer_name or model_options.model_name_or_path or options.config_name
    tokens = sample_lengths(data, source, options.template, options.add_bos, train_config.max_length)
    about = None
    if tokens and steps is None and data.records and train_config.max_length:
        rows = math.ceil(tokens["mean"] * data.records / train_config.max_length)
        about = math.ceil(train_config.num_train_epochs * steps_of_epoch(train_config, rows, processes))
    if tokens:
        passes = train_config.num_train_epochs
        if train_config.max_steps > 0:
            row = train_config.max_length if train_config.packing else tokens["mean"]
            tokens["in_all"] = round(train_config.max_steps * per_step * (row or tokens["mean"]))
        elif data.records is not None:
            tokens["in_all"] = round(tokens["mean"] * data.records * passes)
    memory, why = _memory(values, model_options, train_config, processes, sharding, tokens, data, config)
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
        "disk": _disk(memory, train_config, checkpoints, saved_steps(train_config, steps, epoch)),
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


def check_batches(config: ConvexConfig, records: int, processes: int) -> None:
    """See that so many records make a batch, as `training_checks.check_loader` will of the loader.

    Raises:
        UserError: they make none.
    """
    from convexlm.training_checks import refuse_no_batch

    if config.dataloader_drop_last and not config.packing and records < config.per_device_train_batch_size * processes:
        refuse_no_batch(records, config.per_device_train_batch_size, processes)


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


# -- memory and disk


def _memory(
    values: Mapping[str, Any],
    model_options: Any,
    config: ConvexConfig,
    processes: int,
    sharding: str,
    tokens: dict[str, Any] | None,
    data: Data,
    model_config: Any,
) -> tuple[dict[str, Any] | None, str | None]:
    """The estimate, or None and the reason."""
    import torch

    from convexlm.collator import keeps_packed_rows
    from convexlm.known_models import find_config
    from convexlm.memory import SHARDINGS, estimate_memory
    from convexlm.memory_count import count_parameters

    if sharding not in SHARDINGS:
        return None, f"how {sharding} divides a model is not counted here"
    origin = "the recipe"
    if model_config is None:
        name = values.get("model_name_or_path") or values.get("config_name")
        if not name:
            raise UserError("--model_name_or_path is missing (or --config_name for a new model)")
        model_config, origin = find_config(name)
        if model_config is None:
            return None, f"{name}: {origin}"
    if tokens and not values.get("model_name_or_path"):
        model_config.vocab_size = tokens["vocabulary"]  # as training does with a new model
    peft_config = peft_config_of(model_options)
    size = count_parameters(model_config)
    device, assumed = "cpu", False
    if not values.get("use_cpu") and torch.cuda.is_available():
        device = "cuda"
    elif not values.get("use_cpu") and (size >= LARGE_MODEL or values.get("bf16") or values.get("fp16")):
        device, assumed = "cuda", True
    mixed = "bf16" if values.get("bf16") else "fp16" if values.get("fp16") else None
    if mixed is None and values.get("bf16") is None and device == "cuda":
        mixed = "bf16" if assumed or torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    attention = model_options.attn_implementation
    length, rows = _longest(config, tokens, data), config.per_device_train_batch_size
    packs = config.packing and config.packing_strategy in ("bfd", "bfd_split")
    padded = rows > 1
    if packs and not config.padding_free and keeps_packed_rows(model_config, attention):
        padded = True  # a mask between the sequences of each row
    elif config.padding_free or packs:
        # All rows stand in one, and attention that is not flash attention needs a mask between them.
        rows, length, padded = 1, rows * length, "flash" not in str(attention)
    try:
        estimate = estimate_memory(
            model_config,
            batch=rows,
            length=length,
            dtype=model_options.dtype or "float32",
            mixed_precision=mixed,
            gradient_checkpointing=bool(config.gradient_checkpointing or config.activation_checkpointing),
            attention=attention,
            padded=padded,
            accumulation=config.gradient_accumulation_steps,
            optimizer=getattr(config.optim, "value", str(config.optim)),
            peft_config=peft_config,
            quantized="4bit" if model_options.load_in_4bit else "8bit" if model_options.load_in_8bit else None,
            double_quantized=bool(model_options.use_bnb_nested_quant),
            sharding=sharding,
            processes=processes,
            device=device,
            device_bytes=None if assumed or device == "cpu" else torch.cuda.get_device_properties(0).total_memory,
            head_chunk_tokens=config.head_chunk_tokens,
        )
    except ValueError as error:
        return None, str(error)
    here = "a GPU with bf16 (none is here)" if assumed else "this machine's GPU" if device == "cuda" else "the CPU"
    added = {"device_is": here, "precision": mixed or str(model_options.dtype or "float32")}
    return {**estimate.as_dict(), "length": length, "rows": rows, "config_from": origin, **added}, None


def _longest(config: ConvexConfig, tokens: dict[str, Any] | None, data: Data) -> int:
    """The longest row that a batch may hold: the data's where all were read, else what `max_length` allows."""
    whole = tokens is not None and data.records == tokens["sampled"]
    if config.packing:
        return int(config.max_length or 1024)
    if tokens is not None and (whole or config.max_length is None):
        return int(tokens["longest"])
    return int(config.max_length or 1024)


def _disk(
    memory: dict[str, Any] | None, config: ConvexConfig, kept: list[int], saved: list[int]
) -> dict[str, Any] | None:
    """Bytes of a checkpoint, of those that are kept, and the most there are while one is written."""
    if memory is None or not kept:
        return None
    each = memory["checkpoint_weights"] if config.save_only_model else memory["checkpoint"]
    most = len(kept) + (len(saved) > len(kept))
    return {"checkpoint": each, "kept": each * len(kept), "most": each * most}


# -- for people


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """The plan of one training run in lines of text."""
    records = "records not counted" if plan["records"] is None else f"{plan['records']:,} records"
    steps = "steps not known yet" if plan["steps"] is None else f"{plan['steps']:,} steps"
    if plan["steps"] is None and plan["steps_about"]:
        steps = f"about {plan['steps_about']:,} steps"
    epochs = f", {plan['epochs']:g} epochs" if plan["epochs"] else ""
    lines = [
        f"data     {plan['dataset']}: {records} ({plan['records_from']})",
        f"prompts  template {plan['template']}",
        f"steps    {steps}{epochs}, global batch {plan['global_batch']} = {plan['batch']}",
    ]
    if tokens := plan["tokens"]:
        in_all = f"{tokens['in_all']:,} tokens in all; " if tokens["in_all"] else ""
        lines.append(
            f"tokens   {in_all}{tokens['sampled']} records sampled: {tokens['mean']:.1f} each, longest "
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
