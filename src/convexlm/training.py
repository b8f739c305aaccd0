"""Training one model with one objective, from options to checkpoints: `convexlm train` and every arm of a run."""

from __future__ import annotations

import os
import pickle
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.allocator import return_freed_memory
from convexlm.checkpoints import (
    all_checkpoints,
    best_checkpoint,
    complete_checkpoints,
    drop_interruptions,
    is_interruption,
    rotate,
    step_of,
)
from convexlm.dataset_names import dataset_path
from convexlm.errors import Stopped, UserError, first_line, without_worker_traceback
from convexlm.interrupts import SignalWatch, signal_name
from convexlm.output_folder import held, refuse_checkpoints
from convexlm.progress import TrainProgress, note
from convexlm.resuming import agreed_start
from convexlm.training_checks import (
    check_generation_config,
    check_loader,
    check_rows,
    check_settings,
    check_weights,
    say_if_the_same,
)
from convexlm.training_marker import content_of, model_identity, training_marker
from convexlm.training_model import check_adapter, check_model, model_to_train, peft_config_of, revision_of

if TYPE_CHECKING:
    from trl import ModelConfig

    from convexlm.config import ConvexConfig
    from convexlm.data_options import DataOptions
    from convexlm.tokenization import PromptSettings


def train_model(
    model_options: ModelConfig,
    data: DataOptions,
    args: ConvexConfig,
    *,
    resume: bool = False,
    title: str = "train",
    opening: str | None = None,
) -> dict[str, Any]:
    """Train, leaving `checkpoint-STEP` folders and `metrics.jsonl` in `args.output_dir`.

    Args:
        model_options: TRL's model options: path or name, dtype, LoRA, quantization.
        data: what to train on.
        args: objective and training options.
        resume: go on from the last complete checkpoint, if there is one.
        title: what the progress calls this run.
        opening: what to say when data and model are ready, before the first step.

    Returns:
        `output_dir`, `checkpoints`, `last_checkpoint`, `best_checkpoint` (by `metric_for_best_model`, None without
        one), `steps`, `new_steps` (those of this call), `records`, `dropped`, `truncated`, `seconds`. Under streaming,
        `records` counts the rows that the steps took, and `dropped` and `truncated` are None.

    Raises:
        UserError: data, model or options cannot be used, the output folder holds checkpoints and `resume` is off, or
            another training is at work there.
        Stopped: SIGTERM or SIGINT came, and a checkpoint was saved; or a step's loss or gradient was not finite.
    """
    _quiet_libraries()
    output_dir = Path(str(args.output_dir))
    check_settings(args, data)
    refuse_checkpoints(output_dir, resume)
    with held(args, output_dir):
        refuse_checkpoints(output_dir, resume)  # another training may have left some meanwhile
        return _train_in(output_dir, model_options, data, args, resume, title, opening)


