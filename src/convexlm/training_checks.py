"""What a training is told before its model is loaded, or before its first step, in place of an error in the middle."""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
import tempfile
from typing import TYPE_CHECKING, Any, NoReturn

import pyarrow.compute as pc  # type: ignore[import-untyped]

from convexlm.errors import UserError, first_line
from convexlm.progress import note
from convexlm.refusals import refuse_what_cannot_be_honoured

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from convexlm.config import ConvexConfig
    from convexlm.data_options import DataOptions

# What an evaluation measures, and so what can choose the best checkpoint.
METRICS = (
    *("loss", "nll", "weight_mean", "weight_min", "effective_sample_size", "token_accuracy", "entropy"),
    "num_target_tokens",
)
AT_LEAST_ONE = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("pad_to_multiple_of", "eval_accumulation_steps", "dataloader_prefetch_factor"),
)
_POSITIONS = re.compile(r"wpe|pos", re.IGNORECASE)


def check_settings(
    args: ConvexConfig, data: DataOptions, *, device_type: str | None = None, here: bool = True
) -> None:
    """See that options are what a training can be run with: values, packages, optimizer, schedule, evaluation.

    Args:
        args: the training options.
        data: what to train on.
        device_type: where it will be trained; what `args` says, if None.
        here: it will be on this machine; else what only GPUs need may be missing here.

    Raises:
        UserError: the first that is not, by its name.
    """
    check_numbers(args)
    try:
        refuse_what_cannot_be_honoured(args, args.build_objective(), {})
    except ValueError as error:
        raise UserError(str(error)) from None
    if args.packing and args.max_length is None:
        raise UserError("--packing needs a --max_length: the length of a packed row")
    _check_streaming(args, data)
    _check_evaluation(args, data)
    _check_packages(args, here)
    _check_optimizer(args, here)
    if args.activation_offloading and (device_type or args.device.type) == "cpu":
        raise UserError(
            "--activation_offloading moves activations from a GPU to the CPU, and there is none; leave it out"
        )
    if args.accelerator_config.split_batches:
        raise UserError(
            "--accelerator_config with split_batches: here --per_device_train_batch_size is what each process gets; "
            "leave it out"
        )
    given = args.gradient_checkpointing_kwargs
    if isinstance(given, dict) and (unknown := sorted(set(given) - _checkpointing_names())):
        raise UserError(
            f"--gradient_checkpointing_kwargs: torch has no setting `{unknown[0]}` for it; it has "
            f"{', '.join(sorted(_checkpointing_names()))}"
        )


def check_numbers(args: ConvexConfig) -> None:
    """See that numbers are in their bounds, which a dry run is told of too.

    Raises:
        UserError: the first that is not, by its name.
    """
    for name in AT_LEAST_ONE:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    if args.dataloader_num_workers < 0:
        raise UserError(f"--dataloader_num_workers must not be negative, it is {args.dataloader_num_workers}")
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise UserError("--dataloader_persistent_workers needs workers that persist; give --dataloader_num_workers")
    if args.max_steps == 0:
        raise UserError(
            "--max_steps 0 trains nothing; give at least 1, or leave it out to train for --num_train_epochs"
        )
    if args.max_steps < 0 and not 0 < args.num_train_epochs < math.inf:
        raise UserError(f"--num_train_epochs must be finite and above 0, not {args.num_train_epochs}")
    for name in ("learning_rate", "weight_decay", "max_grad_norm"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"--{name} must be finite and not negative, not {value}")
    if args.neftune_noise_alpha is not None and not 0 <= args.neftune_noise_alpha < math.inf:
        raise UserError(f"--neftune_noise_alpha must be finite and not negative, not {args.neftune_noise_alpha}")


def _check_streaming(args: ConvexConfig, data: DataOptions) -> None:
    if data.shuffle_buffer < 0:
        raise UserError(f"--shuffle_buffer must not be negative, it is {data.shuffle_buffer}")
    if not data.streaming:
        if data.shuffle_buffer:
            raise UserError("--shuffle_buffer is for --streaming; without it all records are shuffled")
        return
    if args.max_steps <= 0:
        raise UserError("--streaming needs --max_steps: a stream does not say how long it is")
    if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise UserError(
            f"--train_sampling_strategy {args.train_sampling_strategy}: a stream has no lengths to sort by"
        )
    if args.dataset_num_proc and args.dataset_num_proc > 1:
        raise UserError("--dataset_num_proc tokenizes ahead of training; --streaming tokenizes while it goes on")
    if args.shuffle_dataset:
        raise UserError("--shuffle_dataset is for data in memory; with --streaming give --shuffle_buffer")
    context = args.dataloader_multiprocessing_context
    if args.dataloader_num_workers and context not in (None, "fork"):
        raise UserError(f"--dataloader_multiprocessing_context {context}: a stream goes to forked workers alone")


