"""A step with a loss or gradient that is not finite: stopped with a report, or skipped and counted.

A loss that is not finite makes the micro-batch's gradients NaN, so after the gradients' reduction the gradient norm
tells every process the same. Where gradients are scaled (fp16), norms that are not finite are the scaler's daily
work, and the losses alone are asked.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from convexlm.collator import RECORD
from convexlm.errors import Stopped
from convexlm.files import write_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

logger = logging.getLogger(__name__)

MOST_SKIPS_IN_A_ROW = 100
LOGS_OF_A_COLLAPSE = 3
_SHOWN = 8


class NonFiniteGuard:
    """Mixed into a Trainer before its class; heeds `skip_nonfinite_steps` and `min_effective_sample_size` of its args.

    Attributes:
        skipped_steps: how many steps of the whole run were skipped.
    """

    skipped_steps: int
    _record_names: Any = None  # of packed rows, whose tokens carry record numbers

    def _init_guard(self: Any) -> None:
        self._reset_guard()
        self._losses: list[Tensor] = []
        self._records: list[Any] = []
        self._before_step: tuple[Any, ...] = ()
        if self.args.skip_nonfinite_steps and self.is_deepspeed_enabled:
            raise ValueError(
                "`skip_nonfinite_steps` is not supported with DeepSpeed, whose backward pass updates the weights; "
                "leave it out (such a step then stops the run), or use FSDP or DDP"
            )

    def _reset_guard(self: Any) -> None:
        self.skipped_steps = self._skips_in_a_row = self._skipped_before = 0
        self._steps_since_log = self._skips_since_log = 0
        self._low_logs, self._warned_of_collapse = 0, False
        self._restored_loss = 0.0  # the part of steps before a resume in what is logged first

    def _guard_counts(self: Any) -> dict[str, Any]:
        """What a checkpoint has to keep."""
        return {
            "skipped_steps": self.skipped_steps,
            "skips_in_a_row": self._skips_in_a_row,
            "steps_since_log": self._steps_since_log,
            "skips_since_log": self._skips_since_log,
            "low_logs": self._low_logs,
            "warned_of_collapse": self._warned_of_collapse,
        }

    def _restore_guard_counts(self: Any, counts: dict[str, Any]) -> None:
        self.skipped_steps = self._skipped_before = counts["skipped_steps"]
        self._skips_in_a_row = counts["skips_in_a_row"]
        self._steps_since_log, self._skips_since_log = counts["steps_since_log"], counts["skips_since_log"]
        self._low_logs, self._warned_of_collapse = counts["low_logs"], counts["warned_of_collapse"]

    # -- a step -------------------------------------------------------------------------------------------------------

    def _begin_step(self: Any) -> None:
        """Forget the last step; keep what a skipped one must leave as it was."""
        self._losses.clear()
        self._records.clear()
        if self.args.skip_nonfinite_steps:
            self._before_step = (self._tr_loss.clone(), self._statistics["train"], self._seen)

    def _watch_loss(self: Any, loss: Tensor) -> Tensor:
        """Keep a micro-batch's loss; one that is not finite comes back so that its gradients are NaN, too."""
        kept = loss.detach()
        self._losses.append(kept)
        if self.is_deepspeed_enabled and self._is_bad(None):  # its backward pass updates the weights
            self._leave_out(self.model, None, updated=False)
        return loss * torch.where(kept.isfinite(), 1.0, math.nan).to(loss)

    def _get_grad_norm(self: Any, model: Any, grad_norm: Any = None) -> Any:
        """The Trainer's gradient norm, after which it updates the weights: the last moment to say no."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        self._steps_since_log += 1
        if hasattr(self.optimizer, "_is_overflow") and not self._scales_gradients():
            self.optimizer._is_overflow = False
        if not self._is_bad(norm):
            self._skips_in_a_row = 0
            return norm
        self._leave_out(model, norm, updated=self.is_deepspeed_enabled)
        return norm

    def _leave_out(self: Any, model: Any, norm: Any, *, updated: bool) -> None:
        """Stop at a bad step, or skip it; `updated`: whether the weights have been updated with it already."""
        report = self._report(norm)
        path = Path(self.args.output_dir) / f"nonfinite-step-{report['step']}.json"
        if self.args.should_save:
            write_atomic(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        what = (
            f"step {report['step']}: loss {report['loss']}, gradient norm {report['grad_norm']}; "
            f"records {_names(report['record_ids'])}; report {path}"
        )
        if not self.args.skip_nonfinite_steps:
            said = "DeepSpeed had made its update by then" if updated else "No update was made"
            self._stop(f"{what}. {said}. {_advice(report, self.is_deepspeed_enabled)}")
        if not report["weights_finite"]:
            self._stop(f"{what}. The weights are not finite themselves, so skipping steps cannot help")
        if self._skips_in_a_row + 1 >= MOST_SKIPS_IN_A_ROW:
            self._stop(f"{what}. {MOST_SKIPS_IN_A_ROW} steps in a row were skipped. {_advice(report, False)}")
        if self.accelerator.is_main_process:
            logger.warning("skipped %s", what)
        self._skip(model)

    def _is_bad(self: Any, norm: Any) -> bool:
        finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        for loss in self._losses:  # none where a subclass has a `compute_loss` of its own
            finite = finite & loss.isfinite().all()
        if not self._scales_gradients() and norm is not None:
            total = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            finite = finite & torch.as_tensor(total, device=finite.device).isfinite().all()
        if self.accelerator.num_processes > 1:
            finite = self.accelerator.gather(finite.reshape(1)).all()
        return not bool(finite)

    def _scales_gradients(self: Any) -> bool:
        return getattr(self.accelerator, "scaler", None) is not None or (self.is_deepspeed_enabled and self.args.fp16)

    def _skip(self: Any, model: Any) -> None:
        self.skipped_steps += 1
        self._skips_in_a_row += 1
        self._skips_since_log += 1
        self._before_step, (loss, self._statistics["train"], self._seen) = (), self._before_step
        self._tr_loss.copy_(loss)
        if not self._scales_gradients():  # else the scaler finds the NaN, makes no update and lowers its scale
            # No optimizer touches a parameter without a gradient, neither by momentum nor by weight decay.
            model.zero_grad(set_to_none=True)
            # The schedule stands still where the optimizer says that it did, as after an overflow in fp16.
            self.optimizer._is_overflow = True

    def _stop(self: Any, message: str) -> None:
        self.accelerator.wait_for_everyone()
        raise Stopped(message)

    # -- the report ---------------------------------------------------------------------------------------------------

    def _report(self: Any, norm: Any) -> dict[str, Any]:
        """What is known of the step, from all processes."""
        own = [
            {
                "process": self.accelerator.process_index,
                "loss": _number(loss),
                "record_ids": self._names_of(records),
            }
            for loss, records in zip(self._losses, self._records, strict=False)  # stopped early, some have no loss yet
        ]
        batches = gather_object(own)
        finite = all(bool(p.detach().isfinite().all()) for p in map(_local, self.model.parameters()))
        finite = all(gather_object([finite]))
        bad = [batch for batch in batches if not isinstance(batch["loss"], float)] or batches
        ids = None if any(b["record_ids"] is None for b in bad) else [name for b in bad for name in b["record_ids"]]
        losses = [batch["loss"] for batch in batches]
        # Each is its process's part of a mean over processes.
        total = sum(float(loss) for loss in losses) / self.accelerator.num_processes
        return {
            "step": self.state.global_step + 1,
            "loss": _number(total),
            "grad_norm": _number(norm),
            "learning_rate": self._get_learning_rate(),
            "objective": self._objective_now().to_dict(),
            "weights_finite": finite,
            "record_ids": ids,
            "micro_batches": batches,
        }

    def _names_of(self: Any, records: Any) -> list[str] | None:
        """The ids of a micro-batch's records; None where the data have none."""
        if records is None:
            return None
        flat = [one for entry in records for one in (entry if isinstance(entry, (list, tuple)) else [entry])]
        unique = list(dict.fromkeys(flat))
        if self._record_names is None:
            return [str(one) for one in unique]
        return [str(self._record_names[int(one)]) for one in unique]

    # -- what is logged -----------------------------------------------------------------------------------------------

    def _guard_logs(self: Any, logs: dict[str, Any]) -> None:
        """Put the count of skipped steps into what is logged, and the loss over those that were not."""
        if self.args.skip_nonfinite_steps:
            made = self._steps_since_log - self._skips_since_log
            if self._skips_since_log:
                logs["loss"] = logs["loss"] * self._steps_since_log / made if made else math.nan
            logs["skipped_steps"] = self.skipped_steps
        self._steps_since_log = self._skips_since_log = 0

    def _guard_summary(self: Any, logs: dict[str, Any]) -> None:
        """Make the mean loss at the end one over the steps that this call has made, and over all processes.

        The Trainer takes each process's own part of what was not logged any more, and has in it what `--resume` took
        up of steps before; a skipped step counts as 0 there.
        """
        steps, skipped = self.state.global_step - self._initial_global_step, self.skipped_steps - self._skipped_before
        everyone = self.accelerator.gather(self._tr_loss.detach().reshape(1)).mean()
        total = self._total_loss_scalar - float(self._tr_loss) + float(everyone) - self._restored_loss
        if steps:
            logs["train_loss"] = total / (steps - skipped) if steps > skipped else math.nan

    def _watch_collapse(self: Any, logs: dict[str, Any]) -> None:
        """Warn once when few records have carried the gradient in several logs running."""
        threshold, share = self.args.min_effective_sample_size, logs.get("effective_sample_size")
        if not threshold or share is None or not logs.get("num_target_tokens"):
            return
        self._low_logs = self._low_logs + 1 if share < threshold else 0
        if self._low_logs < LOGS_OF_A_COLLAPSE or self._warned_of_collapse:
            return
        self._warned_of_collapse = True
        if self.accelerator.is_main_process:
            logger.warning(
                "step %d: the effective sample size was below %g of the batch in %d logs running (now %.3g): a few "
                "records carry the whole gradient. Take a smaller k, an `mle_mix` such as 0.1, or an MLE phase first "
                "(start from its checkpoint)",
                *(self.state.global_step, threshold, self._low_logs, share),
            )