def _train_in(
    output_dir: Path,
    model_options: ModelConfig,
    data: DataOptions,
    args: ConvexConfig,
    resume: bool,
    title: str,
    opening: str | None,
) -> dict[str, Any]:
    """As `train_model`, in a folder that this process holds."""
    from transformers.trainer_utils import align_special_tokens
    from trl import get_quantization_config

    from convexlm.chat_templates import also_ends
    from convexlm.continuing import ContinuingTrainer, refuse_what_cannot_change
    from convexlm.own_prompts import KEY as OWN_PROMPTS
    from convexlm.own_prompts import said_of_own_prompts
    from convexlm.tokenization import PromptSettings, answer_end, load_tokenizer
    from convexlm.tokenizer_files import said_of_bos

    begun = time.monotonic()
    if args.return_freed_memory and return_freed_memory(args.device.type):
        opening = ", ".join(filter(None, (opening, "freed memory goes back to the system")))
    tokenizer_source = data.tokenizer_name or model_options.model_name_or_path or data.config_name
    if not tokenizer_source:
        check_model(model_options, data)  # which says that there is no model
    tokenizer = load_tokenizer(
        str(tokenizer_source),
        trust_remote_code=args.trust_remote_code,
        revision=None if data.tokenizer_name else revision_of(model_options),
    )
    settings = PromptSettings(template=data.template, add_bos=data.add_bos).resolve(tokenizer)
    check_model(model_options, data, args.device.type)  # before the data, which may take long
    sources = (tokenizer_source, model_options.model_name_or_path)
    if data.add_bos is None and not data.config_name and (said := said_of_bos(tokenizer, settings.add_bos, sources)):
        _say(said)
    model_facts = model_identity(model_options, data, args, str(tokenizer_source), tokenizer)
    train_dataset, counts, identity, own_prompt = _training_rows(data, args, tokenizer, settings)
    if own_prompt is not None:
        _say(f"  {data.dataset}: {said_of_own_prompts(own_prompt, data.template)}")
    eval_dataset = evaluation = None
    if data.eval_dataset:  # the whole of it, whatever `max_records` says
        prepared = _prepared(data.eval_dataset, data, args, tokenizer, settings, None)
        eval_dataset, evaluation = prepared.dataset, _identity_of(data.eval_dataset, prepared)
        check_weights(eval_dataset, data.eval_dataset, "evaluate on")
        if args.process_index == 0:
            say_if_the_same(identity["dataset"], evaluation)
    if not (data.streaming or args.packing or args.eval_packing or args.padding_free or args.shuffle_dataset):
        # The rows are as long as they may be, and each has a target: TRL would copy them all to find out.
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    model, init_options = model_to_train(model_options, data, args, tokenizer)
    args.model_init_kwargs = init_options
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # torch warns at every loader where there is nothing to pin for
    trainer = as_user_errors(
        lambda: ContinuingTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config_of(model_options),
            quantization_config=get_quantization_config(model_options),
        )
    )
    check_adapter(trainer.model, model_options)
    progress = _add_callbacks(trainer, title)
    marker = training_marker(asdict(settings), trainer.objective.to_dict(), args, identity, model_facts, evaluation)
    trainer.checkpoint_marker = marker if own_prompt is None else {**marker, OWN_PROMPTS: True}
    trainer.how_to_go_on = f"the same command{'' if resume else ' with --resume'} goes on from there"
    for name, rows in ((data.dataset, train_dataset), (data.eval_dataset, eval_dataset)):
        if rows is not None:
            check_rows(rows, str(name), trainer.model, tokenizer, args)
    if model_options.use_peft is False and getattr(trainer.model, "generation_config", None) is not None:
        align_special_tokens(trainer.model, tokenizer)  # as its `train` does
        also_ends(trainer.model.generation_config, answer_end(tokenizer, settings))
        place = "the model" if data.config_name else model_options.model_name_or_path
        check_generation_config(trainer.model.generation_config, f"generation_config.json of {place}")
    loader = trainer.get_train_dataloader()
    check_loader(loader, counts["records"], args)
    max_steps = trainer.set_initial_training_values(args, loader)[-1]
    last = agreed_start(args, output_dir, max_steps, marker)
    compared = (args.metric_for_best_model, args.greater_is_better)
    if last is not None:
        _say(f"  {title}: going on from {last.name}")
        args.eval_on_start = False  # it was done
        if args.process_index == 0:
            # A run may have been stopped between a checkpoint and the deletion of an older one.
            rotate(output_dir, args.save_total_limit, best_checkpoint(last, *compared))
    if opening:
        _say(f"  {title}: {opening}")
    # Resumed at its very end, transformers' loop would train one step more before it looks.
    before = steps = step_of(last) if last is not None else 0
    if last is not None and steps < max_steps:
        deepspeed = trainer.is_deepspeed_enabled
        refuse_what_cannot_change(last, marker, deepspeed=deepspeed, metric=args.metric_for_best_model)
    if steps >= max_steps:
        trained = f"{max_steps} step{'s' * (max_steps != 1)}"
        _say(f"  {title}: nothing to do: {last} is there, and the training has {trained}")
    else:
        try:
            _run(trainer, last)
        finally:
            progress.close()
        steps = trainer.state.global_step
        if trainer.is_world_process_zero():
            drop_interruptions(all_checkpoints(output_dir))
    checkpoints = [path for path in complete_checkpoints(output_dir) if not is_interruption(path)]
    if counts["records"] is None:
        counts["records"] = steps * trainer.get_total_train_batch_size(args)
    return {
        "output_dir": str(output_dir),
        "checkpoints": [checkpoint.name for checkpoint in checkpoints],
        "last_checkpoint": str(checkpoints[-1]) if checkpoints else None,
        "best_checkpoint": best_checkpoint(checkpoints[-1], *compared) if checkpoints else None,
        "steps": steps,
        "new_steps": steps - before,
        **counts,
        "seconds": round(time.monotonic() - begun, 2),
    }


def _run(trainer: Any, last: Path | None) -> None:
    """The Trainer's loop, under a watch for signals."""
    with SignalWatch() as watch:
        trainer.signal_watch = watch
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        except UserError as error:
            raise without_worker_traceback(error) from None
        except pickle.UnpicklingError as error:
            raise UserError(f"{last}: its state is not what torch loads safely ({first_line(error)})") from None
        finally:
            trainer.signal_watch = None
    if watch.number is not None:  # it came in the last step
        raise Stopped(
            f"stopped by {signal_name(watch.number)}; training is complete, and {trainer.how_to_go_on}",
            exit_code=128 + watch.number,
        )


# -- data


