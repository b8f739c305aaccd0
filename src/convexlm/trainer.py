"""`ConvexTrainer`: TRL's `SFTTrainer` with an objective, exact however the batch is split.

What is TRL's stays TRL's: data preparation, packing, PEFT, the chunked LM head that yields the target tokens'
log-probabilities without holding the logits. What differs is here: the loss is an objective of them, its normaliser
is counted over the whole global batch (micro-batches and ranks), records may carry a `weight`, and the
statistics that are logged are sums over the same batch.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback
from trl import SFTTrainer, pack_dataset

from convexlm.collator import ROW, WEIGHT, ConvexCollator, check_weight
from convexlm.config import ConvexConfig
from convexlm.objectives import IGNORE_INDEX, MINIMUM_STATISTICS, Objective, merge_statistics, summarize, warmed_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

logger = logging.getLogger(__name__)

WHOLE_SEQUENCES = "`bfd` (packs whole sequences) or `padding_free=True`"


class ConvexTrainer(SFTTrainer):
    """Trains a causal language model with `args.objective`. Takes what `trl.SFTTrainer` takes.

    A dataset may have a column `weight` (a finite number of at least 0 a record, 1 if absent): it multiplies the
    record's part in loss, gradient and normaliser.

    Raises:
        ValueError: a combination of options whose result would not be what the objective promises.
    """

    _tag_names = ["trl", "sft", "convexlm"]
    _name = "SFT"

    def __init__(self, model: Any, args: ConvexConfig | None = None, **kwargs: Any) -> None:
        if args is None:
            args = ConvexConfig(output_dir="convexlm-output")
        if not isinstance(args, ConvexConfig):
            raise ValueError(f"`args` must be a ConvexConfig, not {type(args).__name__}")
        self.objective: Objective = args.build_objective()
        _refuse_what_cannot_be_honoured(args, self.objective, kwargs)
        super().__init__(model=model, args=args, **kwargs)
        if self._is_vision_dataset:
            raise ValueError("datasets with images are not supported: objectives are defined on text targets")
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled or parallelism.tp_enabled):
            raise ValueError(
                "context, sequence and tensor parallelism are not supported: they split a sequence over devices, and "
                "its mean log-probability is not reduced over them; use FSDP, DeepSpeed ZeRO or DDP"
            )
        if kwargs.get("data_collator") is None:
            self.data_collator = ConvexCollator(
                pad_token_id=self._tokenizer.pad_token_id,
                padding_free=self.padding_free,
                pad_to_multiple_of=args.pad_to_multiple_of,
                padding_side=args.padding_side,
            )
        # Both print to stdout, which belongs to results.
        self.remove_callback(PrinterCallback)
        if not args.disable_tqdm and any(isinstance(c, ProgressCallback) for c in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.add_callback(_SilentProgress)
        # The loss comes normalised by the global batch, so the Trainer must not divide it by the accumulation steps.
        self.loss_is_scaled_for_ga = True
        self._statistics: dict[str, dict[str, Tensor] | None] = {"train": None, "eval": None}

    # -- data ---------------------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """TRL's preparation, with the `weight` column carried through packing."""
        columns = dataset.column_names
        has_weights = columns is not None and "weight" in columns
        if isinstance(dataset, Dataset) and has_weights:
            for number, weight in enumerate(dataset["weight"]):
                try:
                    check_weight(1.0 if weight is None else float(weight))
                except ValueError as error:
                    raise ValueError(f"{dataset_name} dataset, record {number}: {error}") from None
        before = len(dataset) if isinstance(dataset, Dataset) else None
        if packing and has_weights:
            dataset = self._prepare_packed(dataset, processing_class, args, formatting_func, dataset_name)
        else:
            dataset = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if before is not None and not packing and len(dataset) < before:
            logger.warning(
                "%s dataset: %d of %d records were dropped, for no target token of theirs lies within max_length=%s",
                *(dataset_name, before - len(dataset), before, args.max_length),
            )
        return dataset

    def _prepare_packed(self, dataset: Any, processing_class: Any, args: Any, formatting_func: Any, name: str) -> Any:
        # TRL's own packing keeps only token columns, so the weight becomes one: a number for every token.
        unpacked_args = copy.copy(args)
        if args.packing_strategy != "bfd":
            unpacked_args.max_length = None  # these strategies split what is too long; truncation would lose it
        dataset = super()._prepare_dataset(dataset, processing_class, unpacked_args, False, formatting_func, name)
        map_kwargs = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}

        def spread(example: dict[str, Any]) -> dict[str, list[float]]:
            weight = example["weight"]
            return {"weight": [1.0 if weight is None else float(weight)] * len(example["input_ids"])}

        dataset = dataset.map(lambda example: {"_weight": spread(example)["weight"]}, **map_kwargs)
        dataset = dataset.select_columns(["input_ids", "labels", "_weight"]).rename_column("_weight", "weight")
        dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, map_kwargs)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "weight" not in self._signature_columns:
            self._signature_columns.append("weight")

    # -- loss ---------------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of one optimizer step, and their normaliser over all ranks in place of a token count."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        by_length = self.objective.length_weighting == "token"
        count = torch.stack([_count(batch, by_length).to(device) for batch in batches]).sum()
        return batches, self.accelerator.gather(count.reshape(1)).sum()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's part of the global batch's loss in this micro-batch; keeps its statistics.

        Args:
            model: the model, wrapped or not.
            inputs: a batch of the collator.
            return_outputs: also return the model's outputs with logits (an extra forward pass), as TRL does.
            num_items_in_batch: the global batch's normaliser from `get_batch_samples`; None in evaluation.
        """
        mode = "train" if self.model.training else "eval"
        inputs = dict(inputs)
        token_weights, rows = inputs.pop(WEIGHT, None), inputs.pop(ROW, None)
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        outputs = model(**inputs, fused_lm_head=True)
        mask, log_probs = outputs.label_mask, outputs.log_probs
        if mode == "eval":
            mask = mask & self._counts_in_evaluation(rows, mask)
        sequence_ids = inputs.get("seq_idx")
        out = self._objective_now()(
            log_probs,
            mask,
            sequence_ids=None if sequence_ids is None else sequence_ids[:, 1:],
            normalizer=num_items_in_batch,
            sample_weights=_as_sample_weights(token_weights, mask, packed=sequence_ids is not None),
        )
        loss = out.loss
        if num_items_in_batch is not None:
            loss = (
                loss * self.accelerator.num_processes
            )  # DDP averages gradients over ranks; this loss is a part of a sum
        if self.aux_loss_enabled:
            # A mean over the micro-batch, so it is averaged over the accumulation steps.
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(outputs.aux_loss.detach()).mean().item())
        self._keep_statistics(mode, out, outputs, mask, inputs)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**{key: value for key, value in inputs.items() if key != "labels"})

    def _objective_now(self) -> Objective:
        warmup_steps = self.args.k_warmup * self.state.max_steps
        if not self.model.training or warmup_steps <= 0:
            return self.objective
        return warmed_up(self.objective, min(1.0, (self.state.global_step + 1) / warmup_steps))

    def _counts_in_evaluation(self, rows: Tensor | None, mask: Tensor) -> Tensor:
        """False on records that a distributed evaluation sees twice, its last batch having been filled up."""
        state = self.accelerator.gradient_state
        everything = torch.ones(1, 1, dtype=torch.bool, device=mask.device)
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return everything
        first = self.accelerator.process_index * self.args.per_device_eval_batch_size
        rows = torch.arange(mask.shape[0], device=mask.device)[:, None] if rows is None else rows[:, 1:]
        return everything & (first + rows < state.remainder)

    # -- what a user watches ------------------------------------------------------------------------------------------

    def _keep_statistics(self, mode: str, out: Any, outputs: Any, mask: Tensor, inputs: dict[str, Any]) -> None:
        statistics = out.statistics()
        like = statistics["num_tokens"]
        statistics["correct"] = (outputs.is_top1 * mask).sum().to(like)
        statistics["entropy_sum"] = (outputs.entropy.detach() * mask).sum().to(like)
        statistics["scored"] = mask.sum().to(like)
        attention = inputs.get("attention_mask")
        seen = attention.sum() if attention is not None else torch.tensor(inputs["input_ids"].numel())
        statistics["seen"] = seen.to(like)
        kept = self._statistics[mode]
        self._statistics[mode] = statistics if kept is None else merge_statistics(kept, statistics)

    def _take_statistics(self, mode: str) -> dict[str, float]:
        """The statistics since the last call, over all ranks, as what is logged; empty if there were none."""
        statistics, self._statistics[mode] = self._statistics[mode], None
        if statistics is None:
            return {}
        names = sorted(statistics)
        local = torch.stack([statistics[name].to(self.accelerator.device) for name in names])
        per_rank = self.accelerator.gather(local[None])
        merged = {
            name: column.min() if name in MINIMUM_STATISTICS else column.sum()
            for name, column in zip(names, per_rank.unbind(1), strict=True)
        }
        summary = summarize(merged)
        scored = max(float(merged["scored"]), 1.0)
        summary["token_accuracy"] = float(merged["correct"]) / scored
        summary["entropy"] = float(merged["entropy_sum"]) / scored
        if mode == "train":
            self._total_train_tokens += int(merged["seen"])
            summary["num_tokens"] = self._total_train_tokens
        return summary

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the objective's statistics to what the Trainer logs in training."""
        if "loss" in logs:
            statistics = self._take_statistics("train")
            # The Trainer's own figure is the mean over steps of each step's loss: the two agree at logging_steps=1.
            statistics.pop("loss", None)
            logs.update(statistics)
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loop; loss and statistics are those of the whole evaluation set, not means over batches."""
        self._statistics["eval"] = None
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[2] if len(args) > 2 else "eval")
        output.metrics.update({f"{prefix}_{key}": value for key, value in self._take_statistics("eval").items()})
        return output


class _SilentProgress(ProgressCallback):
    """transformers' progress bar (on stderr) without the lines that it prints to stdout at every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Nothing: the statistics are in `metrics.jsonl` and with the trackers."""


