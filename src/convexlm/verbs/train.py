"""`convexlm train`: fine-tune a model with an objective."""

from __future__ import annotations

import argparse
import dataclasses
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
from convexlm.options import VerbParser, load_yaml
from convexlm.plugins import load_plugins
from convexlm.training import train_model

if TYPE_CHECKING:
    from rich.console import Console

    from convexlm.launch.settings import LaunchSettings


UNHEEDED = {
    "completion_only_loss": "the loss always covers the completion and its EOS only",
    "assistant_only_loss": "the last assistant message is the completion; use ConvexTrainer in a script for others",
    "truncation_mode": "what is too long is cut at the end of the completion",
    "chat_template_path": "set the template in the tokenizer and choose --template chat",
    "dataset_text_field": "records are recognised by their keys",
    "dataset_kwargs": "use ConvexTrainer in a script",
    "eos_token": "set it in the tokenizer",
    "pad_token": "set it in the tokenizer",
    "auto_find_batch_size": "a smaller batch would be another training; --dry_run says what memory is needed, and "
    "--gradient_accumulation_steps keeps the global batch",
    "bf16_full_eval": "evaluations in training are in its own precision",
    "fp16_full_eval": "evaluations in training are in its own precision",
    "enable_jit_checkpoint": "a checkpoint is saved at SIGTERM in any case",
    "do_predict": "convexlm decode makes hypotheses",
    "label_names": "the loss is always that of the completion",
    "length_column_name": "lengths are those of the tokenized records",
    "resume_from_checkpoint": "--resume goes on from the last complete checkpoint in --output_dir",
}
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
    """Options: data, model (TRL's ModelConfig) and training (ConvexConfig, so any of SFTConfig's)."""
    parser = TrainParser(
        prog, "Fine-tune a causal language model with an objective. Every option of TRL's SFTConfig is taken."
    )
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
    if args.dry_run:
        return _plan(asked.resolved(to_plan=True), option_values(vars(args)))
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


def _plan(asked: LaunchSettings, values: dict[str, Any]) -> dict[str, Any]:
    from convexlm.launch.settings import config_file
    from convexlm.plan_training import plan_training, sharding_of_file

    if not asked:
        return {"dry_run": True, **plan_training(values)}
    file = load_yaml(config_file(asked.accelerate_config)) if asked.accelerate_config else {}
    sharding = sharding_of_file(file, asked.processes)
    return {"dry_run": True, **plan_training(values, processes=asked.processes, sharding=sharding)}


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
    precision = choose_precision(values)
    values = {**values, "bf16": precision.bf16, "fp16": precision.fp16}
    made: list[Any] = []
    for cls in (DataOptions, ModelConfig, ConvexConfig):
        names = {f.name for f in dataclasses.fields(cls) if f.init}
        try:
            made.append(cls(**{key: value for key, value in values.items() if key in names}))
        except (ValueError, TypeError, OSError, ImportError) as error:
            raise UserError(str(error).split("\n")[0]) from None
    data, model_options, config = made
    _refuse_unheeded(config)
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


def _refuse_unheeded(config: ConvexConfig) -> None:
    """Options of SFTConfig about TRL's own tokenization, which `convexlm train` does not use: sooner an error."""
    plain = {f.name: f.default for f in dataclasses.fields(ConvexConfig)}
    for name, instead in UNHEEDED.items():
        if getattr(config, name) not in (plain[name], None) and (name, getattr(config, name)) not in SAME_ANYWAY:
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
        spent = f"{result['records']} records in {result['seconds']:.0f} s"
        console.print(f"trained {resumed}{result['steps']} steps on {spent}")
    else:
        console.print(f"nothing to do: all {result['steps']} steps were trained before")
    kept = ", ".join(result["checkpoints"]) or "none (--save_strategy no)"
    console.print(f"checkpoints in {result['output_dir']}: {kept}")
    chosen = result.get("best_checkpoint") or result["last_checkpoint"]
    if chosen:
        console.print(
            f"next: convexlm decode --model_name_or_path {chosen} --sources FILE --pair en-de --output_file FILE.jsonl"
        )