def take_records(batch: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """A batch without its record ids, and them (None if it has none)."""
    if RECORD not in batch:
        return batch, None
    return {key: value for key, value in batch.items() if key != RECORD}, batch[RECORD]


def _local(parameter: Any) -> Any:
    parameter = getattr(parameter, "ds_tensor", parameter)  # a process's part under ZeRO-3
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _number(value: Any) -> Any:
    """A float, or its name (`nan`, `inf`) where JSON has no number for it."""
    if value is None:
        return None
    number = float(value.full_tensor() if hasattr(value, "full_tensor") else value)
    return number if math.isfinite(number) else str(number)


def _names(ids: Sequence[str] | None) -> str:
    if ids is None:
        return "unknown (the data have no column `record_id`)"
    more = f", ... ({len(ids)} in all)" if len(ids) > _SHOWN else ""
    return ", ".join(ids[:_SHOWN]) + more


def _advice(report: dict[str, Any], deepspeed: bool) -> str:
    if not report["weights_finite"]:
        return "The weights are not finite: go back to an earlier checkpoint with a lower learning rate"
    if deepspeed:  # which cannot skip a step
        return "Look at these records, or begin anew with a lower learning rate, which --resume cannot set there"
    return "Look at these records, go on with a lower learning rate, or skip such steps with --skip_nonfinite_steps"
