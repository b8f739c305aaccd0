"""`convexlm train`: fine-tune a model with an objective."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import HfArgumentParser
from trl import ModelConfig

from convexlm.config import ConvexConfig
from convexlm.data_options import DataOptions
from convexlm.errors import UserError
from convexlm.launch.deepspeed import is_on_cpu, options_on_cpu
from convexlm.launch.precision import choose_precision, device_type
from convexlm.launch.settings import (
    add_launch_options,
    launch_settings,
    refuse_another_launch,
    refuse_half_a_launch,
    under_a_launcher,
)
from convexlm.objectives import get_objective
from convexlm.option_names import UNHEEDED
from convexlm.options import VerbParser, load_yaml
from convexlm.own_prompts import has_own_prompts
from convexlm.plugins import load_plugins
from convexlm.progress import note
from convexlm.recipe_types import as_mapping
from convexlm.training import train_model

if TYPE_CHECKING:
    from rich.console import Console

    from convexlm.launch.settings import LaunchSettings

SAME_ANYWAY = {("completion_only_loss", True)}
# Of TRL's model options those that say how an adapter is made.
OF_ADAPTERS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters"),
    *("lora_modules_to_save", "lora_task_type", "use_rslora", "use_dora"),
)


class TrainParser(HfArgumentParser, VerbParser):
    """A verb's parser whose options are the fields of dataclasses, as in TRL's and transformers' own scripts."""

    def __init__(self, prog: str, description: str) -> None:
        HfArgumentParser.__init__(
            self,
            [DataOptions, ModelConfig, ConvexConfig],
            prog=prog,
            description=description,
            formatter_class=argparse.HelpFormatter,
            conflict_handler="resolve",  # ModelConfig and SFTConfig share an option
        )


def make_parser(prog: str) -> VerbParser:
    """Options: data, model (TRL's ModelConfig) and training (ConvexConfig, so most of SFTConfig's)."""
    parser = TrainParser(
        prog,
        "Fine-tune a causal language model with an objective. Most options of TRL's SFTConfig are taken; the others "
        "say why not.",
    )
    # Unset, so that it shows whether it was given; `build_options` then leaves it to the dataclass.
    parser.set_defaults(num_train_epochs=None)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last complete checkpoint in --output_dir"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print steps, memory, disk and settings; load no weights, write nothing"
    )
    add_launch_options(parser)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train as the options say: in this process, or in those of a launch."""
    if not args.output_dir:
        raise UserError("--output_dir is missing: where checkpoints and metrics go")
    asked = launch_settings(vars(args))
    if args.max_steps > 0 and args.num_train_epochs is not None and os.environ.get("RANK", "0") == "0":
        note(f"  --max_steps {args.max_steps} counts, and --num_train_epochs is not heeded beside it")
    if args.dry_run:
        return _plan(asked.resolved(to_plan=True), option_values(vars(args)), resume=args.resume)
    if under_a_launcher():
        refuse_another_launch(asked)
    elif asked:
        from convexlm.launch.training import launch_training

        return launch_training(asked.resolved(), option_values(vars(args)), resume=args.resume)
    refuse_half_a_launch()
    return train_here(vars(args), resume=args.resume)


def train_here(values: dict[str, Any], *, resume: bool, title: str = "train") -> dict[str, Any]:
    """Train in this process, alone or as one of those that a launcher has started.

    Raises:
        UserError: a value that an option cannot have, or as `train_model`.
    """
    from convexlm.launch.engine import refuse_another_engine, set_up

    if is_on_cpu():
        values = options_on_cpu(values)
    elif under_a_launcher() and device_type() == "cpu":
        values = {**values, "use_cpu": True}  # if not told, accelerate would train in each process alone
    data, model_options, config = build_options(values)
    set_up(config)
    plugin = config.deepspeed_plugin
    refuse_another_engine(
        str(config.output_dir),
        resume=resume,
        zero_stage=int(plugin.zero_stage) if plugin is not None else None,
        processes=config.world_size,
        config=config,
    )
    opening = f"precision {choose_precision(values)}"
    if str(getattr(config.save_strategy, "value", config.save_strategy)) == "no":
        opening += "; no checkpoint will be saved (--save_strategy no)"
    return train_model(model_options, data, config, resume=resume, title=title, opening=opening)


def _plan(asked: LaunchSettings, values: dict[str, Any], *, resume: bool) -> dict[str, Any]:
    from convexlm.launch.settings import config_file
    from convexlm.plan_training import plan_training, sharding_of_file

    if asked:
        file = load_yaml(config_file(asked.accelerate_config)) if asked.accelerate_config else {}
        sharding = sharding_of_file(file, asked.processes)
        plan = plan_training(values, processes=asked.processes, sharding=sharding, resume=resume)
    else:
        plan = plan_training(values, resume=resume)
    return {"dry_run": True, **plan, "options": {**_objective_settings(values), **plan["options"]}}


def _objective_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The objective of options that were checked, with the settings that it has where none are given."""
    given = {name: values[name] for name in ("k", "level", "length_weighting", "mle_mix") if values[name] is not None}
    settings = get_objective(values["objective"], **given, **(as_mapping(values["objective_kwargs"]) or {})).to_dict()
    return {"objective": settings.pop("name"), **settings}


