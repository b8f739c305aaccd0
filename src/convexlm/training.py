"""Training one model with one objective, from options to checkpoints: `convexlm train` and every arm of a run."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.files import write_atomic
from convexlm.progress import TrainProgress, note

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import ModelConfig

    from convexlm.config import ConvexConfig
    from convexlm.tokenization import PromptSettings

logger = logging.getLogger(__name__)

COMPLETE_FILE = "convexlm.json"


@dataclass
class DataOptions:
    """What to train on, and what a new model or another tokenizer comes from."""

    dataset: str = field(metadata={"help": "File (.json, .jsonl, plain or .gz) or hub name of the training data."})
    eval_dataset: str | None = field(default=None, metadata={"help": "The same for data to evaluate the loss on."})
    template: str = field(default="alpaca", metadata={"help": "Prompt template, by name."})
    add_bos: bool | None = field(
        default=None,
        metadata={"help": "Begin with the BOS token; if unset, where the tokenizer has one that is not its EOS."},
    )
    max_records: int | None = field(default=None, metadata={"help": "Use the first N records only."})
    plugins: list[str] | None = field(
        default=None, metadata={"help": "Modules or .py files to import first, which register objectives or formats."}
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "Config (a JSON file, folder or hub name) of a new model to train from scratch."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer (folder, tokenizer.model or hub name), if not the model's own."}
    )


def train_model(
    model_options: ModelConfig,
    data: DataOptions,
    args: ConvexConfig,
    *,
    resume: bool = False,
    title: str = "train",
) -> dict[str, Any]:
    """Train, leaving `checkpoint-STEP` folders and `metrics.jsonl` in `args.output_dir`.

    Args:
        model_options: TRL's model options: path or name, dtype, LoRA, quantization.
        data: what to train on.
        args: objective and training options.
        resume: go on from the last complete checkpoint, if there is one.
        title: what the progress calls this run.

    Returns:
        `output_dir`, `checkpoints`, `last_checkpoint`, `steps`, `records`, `dropped`, `truncated`, `seconds`.

    Raises:
        UserError: data, model or options cannot be used, or the output folder holds checkpoints and `resume` is off.
    """
    from convexlm.instructions import load_records
    from convexlm.tokenization import PromptSettings, build_dataset, load_tokenizer, tokenize_records
    from convexlm.trainer import ConvexTrainer

    begun = time.monotonic()
    _quiet_libraries()
    output_dir = Path(str(args.output_dir))
    last = _where_to_start(output_dir, resume)
    tokenizer_source = data.tokenizer_name or model_options.model_name_or_path or data.config_name
    tokenizer = load_tokenizer(str(tokenizer_source), trust_remote_code=args.trust_remote_code)
    settings = PromptSettings(template=data.template, add_bos=data.add_bos).resolve(tokenizer)

    def prepare(name: str) -> tuple[Any, Any]:
        records = load_records(name, template=data.template, max_records=data.max_records)
        tokenized = tokenize_records(records, tokenizer, settings, args.max_length)
        _say_what_was_lost(name, tokenized, args.max_length)
        return build_dataset(tokenized), tokenized

    train_dataset, tokenized = prepare(data.dataset)
    eval_dataset = prepare(data.eval_dataset)[0] if data.eval_dataset else None
    model, init_options = _model(model_options, data, args, tokenizer)
    args.model_init_kwargs = init_options
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # torch warns at every loader where there is nothing to pin for
    trainer = _as_user_errors(
        lambda: ConvexTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=_peft(model_options),
            quantization_config=_quantization(model_options),
        )
    )
    _add_callbacks(trainer, settings, title)
    if last is not None:
        note(f"  {title}: going on from {last.name}")
    # Resumed at its very end, transformers' loop would train one step more before it looks.
    steps = int(last.name.rsplit("-", 1)[1]) if last is not None else 0
    if steps < trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        steps = trainer.state.global_step
    checkpoints = complete_checkpoints(output_dir)
    return {
        "output_dir": str(output_dir),
        "checkpoints": [checkpoint.name for checkpoint in checkpoints],
        "last_checkpoint": str(checkpoints[-1]) if checkpoints else None,
        "steps": steps,
        "records": len(tokenized.rows),
        "dropped": list(tokenized.dropped),
        "truncated": tokenized.truncated,
        "seconds": round(time.monotonic() - begun, 2),
    }


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a folder that were written to the end, by step."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    found.sort(key=lambda path: int(path.name.split("-")[-1]))
    return [path for path in found if (path / COMPLETE_FILE).is_file()]


def _where_to_start(output_dir: Path, resume: bool) -> Path | None:
    if output_dir.is_file():
        raise UserError(f"--output_dir {output_dir}: is a file, not a folder")
    everything = list(output_dir.glob("checkpoint-*"))
    complete = complete_checkpoints(output_dir)
    if everything and not resume:
        raise UserError(f"{output_dir} holds checkpoints already; give --resume to go on, or another --output_dir")
    for path in set(everything) - set(complete):
        note(f"  {path}: not written to the end (the run was stopped while saving); removed")
        shutil.rmtree(path, ignore_errors=True)
    return complete[-1] if complete else None


def _model(
    options: ModelConfig, data: DataOptions, args: ConvexConfig, tokenizer: Any
) -> tuple[PreTrainedModel | str, dict[str, Any] | None]:
    """A new model from a config, or the path and loading options that TRL takes."""
    if data.config_name:
        if options.model_name_or_path:
            raise UserError("give --model_name_or_path (a trained model) or --config_name (a new one), not both")
        return _new_model(data.config_name, tokenizer, args.seed, options), None
    name = options.model_name_or_path
    if not name:
        raise UserError("--model_name_or_path is missing (or --config_name for a new model)")
    path = Path(name)
    if path.exists():
        if not (path / "config.json").is_file():
            raise UserError(f"--model_name_or_path {name}: no model there (config.json is missing)")
        if not list(path.glob("*.safetensors")):
            raise UserError(f"--model_name_or_path {name}: no weights in safetensors format there")
    loading: dict[str, Any] = {"use_safetensors": True, **(args.model_init_kwargs or {})}
    loading.setdefault("dtype", options.dtype or "float32")
    if options.attn_implementation:
        loading.setdefault("attn_implementation", options.attn_implementation)
    if options.model_revision != "main":
        loading.setdefault("revision", options.model_revision)
    return name, loading


def _new_model(config_name: str, tokenizer: Any, seed: int, options: ModelConfig) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        config = AutoConfig.from_pretrained(config_name, **special)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--config_name {config_name}: {_first_line(error)}") from None
    set_seed(seed)
    extra = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    return AutoModelForCausalLM.from_config(config, **extra)


def _peft(options: ModelConfig) -> Any:
    from trl import get_peft_config

    modules = options.lora_target_modules
    config = get_peft_config(options)
    if config is not None and isinstance(modules, str) and modules != "all-linear":
        # TRL takes a list of one module apart, and PEFT reads a bare string as a pattern for the whole name.
        config.target_modules = {modules}
    return config


def _quantization(options: ModelConfig) -> Any:
    from trl import get_quantization_config

    return get_quantization_config(options)


def _as_user_errors(make: Any) -> Any:
    """What a trainer refuses at its start is the user's to mend, so it is told in one line."""
    try:
        return make()
    except (ValueError, OSError, ImportError) as error:
        raise UserError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.split("\n")[0] if text else type(error).__name__