def _check_evaluation(args: ConvexConfig, data: DataOptions) -> None:
    evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
    if data.eval_dataset and not evaluates and not args.eval_on_start:
        raise UserError(
            "--eval_dataset without --eval_strategy is never evaluated; give --eval_strategy steps or epoch, or "
            "leave it out"
        )
    if not data.eval_dataset and (evaluates or args.eval_on_start):
        name = "eval_strategy" if evaluates else "eval_on_start"
        raise UserError(f"--{name} needs --eval_dataset: there are no data to evaluate on")
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in METRICS:
        raise UserError(f"--metric_for_best_model {metric}: not measured; there are {', '.join(METRICS)}")
    if metric is not None and not evaluates:
        raise UserError(
            f"--metric_for_best_model {metric}: not measured without --eval_dataset and --eval_strategy steps or epoch"
        )


def _check_packages(args: ConvexConfig, here: bool) -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if here and args.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise UserError("--use_liger_kernel: liger-kernel is not installed (pip install liger-kernel)")
    for name in args.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted({*INTEGRATION_TO_CALLBACK, "none"}))
            raise UserError(f"--report_to {name}: transformers does not know it; there are {known}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise UserError(f"--report_to {name}: {first_line(error)}") from None


def _check_optimizer(args: ConvexConfig, here: bool) -> None:
    """Make the optimizer and its schedule for one number, as the Trainer will for the model."""
    import torch
    from transformers import Trainer, get_scheduler

    name = str(getattr(args.optim, "value", args.optim))
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer: Any = None
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([parameter], **settings)
    except ImportError as error:
        if here:
            raise UserError(f"--optim {name}: {first_line(error)}") from None
    except (ValueError, TypeError) as error:
        if "pass a model" not in str(error):  # one that needs it is left to the Trainer
            raise UserError(f"--optim {name} with its settings: {first_line(error)}") from None
    except RuntimeError:  # as of one for GPUs that does not take this number
        pass
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = torch.optim.SGD([parameter], lr=args.learning_rate)
    _check_schedule(args)
    steps = 100
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=min(args.get_warmup_steps(steps), steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError, KeyError) as error:
        schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        raise UserError(
            f"--lr_scheduler_type {schedule} with its --lr_scheduler_kwargs: {first_line(error)}"
        ) from None


def _check_schedule(args: ConvexConfig) -> None:
    """See that what transformers hands to some schedules alone is given for one of them."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    if args.warmup_steps >= 1 and args.warmup_steps != int(args.warmup_steps):
        raise UserError(f"--warmup_steps is a number of steps or, below 1, a share of them; not {args.warmup_steps}")
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if args.lr_scheduler_kwargs and schedule.startswith("constant"):
        raise UserError(f"--lr_scheduler_kwargs: the schedule {schedule} takes none; leave them out")
    make = TYPE_TO_SCHEDULER_FUNCTION.get(args.lr_scheduler_type)
    if args.warmup_steps and make is not None and "num_warmup_steps" not in inspect.signature(make).parameters:
        hint = "constant_with_warmup, or another" if schedule == "constant" else "another --lr_scheduler_type"
        raise UserError(f"--warmup_steps: the schedule {schedule} has no warmup; give {hint}, or leave it out")


def _checkpointing_names() -> set[str]:
    from torch.utils.checkpoint import checkpoint

    names = set(inspect.signature(checkpoint).parameters) - {"function", "args", "kwargs"}
    return names | {"preserve_rng_state", "selective"}  # the last is TRL's own, which torch does not get


# -- the rows and the model together


def check_rows(dataset: Any, name: str, model: Any, tokenizer: Any, args: ConvexConfig) -> None:
    """See that a model has an embedding for every token and every position of the rows to train on.

    Args:
        dataset: rows with `input_ids` and `weight`; of a stream the options alone are looked at.
        name: what the data are called.
        model: the model, wrapped by PEFT or not.
        tokenizer: the rows' own.
        args: the training options.

    Raises:
        UserError: it has not, or no record has a weight.
    """
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    streamed = not hasattr(dataset, "__len__")
    if known is not None and len(tokenizer) > known and not streamed:
        largest = pc.max(pc.list_flatten(dataset.data.column("input_ids"))).as_py()
        if largest >= known:
            raise UserError(
                f"{name}: the tokenizer makes the token {largest}, and the model has embeddings for {known} tokens; "
                "give --tokenizer_name the model's own tokenizer"
            )
    limit = _learned_positions(model)
    if limit is None:
        return
    longest = (args.max_length or math.inf) if streamed else _longest(dataset)
    if longest > limit:
        what = "records may be longer" if streamed else f"a record has {longest} tokens, more"
        raise UserError(
            f"{name}: {what} than the {limit} positions that the model has learned; give --max_length {limit} or less"
        )


def check_weights(dataset: Any, name: str, purpose: str = "train on") -> None:
    """See that some record of a dataset with the column `weight` counts.

    Raises:
        UserError: all weights are 0.
    """
    if not pc.max(dataset.data.column("weight")).as_py():
        raise UserError(f"{name}: every record has the weight 0, so there is nothing to {purpose}")


def say_if_the_same(trained_on: Mapping[str, Any], evaluated_on: Mapping[str, Any]) -> None:
    """Tell that evaluations are of the training data: of a folder or hub name the split `train` is taken for both.

    Args:
        trained_on: `name` and `content` of the one.
        evaluated_on: of the other.
    """
    known = [data["content"] for data in (trained_on, evaluated_on)]
    if known[0] == known[1] if None not in known else trained_on["name"] == evaluated_on["name"]:
        note(f"  {evaluated_on['name']}: what is evaluated on is what is trained on")


def check_generation_config(generation_config: Any, where: str = "the model's generation_config.json") -> None:
    """See that transformers will save a generation config with the checkpoints.

    It is stricter with one that was changed since it was loaded, and the Trainer changes it where the tokenizer has
    other special tokens (`transformers.trainer_utils.align_special_tokens`); so do that first.

    Args:
        generation_config: as the model has it when it is saved.
        where: what to call it.

    Raises:
        UserError: it will not; the options at fault are named.
    """
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with tempfile.TemporaryDirectory(prefix="convexlm-") as folder:
            generation_config.save_pretrained(folder)
    except (ValueError, TypeError) as error:
        found = re.findall(r"^- `(\w+)`: `(do_sample|num_beams)` is", str(error), re.MULTILINE)
        reasons = [
            f"it sets {' and '.join(names)} without {what}; {mend} there, or take out what it sets"
            for way, what, mend in (
                ("do_sample", "sampling", "set `do_sample` to true"),
                ("num_beams", "beam search", "set `num_beams` above 1"),
            )
            if (names := [name for name, of in found if of == way])
        ]
        reason = "; ".join(reasons) or " ".join(str(error).split("\n\n")[0].split())[:160]
        raise UserError(f"{where}: not valid, so no checkpoint could be saved: {reason}") from None
    finally:
        logging.set_verbosity(level)


def check_saved_generation_config(model: Path) -> None:
    """See that the generation config in a model's folder is one that transformers will save with the checkpoints.

    Whatever it says, it is saved as long as it stays as it was loaded. One without a padding token gets that of the
    tokenizer in training; whether another one changes is for the training to tell, before its first step.

    Raises:
        UserError: it is not, or it cannot be loaded.
    """
    from transformers import GenerationConfig

    file = model / "generation_config.json"
    if not file.is_file():
        return
    try:
        config = GenerationConfig.from_pretrained(str(model))
    except (ValueError, TypeError, OSError) as error:
        raise UserError(
            f"{file}: not valid, so the model cannot be loaded ({' '.join(str(error).split())[:160]})"
        ) from None
    if config.pad_token_id is None:
        config.pad_token_id = 0  # any will do
        check_generation_config(config, str(file))


def check_loader(loader: Any, records: int | None, args: ConvexConfig) -> None:
    """See that a data loader has a batch.

    Raises:
        UserError: there is none.
    """
    if records is not None and not len(loader):
        refuse_no_batch(records, args.per_device_train_batch_size, args.world_size)


def refuse_no_batch(records: int, batch: int, processes: int) -> NoReturn:
    """Say that so many records make no batch.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"{records} records, packed or not, make no whole batch of {batch} on {processes} processes, and "
        "--dataloader_drop_last drops the rest; leave it out, or take smaller batches"
    )


def _longest(dataset: Any) -> int:
    return int(pc.max(pc.list_value_length(dataset.data.column("input_ids"))).as_py())


def _learned_positions(model: Any) -> int | None:
    """How many positions a model has learned an embedding for; None if they are computed."""
    from torch.nn import Embedding

    config = model.config.get_text_config()
    learned = any(
        isinstance(module, Embedding) and _POSITIONS.search(name.rsplit(".", 1)[-1])
        for name, module in model.named_modules()
        if module is not model.get_input_embeddings()
    )
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if learned and isinstance(limit, int) else None