def option_values(values: dict[str, Any]) -> dict[str, Any]:
    """Those of a verb's options that are options of a training."""
    known = {f.name for cls in (DataOptions, ModelConfig, ConvexConfig) for f in dataclasses.fields(cls) if f.init}
    return {key: value for key, value in values.items() if key in known}


def build_options(values: dict[str, Any]) -> tuple[DataOptions, ModelConfig, ConvexConfig]:
    """The three option objects from one flat mapping.

    Raises:
        UserError: a value that an option cannot have.
    """
    load_plugins(values.get("plugins"))
    _refuse_unheeded(values)
    if values.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise UserError("--deepspeed: DeepSpeed is not installed (pip install deepspeed)")
    precision = choose_precision(values)
    values = {**values, "bf16": precision.bf16, "fp16": precision.fp16}
    if values.get("num_train_epochs") is None:
        values.pop("num_train_epochs", None)
    made: list[Any] = []
    for cls in (DataOptions, ModelConfig, ConvexConfig):
        names = {f.name for f in dataclasses.fields(cls) if f.init}
        try:
            made.append(cls(**{key: value for key, value in values.items() if key in names}))
        except (ValueError, TypeError, OSError, ImportError) as error:
            raise UserError(_said_of(error)) from None
    data, model_options, config = made
    _refuse_half_an_adapter(model_options)
    dtype = model_options.dtype
    if dtype not in (None, "auto") and not getattr(getattr(torch, dtype, None), "is_floating_point", False):
        raise UserError(f"--dtype {dtype}: not a floating type of torch, such as float32 or bfloat16; or auto")
    if data.max_records is not None and data.max_records < 1:
        raise UserError(f"--max_records must be at least 1, not {data.max_records}")
    if config.learning_rate < 0:
        raise UserError(f"--learning_rate must not be negative, it is {config.learning_rate}")
    if config.max_length is not None and config.max_length < 2:
        raise UserError(f"--max_length must be at least 2 tokens, not {config.max_length}")
    return data, model_options, config


def _said_of(error: Exception) -> str:
    """What an option object says of a value that it cannot have, in one line and in terms of our options."""
    first, *others = str(error).split("\n")
    if "You need to assign use_cpu" in first:
        return (
            "--bf16 true: there is no GPU here that has bf16; leave it out, or give --use_cpu true to compute in bf16 "
            "on the CPU"
        )
    listed = ", ".join(line.removeprefix("- ") for line in others if line.startswith("- "))
    plain = re.sub(r"\b\w+Strategy\.([A-Z]+)\b", lambda name: name[1].lower(), listed)  # transformers' enumerations
    return f"{first} {plain}".rstrip()


def _refuse_unheeded(values: dict[str, Any]) -> None:
    """Options of SFTConfig about TRL's own tokenization, which `convexlm train` does not use: sooner an error."""
    plain = {f.name: f.default for f in dataclasses.fields(ConvexConfig)}
    for name, instead in UNHEEDED.items():
        value = values.get(name)
        if value not in (plain[name], None) and (name, value) not in SAME_ANYWAY:
            raise UserError(f"--{name}: not heeded by `convexlm train` and recipes; {instead}")


def _refuse_half_an_adapter(options: ModelConfig) -> None:
    """Options of an adapter without `use_peft`, under which all weights would be trained: sooner an error."""
    if options.use_peft:
        return
    plain = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    for name in OF_ADAPTERS:
        if getattr(options, name) not in (plain[name], None):
            raise UserError(f"--{name}: without --use_peft true there is no adapter; give that, or leave --{name} out")


def show(result: dict[str, Any], console: Console) -> None:
    """What was written, and what to run next; or the plan."""
    if result.get("dry_run"):
        from convexlm.plan_training import show_training_plan

        show_training_plan(result, console)
        return
    if result["new_steps"]:
        resumed = f"the last {result['new_steps']} of " if result["new_steps"] < result["steps"] else ""
        records, steps = result["records"], result["steps"]
        spent = f"{records} record{'s' * (records != 1)} in {result['seconds']:.0f} s"
        console.print(f"trained {resumed}{steps} step{'s' * (steps != 1)} on {spent}")
    else:
        console.print(f"nothing to do: {result['steps']} of {result['steps']} steps were trained before")
    kept = ", ".join(result["checkpoints"]) or "none (--save_strategy no)"
    lines = [f"checkpoints in {result['output_dir']}: {kept}"]
    chosen = result.get("best_checkpoint") or result["last_checkpoint"]
    if chosen and not any((Path(chosen) / name).is_file() for name in ("config.json", "adapter_config.json")):
        # FSDP's SHARDED_STATE_DICT leaves its shards and nothing of a model beside them.
        lines.append(f"next: convexlm export --checkpoint {chosen} --base_model MODEL --output_dir DIR")
    elif chosen:
        template = " --template TEXT_OR_NAME" if has_own_prompts(Path(chosen)) else ""
        lines.append(
            f"next: convexlm decode --model_name_or_path {chosen}{template} --sources FILE --pair en-de --output_file "
            "FILE.jsonl"
        )
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