def _training_rows(
    data: DataOptions, args: ConvexConfig, tokenizer: Any, settings: PromptSettings
) -> tuple[Any, dict[str, Any], dict[str, Any], str | None]:
    """The dataset to train on, what there is to say of it, and what tells it from another (see `training_marker`).

    And of prompts that the template did not make, the id of a record.
    """
    identity: dict[str, Any] = {"streaming": data.streaming, "max_records": data.max_records}
    if data.streaming:
        from convexlm.streaming import RecordStream

        stream = RecordStream(
            data.dataset,
            data.template,
            tokenizer,
            settings,
            args.max_length,
            shuffle_buffer=data.shuffle_buffer,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            max_records=data.max_records,
        )
        # Every process reads the stream and takes its rows: what one process would deal out has to be of one length.
        args.accelerator_config.dispatch_batches = False
        next(stream.one_pass())  # what is wrong with the file is told before the model is loaded
        content = content_of(dataset_path(data.dataset))
        dataset = {"name": Path(data.dataset).name, "content": content}
        identity = {**identity, "shuffle_buffer": data.shuffle_buffer, "dataset": dataset}
        counts: dict[str, Any] = {"records": None, "dropped": None, "truncated": None}
        return stream.as_dataset(), counts, identity, stream.own_prompt
    found = _prepared(data.dataset, data, args, tokenizer, settings, data.max_records)
    check_weights(found.dataset, data.dataset)
    identity["dataset"] = _identity_of(data.dataset, found)
    counts = {"records": len(found.dataset), "dropped": found.dropped, "truncated": found.truncated}
    return found.dataset, counts, identity, found.own_prompt


def _identity_of(name: str, found: Any) -> dict[str, Any]:
    return {"name": Path(name).name, "content": found.source[1] if found.source else None}


def _prepared(
    name: str,
    data: DataOptions,
    args: ConvexConfig,
    tokenizer: Any,
    settings: PromptSettings,
    max_records: int | None,
) -> Any:
    from convexlm.training_data import prepare_data

    found = prepare_data(
        name,
        data.template,
        tokenizer,
        settings,
        args.max_length,
        max_records=max_records,
        num_proc=args.dataset_num_proc,
        cache_dir=data.dataset_cache_dir,
    )
    if found.from_cache:
        _say(f"  {name}: tokenised data from cache ({len(found.dataset)} rows)")
    _say_what_was_lost(name, found, args.max_length)
    return found


# -- the trainer


def as_user_errors(make: Any) -> Any:
    """What a trainer refuses at its start is the user's to mend, so it is told in one line."""
    try:
        return make()
    except (ValueError, OSError, ImportError) as error:
        said = first_line(error)
        hint = "give names of its linear layers, or all-linear"
        if said.startswith("Target modules"):  # PEFT's, where the model has none of them
            names = ", ".join(f"`{name}`" for name in re.findall(r"'([^']+)'", said))
            raise UserError(f"--lora_target_modules: the model has no module {names}; {hint}") from error
        if said.startswith("Please specify `target_modules`"):
            raise UserError(f"--lora_target_modules is missing: PEFT has none for such a model; {hint}") from error
        raise UserError(said) from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UserError(f"{first_line(error)}; see --model_init_kwargs") from error


def _add_callbacks(trainer: Any, title: str) -> TrainProgress:
    from convexlm.log_lines import LogLines, ProgressLines
    from convexlm.metrics_file import MetricsFile

    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, (LogLines, ProgressLines)):
            trainer.remove_callback(type(callback))
    progress = TrainProgress(title)
    trainer.add_callback(MetricsFile())
    trainer.add_callback(progress)
    return progress


def _say(text: str) -> None:
    """A line for people, from one of several processes."""
    if os.environ.get("RANK", "0") == "0":
        note(text)


def _say_what_was_lost(name: str, tokenized: Any, max_length: int | None) -> None:
    if tokenized.dropped:
        shown = ", ".join(tokenized.dropped[:5]) + (", ..." if len(tokenized.dropped) > 5 else "")
        count = len(tokenized.dropped)
        many = f"{count} records dropped, for their prompts alone fill"
        one = "1 record dropped, for its prompt alone fills"
        _say(f"  {name}: {one if count == 1 else many} max_length={max_length}: {shown}")
    if count := tokenized.truncated:
        _say(f"  {name}: {count} record{'s' * (count != 1)} cut to max_length={max_length}")
    if count := tokenized.with_earlier_answers:
        _say(
            f"  {name}: {count} record{' has' if count == 1 else 's have'} assistant turns before the last, which are "
            "context and not trained on"
        )


def _quiet_libraries() -> None:
    """Libraries' own bars and notices would bury ours; warnings and errors still come through."""
    import warnings

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="trl|transformers")