def _refuse_what_cannot_be_honoured(args: ConvexConfig, objective: Objective, kwargs: dict[str, Any]) -> None:
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError("`compute_loss_func` would replace the objective; register an objective of your own instead")
    if args.loss_type != "nll":
        raise ValueError(
            f"`loss_type={args.loss_type!r}` is TRL's; here the loss is chosen by `objective` (it has `dft`)"
        )
    if args.label_smoothing_factor:
        raise ValueError("`label_smoothing_factor` is not supported: it needs the full logits; consider `mle_mix`")
    if (args.liger_kernel_config or {}).get("fused_linear_cross_entropy"):
        raise ValueError(
            "Liger's fused linear cross-entropy computes a loss of its own; the objective would be ignored"
        )
    if not args.average_tokens_across_devices:
        raise ValueError(
            "`average_tokens_across_devices=False` is not supported: objectives are normalised over the global batch"
        )
    packs = args.packing or args.eval_packing
    cuts = packs and args.packing_strategy != "bfd"
    if (
        cuts
        and (objective.level == "sequence" or objective.length_weighting == "sequence")
        and objective.name != "mle"
    ):
        raise ValueError(
            f"`packing_strategy={args.packing_strategy!r}` cuts sequences, and this objective needs whole ones; "
            f"use {WHOLE_SEQUENCES}"
        )
    if cuts and objective.name == "mle" and objective.length_weighting == "sequence":
        raise ValueError(
            f"`packing_strategy={args.packing_strategy!r}` cuts sequences, and can count none; use {WHOLE_SEQUENCES}"
        )
    if args.padding_side == "left" and (args.packing or args.padding_free):
        raise ValueError("`padding_side='left'` has no meaning without padding (`packing` or `padding_free`)")


def _as_sample_weights(token_weights: Tensor | None, mask: Tensor, packed: bool) -> Tensor | None:
    """Weights as an objective takes them: one a row, or one a token where a row holds several sequences."""
    if token_weights is None:
        return None
    if packed:
        return token_weights[:, 1:]
    return token_weights.amax(dim=1)  # constant within a row but for its padding, which is 0


def _count(batch: dict[str, Tensor], by_length: bool) -> Tensor:
    """Target tokens, or sequences with a target token, of a batch, each counted with its weight: 0-d float32."""
    mask = batch["labels"][:, 1:] != IGNORE_INDEX
    weights = batch.get(WEIGHT)
    per_token = mask.float() if weights is None else weights[:, 1:].to(mask.device) * mask
    if by_length:
        return per_token.sum()
    ids = batch.get("seq_idx")
    if ids is None:
        return per_token.amax(dim=1).sum() if per_token.shape[1] else per_token.sum()
    ids = ids[:, 1:].to(mask.device).long()
    per_sequence = torch.zeros(mask.shape[0], int(ids.max()) + 1 if ids.numel() else 1, device=mask.device)
    return per_sequence.scatter_reduce(1, ids, per_token, "amax").sum()
