"""Options that `ConvexTrainer` refuses at its start: their result would not be what the objective promises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasets import Dataset

from convexlm.collator import ConvexCollator
from convexlm.label_smoothing import refuse_label_smoothing
from convexlm.record_weights import check_record_weights, columns_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from convexlm.config import ConvexConfig
    from convexlm.objectives import Objective

WHOLE_SEQUENCES = "use `packing_strategy='bfd'`, which packs whole sequences, or `padding_free=True`"


def refuse_what_cannot_be_honoured(args: ConvexConfig, objective: Objective, given: Mapping[str, Any]) -> None:
    """Refuse combinations of options that can be told before model and data are loaded.

    Args:
        args: the training options.
        objective: what they say to minimise.
        given: the trainer's other arguments (`data_collator`, `compute_loss_func`, `processing_class`, ...).

    Raises:
        ValueError: there is one; the message is one line with the reason and what to do instead.
    """
    for reason in (*_other_losses(args, objective, given), *_layouts(args, objective, given), *_data(args, given)):
        raise ValueError(reason)


def refuse_lost_weights(collator: Any, datasets: Mapping[str, Any]) -> None:
    """Refuse records with a `weight` where a collator of the user's own would drop it.

    Args:
        collator: the trainer's.
        datasets: by what the message calls them.

    Raises:
        ValueError: there are such records.
    """
    if isinstance(collator, ConvexCollator):
        return
    for name, dataset in datasets.items():
        if "weight" in columns_of(dataset):
            raise ValueError(
                f"{name} has a column `weight`, which only a `convexlm.collator.ConvexCollator` hands on; leave "
                "`data_collator` out or remove the column"
            )


def refuse_packed_rows(collator: Any, datasets: Mapping[str, Any]) -> None:
    """Refuse packed rows where batches are padded, in which a row would count as one sequence.

    Args:
        collator: the trainer's; one of the user's own may see to such rows.
        datasets: by what the message calls them.

    Raises:
        ValueError: there are such rows.
    """
    if not isinstance(collator, ConvexCollator) or collator.padding_free or collator.packed_rows:
        return
    for name, dataset in datasets.items():
        if "seq_lengths" in (getattr(dataset, "column_names", None) or ()):
            raise ValueError(
                f"{name} is packed already (it has a column `seq_lengths`), and without `packing` a row would be "
                "one sequence, each of its records seeing those before it; use `packing=True` or `padding_free=True`"
            )


def _other_losses(args: ConvexConfig, objective: Objective, given: Mapping[str, Any]) -> list[str]:
    reasons = []
    if given.get("compute_loss_func") is not None:
        reasons.append("`compute_loss_func` would replace the objective; register an objective of your own instead")
    if args.loss_type != "nll":
        reasons.append(f"`loss_type={args.loss_type!r}` is TRL's; here `objective` chooses the loss (it has `dft`)")
    if args.label_smoothing_factor and (reason := refuse_label_smoothing(objective)):
        reasons.append(reason)
    if (args.liger_kernel_config or {}).get("fused_linear_cross_entropy"):
        reasons.append("Liger's fused linear cross-entropy computes a loss of its own and would ignore the objective")
    if not args.average_tokens_across_devices:
        reasons.append(
            "`average_tokens_across_devices=False` is not supported: objectives are normalised over the global batch"
        )
    if not args.accelerator_config.use_seedable_sampler:
        reasons.append(
            "`accelerator_config` with `use_seedable_sampler: false` draws the data's order anew after a resume; "
            "leave it out"
        )
    if not args.accelerator_config.even_batches:
        reasons.append(
            "`accelerator_config` with `even_batches: false` leaves some processes without a last batch, on which the "
            "others wait for ever; leave it out (records that fill up a batch do not count)"
        )
    return reasons


def _layouts(args: ConvexConfig, objective: Objective, given: Mapping[str, Any]) -> list[str]:
    reasons = []
    packs = args.packing or args.eval_packing
    if packs and args.packing_strategy != "bfd":
        cut = f"`packing_strategy={args.packing_strategy!r}` cuts sequences"
        if objective.length_weighting == "sequence":
            reasons.append(f"{cut}, and `length_weighting='sequence'` has to count them whole; {WHOLE_SEQUENCES}")
        elif objective.level == "sequence" and objective.name != "mle":
            reasons.append(
                f"{cut}, and `{objective.name}` at sequence level needs each one's mean log-probability; "
                f"{WHOLE_SEQUENCES}, or `level='token'`"
            )
    if args.eval_packing and not args.packing and not args.padding_free:
        reasons.append(
            "`eval_packing` without `packing` needs `padding_free=True`: batches that are padded do not say where a "
            "packed sequence ends"
        )
    if args.padding_side == "left":
        if args.packing or args.padding_free:
            reasons.append("`padding_side='left'` has no meaning without padding (`packing` or `padding_free`)")
        elif given.get("data_collator") is not None:
            reasons.append("`padding_side='left'` is for the trainer's collator; let your `data_collator` pad left")
    return reasons


def _data(args: ConvexConfig, given: Mapping[str, Any]) -> list[str]:
    named = {f"`{name}`": dataset for name, dataset in _datasets(given).items()}
    reasons = [f"{name} is empty" for name, dataset in named.items() if isinstance(dataset, Dataset) and not dataset]
    if (collator := given.get("data_collator")) is not None:
        refuse_lost_weights(collator, named)
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):  # which looks at them else
        for name, dataset in _datasets(given).items():
            check_record_weights(dataset, name)
    processor = given.get("processing_class")
    if args.assistant_only_loss and processor is not None and args.chat_template_path is None:
        template = getattr(processor, "chat_template", None)
        if not template:
            reasons.append(
                "`assistant_only_loss` needs a chat template with `{% generation %}` marks, and the tokenizer has no "
                "chat template; give `chat_template_path`, or train on prompt and completion"
            )
    return reasons


def _datasets(given: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's datasets by the names that a user knows them by."""
    found = {"train_dataset": given.get("train_dataset")}
    evaluated = given.get("eval_dataset")
    if isinstance(evaluated, dict):
        return found | {f"eval_dataset[{key!r}]": dataset for key, dataset in evaluated.items()}
    return found | {"eval_dataset": evaluated}
