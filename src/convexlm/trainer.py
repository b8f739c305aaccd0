"""`ConvexTrainer`: TRL's `SFTTrainer` with an objective, exact however the batch is split.

What is TRL's stays TRL's: data preparation, packing, PEFT. What differs is here: the loss is an objective, computed by
the fused head without holding the logits, its normaliser is counted over the whole global batch (micro-batches and
ranks), records may carry a `weight`, and the statistics that are logged are sums over the same batch.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from transformers import PrinterCallback, ProgressCallback
from trl import SFTTrainer

from convexlm.accelerate_environment import leave_the_environment
from convexlm.adapter_refusals import refuse_adapters
from convexlm.adapters import regularised_in_parts, show_forward
from convexlm.causality import refuse_looking_ahead, refuse_other_models
from convexlm.checkpoints import checkpoint_to_resume
from convexlm.collator import RECORD, ROW, WEIGHT, ConvexCollator, keeps_packed_rows, sequences_of
from convexlm.config import ConvexConfig
from convexlm.durable import DurableCheckpoints
from convexlm.foreign_states import ForeignStates
from convexlm.fsdp import optimizer_not_sharded, refuse_adapters_under_fsdp, untie_trained_copies
from convexlm.fused_forward import HeadCall, add_fused_objective, experts_of, keep_output_dtype, logit_transform
from convexlm.head_agreement import refuse_other_logits
from convexlm.label_smoothing import refuse_label_smoothing
from convexlm.log_lines import LogLines, ProgressLines
from convexlm.nonfinite import NonFiniteGuard, take_records
from convexlm.normalizer import count_targets
from convexlm.objectives import IGNORE_INDEX, MINIMUM_STATISTICS, Objective, merge_statistics, summarize, warmed_up
from convexlm.prepared_data import PreparedData
from convexlm.quantized import keep_gradients
from convexlm.record_separation import refuse_mixing
from convexlm.refusals import refuse_packed_rows, refuse_what_cannot_be_honoured
from convexlm.repeats import NoRepeats
from convexlm.sampling import SamplingOrder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

logger = logging.getLogger(__name__)

leave_the_environment()


class ConvexTrainer(
    NonFiniteGuard, DurableCheckpoints, ForeignStates, SamplingOrder, NoRepeats, PreparedData, SFTTrainer
):
    """Trains a causal language model with `args.objective`. Takes what `trl.SFTTrainer` takes, by keyword.

    A dataset may have a column `weight` (a finite number of at least 0 a record, 1 if absent): it multiplies the
    record's part in loss, gradient and normaliser. A column `record_id` names records in reports.

    Raises:
        ValueError: a combination of options whose result would not be what the objective promises.
        Stopped: from `train`, at a step whose loss or gradient is not finite (see `convexlm.nonfinite`).
    """

    _tag_names = ["trl", "sft", "convexlm"]
    _name = "SFT"

    def __init__(self, model: Any, args: ConvexConfig | None = None, **kwargs: Any) -> None:
        if args is None:
            args = ConvexConfig(output_dir="convexlm-output")
        if not isinstance(args, ConvexConfig):
            raise ValueError(
                f"`args` must be a ConvexConfig, which takes every option of SFTConfig, not {type(args).__name__}"
            )
        self.objective: Objective = args.build_objective()
        refuse_what_cannot_be_honoured(args, self.objective, kwargs)
        if reason := optimizer_not_sharded(args):
            raise ValueError(reason)
        if not isinstance(model, str):
            refuse_other_models(model)
        self._statistics: dict[str, dict[str, Tensor] | None] = {"train": None, "eval": None}
        self._seen: Tensor | None = None
        self._resumed_from: str | None = None
        # TRL refuses `max_length` with `padding_free`, for it does not enforce it; `_prepare_dataset` below does.
        limit, prepares = args.max_length, not (args.dataset_kwargs or {}).get("skip_prepare_dataset")
        self._lifted_max_length = limit if args.padding_free and not args.packing and prepares else None
        try:
            args.max_length = None if self._lifted_max_length is not None else limit
            super().__init__(model=model, args=args, **kwargs)
        finally:
            args.max_length = limit
        if self._is_vision_dataset:
            raise ValueError("datasets with images are not supported: objectives are defined on text targets")
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled or parallelism.tp_enabled):
            raise ValueError(
                "context, sequence and tensor parallelism are not supported: they split a sequence over devices, and "
                "its mean log-probability is not reduced over them; use FSDP, DeepSpeed ZeRO or DDP"
            )
        refuse_adapters(
            self.model,
            flat=self.padding_free,
            left=args.padding_side == "left",
            checkpointing=args.gradient_checkpointing,
            router_loss=self.aux_loss_enabled,
            best=args.load_best_model_at_end,
        )
        if self.is_fsdp_enabled:
            whole = "FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
            refuse_adapters_under_fsdp(self.model, whole_states=whole)
            untie_trained_copies(self.model)
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        refuse_other_models(base)
        keep_gradients(base)
        if kwargs.get("data_collator") is None:
            in_rows = self.padding_free and not args.padding_free and keeps_packed_rows(base.config)
            self.data_collator = ConvexCollator(
                pad_token_id=self._tokenizer.pad_token_id,
                padding_free=self.padding_free and not in_rows,
                packed_rows=in_rows,
                pad_to_multiple_of=args.pad_to_multiple_of,
                padding_side=args.padding_side,
            )
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for name, dataset in {"train": self.train_dataset, **evaluated}.items():
            refuse_packed_rows(self.data_collator, {f"the {name} dataset": dataset})
        if self.padding_free:
            refuse_mixing(self, base)
        if self.aux_loss_enabled:
            experts_of(base.config.get_text_config())
        softcap = logit_transform(base.config.get_text_config())[1]
        if args.label_smoothing_factor and (reason := refuse_label_smoothing(self.objective, softcap)):
            raise ValueError(reason)
        add_fused_objective(base)
        show_forward(self.model, base)
        keep_output_dtype(self.accelerator)
        refuse_other_logits(self, base)
        refuse_looking_ahead(self, base)
        # Both print to stdout, which belongs to results.
        for printing, quiet in ((PrinterCallback, LogLines), (ProgressCallback, ProgressLines)):
            if any(type(callback) is printing for callback in self.callback_handler.callbacks):
                self.remove_callback(printing)
                self.add_callback(quiet)
        # The loss comes normalised by the global batch, so the Trainer must not divide it by the accumulation steps.
        self.loss_is_scaled_for_ga = True
        self._init_guard()
        self._init_durable()
        if not getattr(kwargs.get("train_dataset"), "endless", False):
            self._warn_of_a_stream(self.train_dataset, "training")

    # -- loss ---------------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of one optimizer step, and their normaliser over all ranks in place of a token count."""
        batches: list[Any] = []
        self._begin_step()
        for _ in range(num_batches):
            try:
                batch, records = take_records(next(epoch_iterator))
            except StopIteration:
                break
            self._records.append(records)
            batch, seen = self._without_repeats(batch, training=True)
            self._seen = seen if self._seen is None else self._seen + seen
            batches.append(batch)
        if not batches:
            return batches, None
        batches, repeated = self._without_fillers(batches)
        self._seen = self._seen - repeated
        by_length = self.objective.length_weighting == "token"
        count = torch.stack([count_targets(batch, by_length).to(device) for batch in batches]).sum()
        while len(batches) < num_batches:
            # Only a stream ends unforeseen. The Trainer steps at the last micro-batch it expects, so without these
            # (which count nothing) the gradient would be left over for the next epoch's first step.
            batches.append({**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX)})
            self._records.append([])
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
        inputs = dict(inputs if mode == "train" else self._without_repeats(inputs, training=False)[0])
        inputs.pop(RECORD, None)
        token_weights = inputs.pop(WEIGHT, None)
        rows = inputs.pop(ROW, None)
        inputs["use_cache"] = False
        call = self._head_call(mode, inputs, token_weights, num_items_in_batch)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
            call = replace(call, attended=None if rows is None else rows >= 0)
        # What is no sum over targets is averaged over the micro-batches of a step, and over the processes.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        world = self.accelerator.num_processes if num_items_in_batch is not None else 1
        with regularised_in_parts(self.model, steps * world):
            outputs = model(**inputs, fused_objective=call)
        if getattr(outputs, "statistics", None) is None:
            raise ValueError(
                f"{type(self.model).__name__} puts a forward pass of its own around the model's, which left the loss "
                "out; this adapter or wrapper is not supported"
            )
        # DDP averages gradients over ranks; this loss is a part of a sum.
        loss = outputs.loss * world
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(outputs.aux_loss.detach()).mean().item())
        if mode == "train":
            loss = self._watch_loss(loss)
        kept = self._statistics[mode]
        self._statistics[mode] = outputs.statistics if kept is None else merge_statistics(kept, outputs.statistics)
        if not return_outputs:
            return loss
        with torch.no_grad():
            found = model(**{key: value for key, value in inputs.items() if key != "labels"})
        # Of virtual tokens PEFT gives logits, too; those of the batch come last.
        found.logits = found.logits[:, -inputs["labels"].shape[1] :]
        return loss, found

    def _head_call(
        self, mode: str, inputs: dict[str, Any], token_weights: Tensor | None, normalizer: Tensor | int | None
    ) -> HeadCall:
        sequence_ids = sequences_of(inputs)
        if token_weights is not None and self._wraps(mode):
            # A row holds pieces of several records and nobody knows where one ends; `wrapped` is allowed only
            # where a loss is a sum over tokens, so each token may stand for itself.
            labels = inputs["labels"]
            sequence_ids = torch.arange(labels.shape[1], device=labels.device).expand(labels.shape)
        return HeadCall(
            self._objective_now(),
            normalizer,
            sequence_ids,
            token_weights,
            recompute=self.args.head == "recompute",
            chunk_tokens=self.args.head_chunk_tokens,
            label_smoothing=self.args.label_smoothing_factor if mode == "train" else 0.0,
        )

    def _objective_now(self) -> Objective:
        warmup_steps = self.args.k_warmup * self.state.max_steps
        if not self.model.training or warmup_steps <= 0:
            return self.objective
        return warmed_up(self.objective, min(1.0, (self.state.global_step + 1) / warmup_steps))

    def _wraps(self, mode: str) -> bool:
        args = self.args
        packs = args.packing if mode == "train" or args.eval_packing is None else args.eval_packing
        return packs and args.packing_strategy == "wrapped"

    # -- what a user watches ------------------------------------------------------------------------------------------

    def _take_statistics(self, mode: str) -> dict[str, float]:
        """The statistics since the last call, over all ranks, as what is logged; empty if there were none."""
        statistics, self._statistics[mode] = self._statistics[mode], None
        if statistics is None:
            return {}
        if mode == "train" and self._seen is not None:
            statistics["seen"], self._seen = self._seen, None
        names = sorted(statistics)
        dtype = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        local = torch.stack([statistics[name].to(self.accelerator.device, dtype) for name in names])
        per_rank = self.accelerator.gather(local[None])
        merged = {
            name: column.min() if name in MINIMUM_STATISTICS else column.sum()
            for name, column in zip(names, per_rank.unbind(1), strict=True)
        }
        # An evaluation in which nothing counted has no figures: 0 would be a perfect one, and the best.
        empty = math.nan if mode == "eval" else 0.0
        summary = summarize(merged, empty)
        summary["num_target_tokens"] = int(summary["num_target_tokens"])
        tokens = float(merged["tokens"])
        summary["token_accuracy"] = float(merged["correct"]) / tokens if tokens else empty
        summary["entropy"] = float(merged["entropy_sum"]) / tokens if tokens else empty
        if "seen" in merged:
            # Counted on from the log, so that a run that was stopped and resumed counts all of its tokens.
            before = (line["num_tokens"] for line in reversed(self.state.log_history) if "num_tokens" in line)
            self._total_train_tokens = int(next(before, 0)) + int(merged["seen"])
            summary["num_tokens"] = self._total_train_tokens
        return summary

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer, whose mean loss is here over the steps that were not skipped.

        Raises:
            ValueError: the model has no parameter to train, or there is nothing whole to resume from.
        """
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "the model has no parameter to train, all are frozen (`requires_grad`); an adapter from "
                "`PeftModel.from_pretrained` is trained with `is_trainable=True`"
            )
        resume = args[0] if args else kwargs.pop("resume_from_checkpoint", None)
        self._resumed_from = checkpoint_to_resume(resume, self.args.output_dir)
        output = super().train(self._resumed_from, *args[1:], **kwargs)
        return output._replace(training_loss=output.metrics.get("train_loss", output.training_loss))

    def _begin_training(self) -> None:
        """Forget the statistics of an earlier run, or of one that ran out of memory and begins again."""
        self._statistics["train"] = self._seen = None
        self._metrics["train"].clear()
        self._reset_guard()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the objective's statistics to what the Trainer logs in training."""
        if "loss" in logs:
            statistics = self._take_statistics("train")
            # The Trainer's own figure is the mean over steps of each step's loss: the two agree at logging_steps=1.
            statistics.pop("loss", None)
            logs.update(statistics)
            self._guard_logs(logs)
            self._watch_collapse(logs)
        elif "train_loss" in logs:
            self._guard_summary(logs)
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loop; loss and statistics are those of the whole evaluation set, not means over batches."""
        self._statistics["eval"] = None
        self._metrics["eval"].clear()
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[2] if len(args) > 2 else "eval")
        output.metrics.update({f"{prefix}_{key}": value for key, value in self._take_statistics("eval").items()})
        # TRL would put it into the next log, whatever that is of, and under the name of no data set.
        if losses := self._metrics["eval"].pop("aux_loss", None):
            output.metrics[f"{prefix}_aux_loss"] = sum(losses) / len(losses)
        return output
