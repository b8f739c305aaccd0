"""What options are called elsewhere (TRL, transformers, axolotl, LLaMA-Factory), and which of ours are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

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
"""Options that `convexlm train` and recipes would take and not heed, with what to do in their place."""

NEVER_MEANT = {*UNHEEDED, "loss_type"}
"""Options that are there and refused, whatever they say: none of them is suggested."""

_HERE = {
    "per_device_train_batch_size": "batch_size train_batch_size per_device_batch_size micro_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "grad_accum gradient_accumulation",
    "num_train_epochs": "epochs num_epochs n_epochs",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler scheduler",
    "optim": "optimizer",
    "max_length": "max_seq_length max_seq_len seq_length sequence_len cutoff_len model_max_length",
    "packing": "sample_packing",
    "train_sampling_strategy=group_by_length": "group_by_length",
    "eval_strategy": "evaluation_strategy",
    "dtype": "torch_dtype",
    "attn_implementation=flash_attention_2": "flash_attention flash_attn use_flash_attention_2",
    "use_peft": "use_lora",
    "lora_r": "lora_rank lora_dim",
    "lora_target_modules": "lora_target lora_modules target_modules",
    "lora_modules_to_save": "modules_to_save additional_target",
    "model_name_or_path": "model model_name base_model",
    "dataset": "datasets train_file data_path dataset_path",
    "eval_dataset": "validation_file",
    "dataset_num_proc": "preprocessing_num_workers dataset_processes",
    "template": "prompt_template chat_template",
    "add_bos": "bos add_bos_token",
    "use_cpu": "no_cuda",
    "num_beams": "beam beams beam_size",
}
_BY_OTHER_NAME = {other: here for here, others in _HERE.items() for other in others.split()}

# What a name is told by, where no option is the same: said where the first of the two is an option.
_INSTEAD = {
    "global_batch_size": (
        "gradient_accumulation_steps",
        "recipes alone have it; give --per_device_train_batch_size and --gradient_accumulation_steps, whose product "
        "over all processes it is",
    ),
    "warmup_ratio": ("warmup_steps", "give --warmup_steps, of which a number below 1 is a share of all steps"),
    "logging_dir": (
        "report_to",
        "there is none: metrics.jsonl is in --output_dir, and TensorBoard takes its folder from the variable "
        "TENSORBOARD_LOGGING_DIR",
    ),
    "overwrite_output_dir": (
        "output_dir",
        "there is none, for nothing is written over; choose another --output_dir, or --resume",
    ),
    "early_stopping_patience": (
        "metric_for_best_model",
        "training does not stop early; with --metric_for_best_model the best checkpoint is kept and named",
    ),
    "save_safetensors": ("output_dir", "there is none: weights are always saved as safetensors"),
}


def by_another_name(key: Any, known: Collection[str]) -> str:
    """What follows "unknown option `key`" where that is another program's name of one that is there; else empty.

    Args:
        key: as it was typed, with dashes or without.
        known: the options that are there, spelled in the same way.
    """
    typed = str(key)
    dashes, name = ("--" if typed.startswith("--") else ""), typed.lstrip("-").replace("-", "_")
    option, _, value = _BY_OTHER_NAME.get(name, "").partition("=")
    if option and f"{dashes}{option}" in known:
        given = f"{' ' if dashes else ': '}{value}" if value else ""
        return f"; here it is `{dashes}{option}{given}`"
    needs, said = _INSTEAD.get(name, ("", ""))
    return f"; {said}" if needs and f"{dashes}{needs}" in known else ""