def _add_callbacks(trainer: Any, settings: PromptSettings, title: str) -> None:
    from transformers import ProgressCallback, TrainerCallback

    from convexlm.metrics_file import MetricsFile

    class MarkComplete(TrainerCallback):
        """Writes the file that says how the checkpoint's prompts look, last of all: with it a checkpoint is whole."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}", settings, trainer.objective)

    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, ProgressCallback):
            trainer.remove_callback(type(callback))
    trainer.add_callback(MarkComplete())
    trainer.add_callback(MetricsFile())
    trainer.add_callback(TrainProgress(title))


def mark_complete(checkpoint: Path, settings: PromptSettings, objective: Any) -> None:
    """Write a checkpoint's `convexlm.json`: its prompt settings and objective."""
    import json
    from dataclasses import asdict

    content = {"prompt": asdict(settings), "objective": objective.to_dict()}
    write_atomic(checkpoint / COMPLETE_FILE, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _say_what_was_lost(name: str, tokenized: Any, max_length: int | None) -> None:
    if tokenized.dropped:
        shown = ", ".join(tokenized.dropped[:5]) + (", ..." if len(tokenized.dropped) > 5 else "")
        count = len(tokenized.dropped)
        note(f"  {name}: {count} records dropped, for their prompts alone fill max_length={max_length}: {shown}")
    if tokenized.truncated:
        note(f"  {name}: {tokenized.truncated} records cut to max_length={max_length}")


def _quiet_libraries() -> None:
    """Libraries' own bars and notices would bury ours; warnings and errors still come through."""
    import warnings

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="trl|transformers")
