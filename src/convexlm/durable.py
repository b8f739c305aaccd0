"""What lets `ConvexTrainer` be stopped at any moment and go on as if it had not been.

Beyond what transformers saves (weights, optimizer, schedule, every process's random state, the step), a checkpoint
here has what was summed up for the next log, so that `metrics.jsonl` of a resumed run is that of an undisturbed one
whatever `logging_steps` and `save_steps` are. It is saved after the logs and evaluations of its step, brought to
the disk, and only then do older ones go (transformers deletes them before it is known to be whole, and at the end of
a training with a `save_total_limit` of 1 the newest, if another is the best).
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object, is_peft_model
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from convexlm.adapter_refusals import other_when_resumed
from convexlm.attributes import changed
from convexlm.checkpoints import (
    PROGRESS_FILE,
    all_checkpoints,
    begin_checkpoint,
    best_step,
    complete_checkpoints,
    finish_checkpoint,
    is_interruption,
    rotate,
    step_of,
)
from convexlm.converted_weights import has_other_names, load_as_transformers_does
from convexlm.errors import Stopped
from convexlm.files import give_usual_permissions, write_atomic
from convexlm.fsdp import reshard
from convexlm.interrupts import SignalWatch, agreed_signal, signal_name
from convexlm.objectives import merge_statistics
from convexlm.quantized import kept_dtypes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import TrainerControl, TrainerState, TrainingArguments


class DurableCheckpoints:
    """Mixed into a Trainer before its class.

    Attributes:
        checkpoint_marker: content of the marker of every checkpoint; None: none is written (a user's own script).
        signal_watch: asked after every step; when it has a signal, all processes save, stop and raise `Stopped`.
        how_to_go_on: the end of what `Stopped` then says.
    """

    checkpoint_marker: dict[str, Any] | None = None
    signal_watch: SignalWatch | None = None
    how_to_go_on = "resume from it to go on"

    def _init_durable(self: Any) -> None:
        self._true_args: dict[str, Any] = {}  # what is changed in `args` while training or saving, as it really is
        self._epoch_closed = False
        self._save_is_due = False
        self._saved_step: int | None = None
        self.add_callback(_Moments(self))

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer, which is not told of `save_total_limit`: the newest and the best are kept, by us."""
        with self._other_args(save_total_limit=None):
            return super().train(*args, **kwargs)  # type: ignore[misc]

    # -- saving -------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self: Any, model: Any, trial: Any, interrupted: bool = False) -> None:
        """The Trainer's checkpoint, what was summed up for the next log, the marker; then older ones go."""
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        # On some nodes several processes write; each node's first sees to its own folder.
        if self.args.should_save:
            begin_checkpoint(folder)
        progress = self._progress()
        self.accelerator.wait_for_everyone()
        # What is saved for a signal alone is there to go on from.
        changes: dict[str, Any] = {"save_only_model": False} if interrupted else {}
        self._choose_best(run_dir, interrupted)
        with self._other_args(save_total_limit=None, **changes):
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            resumable = not self.args.save_only_model
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_atomic(folder / PROGRESS_FILE, json.dumps(progress) + "\n")
            marker = self.checkpoint_marker
            finish_checkpoint(folder, marker, resumable=resumable, interrupted=interrupted)
            limit = self._true_args.get("save_total_limit", self.args.save_total_limit)
            best = self.state.best_model_checkpoint
            if marker is not None:
                rotate(run_dir, limit, best)
            else:
                rotate_checkpoints(str(run_dir), limit, best, use_mtime=True)
        self._saved_step = self.state.global_step

    def _choose_best(self: Any, run_dir: Path, interrupted: bool) -> None:
        """Have the best of what is saved be the best checkpoint.

        The Trainer takes the step that was best of all, and where nothing was saved at that one, whichever checkpoint
        it had named before. What is saved for a signal alone will go.
        """
        metric = self.args.metric_for_best_model
        if metric is None:
            return
        whole = all_checkpoints if self.checkpoint_marker is None else complete_checkpoints
        steps = {step_of(path) for path in whole(run_dir) if not is_interruption(path)}
        steps = steps - {self.state.global_step} if interrupted else steps | {self.state.global_step}
        self.state.best_global_step = best_step(self.state.log_history, metric, self.args.greater_is_better, steps)

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As in the Trainer; the options that it pickles beside the weights are the true ones, without the token.

        All files have the usual permissions.
        """
        if state_dict is not None:
            # Gathered by DeepSpeed, tied weights are two copies, and both would be written.
            tied = getattr(self.model, "all_tied_weights_keys", None) or {}
            state_dict = {name: x for name, x in state_dict.items() if tied.get(name) not in state_dict}
        with changed(self.args, **{**self._true_args, "hub_token": None}):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        give_usual_permissions(Path(output_dir or self.args.output_dir).glob("*.safetensors"))

    def _issue_warnings_after_load(self: Any, load_result: Any) -> None:
        """As in the Trainer, but for tied weights, which a checkpoint holds under their other name only."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)  # type: ignore[misc]

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        """As in the Trainer; an adapter stays in the dtype that it is trained in, and experts find their weights."""
        if reason := other_when_resumed(self.model):
            raise ValueError(f"{resume_from_checkpoint}: cannot be gone on from: {reason}; begin anew")
        if self._reads_other_names(resume_from_checkpoint):
            load_as_transformers_does(self.model, resume_from_checkpoint)
            return
        with kept_dtypes(self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self: Any) -> None:
        """As in the Trainer, likewise."""
        if self._reads_other_names(self.state.best_model_checkpoint):
            load_as_transformers_does(self.model, self.state.best_model_checkpoint)
            return
        if self.is_fsdp_enabled:
            reshard(self.model)
        with kept_dtypes(self.model):
            super()._load_best_model()  # type: ignore[misc]

    def _reads_other_names(self: Any, folder: str) -> bool:
        # FSDP and DeepSpeed have files of their own, with the model's names.
        apart = self.is_fsdp_enabled or self.is_deepspeed_enabled or is_peft_model(self.model)
        return not apart and has_other_names(self.model, folder)

    @contextlib.contextmanager
    def _other_args(self: Any, **changes: Any) -> Iterator[None]:
        outer = self._true_args
        self._true_args = {**{name: getattr(self.args, name) for name in changes}, **outer}
        try:
            with changed(self.args, **changes):
                yield
        finally:
            self._true_args = outer

    # -- the end of a step --------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self: Any, *args: Any, **kwargs: Any) -> None:
        """As in the Trainer, with saving put last of all that happens at a step; then stop if a signal came.

        At the last step of an epoch the Trainer saves before the logs and the evaluation of the epoch's end, which a
        run stopped in between would never have.
        """
        last = self.control.should_training_stop or self._epoch_ends()
        if not self._epoch_closed:
            self._save_is_due = last and self.control.should_save
            self.control.should_save = self.control.should_save and not self._save_is_due
        elif self._save_is_due:
            self.control.should_save, self._save_is_due = True, False
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
        if self.signal_watch is None:
            return
        number = agreed_signal(self.signal_watch.number, self.accelerator.device)
        if number is None or self.control.should_training_stop or (self._epoch_ends() and not self._epoch_closed):
            return
        if self._saved_step != self.state.global_step:
            self._save_checkpoint(self.model, None, interrupted=True)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        raise Stopped(
            f"stopped by {signal_name(number)} after step {self.state.global_step} of {self.state.max_steps}; "
            f"checkpoint-{self.state.global_step} in {self.args.output_dir} is complete, {self.how_to_go_on}",
            exit_code=128 + number,
        )

    def _epoch_ends(self: Any) -> bool:
        return self.state.epoch is not None and float(self.state.epoch).is_integer()

    # -- what was summed up for the next log --------------------------------------------------------------------------

    def _progress(self: Any) -> dict[str, Any]:
        """The sums of every process since the last log, exact, and the counts of the whole run."""
        statistics = self._statistics["train"]
        own = {
            "tr_loss": float(self._tr_loss).hex(),
            "statistics": None if statistics is None else {key: float(x).hex() for key, x in statistics.items()},
            "seen": None if self._seen is None else int(self._seen),
        }
        return {
            "step": self.state.global_step,
            "last_logged": self._globalstep_last_logged,
            "counts": self._guard_counts(),
            "aux_loss": list(self._metrics["train"].get("aux_loss", ())),  # of all processes already
            "processes": gather_object([own]),
        }

    def _restore_progress(self: Any, checkpoint: Path) -> None:
        """Take up the sums again; on another number of processes the first takes them all."""
        path = checkpoint / PROGRESS_FILE
        if not path.is_file():
            return
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["step"] != self.state.global_step:
            return
        self._globalstep_last_logged = content["last_logged"]
        self._restore_guard_counts(content["counts"])
        if content.get("aux_loss"):
            self._metrics["train"]["aux_loss"] = content["aux_loss"]
        saved, world = content["processes"], self.accelerator.num_processes
        rank = self.accelerator.process_index
        same = len(saved) == world
        mine = [saved[rank]] if same else saved if rank == 0 else []
        self._restored_loss = sum(float.fromhex(part["tr_loss"]) for part in saved) / len(saved)
        for part in mine:
            # The Trainer logs the mean over processes.
            share = 1.0 if same else world / len(saved)
            self._tr_loss += float.fromhex(part["tr_loss"]) * share
            if part["seen"] is not None:
                seen = torch.tensor(part["seen"], device=self.accelerator.device)
                self._seen = seen if self._seen is None else self._seen + seen
            if part["statistics"] is not None:
                device = self.accelerator.device
                dtype = torch.float32 if device.type == "mps" else torch.float64
                sums = {
                    key: torch.tensor(float.fromhex(x), dtype=dtype, device=device)
                    for key, x in part["statistics"].items()
                }
                kept = self._statistics["train"]
                self._statistics["train"] = sums if kept is None else merge_statistics(kept, sums)


class _Moments(TrainerCallback):
    """Tells the trainer where in its loop it is."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Training starts or goes on."""
        trainer = self.trainer
        trainer._epoch_closed, trainer._save_is_due, trainer._saved_step = False, False, None
        trainer._begin_training()
        if trainer._resumed_from is not None:
            trainer._restore_progress(Path(trainer._resumed_from))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Steps follow."""
        self.trainer._epoch_closed = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """No more steps; the epoch's own log, evaluation and save follow."""
        self.trainer._epoch_closed = True
